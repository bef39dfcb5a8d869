#!/usr/bin/env bash
#
# Runs the tests that need nothing but a kernel on each of Debian's kernels.
# Usage: test.sh [KERNEL]...   (default: all that run.sh knows)
set -euo pipefail
cd "$(dirname "$0")/../.."

# Those whose answer can differ from kernel to kernel. Short: emulation is slow.
packages=(internal/verdict internal/loader)

kernels=("$@")
if [ ${#kernels[@]} = 0 ]; then
    mapfile -t kernels < <(internal/vmtest/run.sh --kernels)
fi

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for package in "${packages[@]}"; do
    CGO_ENABLED=0 go test -c -o "$dir/${package##*/}" "./$package"
done
for kernel in "${kernels[@]}"; do
    for package in "${packages[@]}"; do
        echo "kernel $kernel: $package"
        internal/vmtest/run.sh --timeout 600 "$kernel" "$dir/${package##*/}" -test.short
    done
done
