#!/usr/bin/env bash
#
# Tests the Ansible role and the cloud-init user-data with Ansible and cloud-init, on a whole
# Debian that debian.sh boots. Exits as debian.sh does.
# Usage: test.sh [--all] [OPTION OF DEBIAN.SH]...   (by default without the steps of the role that take longest)
set -euo pipefail
cd "$(dirname "$0")/../../../.."

all=
if [ "${1-}" = --all ]; then
    all=yes
    shift
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
version=$(git describe --tags --always --dirty)
CGO_ENABLED=0 go build -buildvcs=false -trimpath -o "$dir/egressbpf" \
    -ldflags "-s -w -X github.com/egressbpf/egressbpf/internal/loader.version=$version" ./cmd/egressbpf
mkdir "$dir/files"
dist/packages/build.sh "$version" amd64 "$dir/egressbpf" "$dir/egressbpf" "$dir/files"
rm "$dir"/files/*.rpm
[ -z "$all" ] || : >"$dir/files/all"
cp -r internal/test/vmtest/{guest.sh,fleet/run} dist/ansible dist/cloud-init "$dir/files"

# The image needs root.
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)
"${sudo[@]}" internal/test/vmtest/debian.sh --timeout 900 "$@" "$dir/files"
