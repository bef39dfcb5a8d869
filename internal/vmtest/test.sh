#!/usr/bin/env bash
#
# Runs the tests whose answer can differ from kernel to kernel on each of Debian's
# kernels. Emulation is some ten times slower: what is only arithmetic stays out.
# Usage: test.sh [KERNEL]...   (default: all that run.sh knows)
set -euo pipefail
cd "$(dirname "$0")/../.."

tests=(
    internal/verdict '^(TestVerdict|TestOwner|TestContention)$'
    internal/loader '^(TestAttach|TestSwap|TestModes|TestContainersOfEachLevel|TestRelease|TestRemovedCgroup|TestDetachedByOthers|TestManyRules|TestMountsBPFFS|TestErrorInSwap)$'
)

kernels=("$@")
if [ ${#kernels[@]} = 0 ]; then
    mapfile -t kernels < <(internal/vmtest/run.sh --kernels)
fi

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for ((i = 0; i < ${#tests[@]}; i += 2)); do
    CGO_ENABLED=0 go test -c -o "$dir/${tests[i]##*/}" "./${tests[i]}"
done
for kernel in "${kernels[@]}"; do
    for ((i = 0; i < ${#tests[@]}; i += 2)); do
        from=$SECONDS
        internal/vmtest/run.sh --timeout 900 "$kernel" "$dir/${tests[i]##*/}" -test.short -test.run "${tests[i + 1]}" >"$dir/out" || {
            code=$?
            cat "$dir/out"
            echo "kernel $kernel: ${tests[i]} failed"
            exit "$code"
        }
        echo "ok   ${tests[i]} on kernel $kernel, $((SECONDS - from)) s"
    done
done
