#!/usr/bin/env bash
#
# Makes the deb and the rpm package of a command that is built. See usage.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() {
	cat <<'END'
usage: build.sh VERSION ARCH BINARY NATIVE FOLDER

Makes the packages of BINARY, which is built for ARCH (amd64 or arm64), in FOLDER. NATIVE is the same
command built for this machine: it writes the manual pages and the completions. VERSION is as
`git describe` prints it.

SOURCE_DATE_EPOCH is the time of everything in the packages (default: that of the commit).
END
}

[ $# = 5 ] || { usage >&2; exit 2; }
version=$1 ARCH=$2 binary=$(realpath "$3") native=$(realpath "$4")
mkdir -p "$5"
folder=$(realpath "$5")
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export ARCH SOURCE_DATE_EPOCH
PACKAGE_VERSION=$(dist/packages/version.sh "$version")
export PACKAGE_VERSION
umask 022

nfpm=$(go tool -modfile=tools/go.mod -n nfpm)
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir -p "$stage"/{scripts,root/{completions,prometheus,doc}}
root=$stage/root

install -D -m 755 "$binary" "$root/usr/sbin/egressbpf"
sed 's|@BINDIR@|/usr/sbin|' dist/egressbpf.service >"$root/egressbpf.service"
echo "$PACKAGE_VERSION" >"$root/version"
cp dist/config.yaml dist/grafana/egressbpf.json "$root"
cp dist/prometheus/*.yml "$root/prometheus"
sed -i 's|/usr/local/share|/usr/share|' "$root/prometheus/scrape.yml"
"$native" man "$root/man8"
gzip -9n "$root"/man8/*
for shell in bash fish zsh; do
	"$native" completion "$shell" >"$root/completions/$shell"
done

cp dist/packages/copyright docs/packages.md CHANGELOG.md LICENSE "$root/doc"
cp bpf/LICENSE.* "$root/doc"
gzip -9n <CHANGELOG.md >"$root/doc/changelog.gz"
cat >"$stage/changelog.yaml" <<END
- semver: $PACKAGE_VERSION-1
  date: $(date --utc --date="@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
  packager: $(sed -n 's/^maintainer: //p' dist/packages/nfpm.yaml)
  changes: [{note: "Version $version: what has changed is in CHANGELOG.md."}]
  deb: {urgency: medium, distributions: [unstable]}
END
dist/packages/third-party.sh "$ARCH" | gzip -9n >"$root/doc/third-party.gz"

for script in preinst postinst prerm postrm pre preun postun posttrans; do
	{
		printf '#!/bin/sh\nset -e\n\n'
		sed "s|@VERSION@|$PACKAGE_VERSION|" dist/packages/scripts/lib.sh
		cat "dist/packages/scripts/$script"
	} >"$stage/scripts/$script"
done
cp dist/packages/lintian-overrides "$stage"
chmod -R u=rwX,go=rX "$stage" # whatever modes the checkout has
find "$stage" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
for packager in deb rpm; do
	(cd "$stage" && "$nfpm" package --config "$OLDPWD/dist/packages/nfpm.yaml" --packager "$packager" --target "$folder" >"$stage/log" 2>&1) ||
		{ cat "$stage/log" >&2; exit 1; }
done
