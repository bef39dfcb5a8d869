#!/usr/bin/env bash
#
# Runs the tests whose answer can differ from kernel to kernel on each of Debian's
# kernels. Emulation is some ten times slower: what is only arithmetic stays out.
# Usage: test.sh [KERNEL]...   (default: all that run.sh knows)
set -euo pipefail
cd "$(dirname "$0")/../.."

tests=(
    internal/verdict '^(TestVerdict|TestOwner|TestRecognised|TestPermitted|TestContention|TestHostIngress.+)$'
    internal/loader '^(TestAttach|TestSwap|TestRelease|TestRemovedCgroup|TestDetachedByOthers|TestKeptFamiliesRefuse|TestRecognise|TestRefusedSocketsOfRecognised|TestHostSideBefore64)$'
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
CGO_ENABLED=0 go test -c -o "$dir/dockertest" ./internal/dockertest
CGO_ENABLED=0 go test -c -o "$dir/e2e" ./internal/e2e
CGO_ENABLED=0 go build -buildvcs=false -o "$dir/egressbpf" ./cmd/egressbpf

# guest NAME KERNEL RUN.SH-ARGUMENT... once more if no result came back: emulation
# can fail by itself.
guest() {
    local name=$1 kernel=$2 from=$SECONDS code=0
    shift 2
    for _ in 1 2; do
        code=0
        internal/vmtest/run.sh "$@" >"$dir/out-$kernel" 2>&1 || code=$?
        [ "$code" = 125 ] || break
    done
    if [ "$code" != 0 ]; then
        cat "$dir/out-$kernel"
        echo "kernel $kernel: $name failed"
        return "$code"
    fi
    echo "ok   $name on kernel $kernel, $((SECONDS - from)) s"
}

# in_root KERNEL PACKAGE TESTS
in_root() {
    guest "internal/$2" "$1" --root --timeout 900 --append apparmor=0 --env "EGRESSBPF_BINARY=$dir/egressbpf" \
        "$1" "$dir/$2" -test.run "$3"
}

on_kernel() {
    local kernel=$1 failed=0 attacks=
    for ((i = 0; i < ${#tests[@]}; i += 2)); do
        guest "${tests[i]}" "$kernel" --timeout 900 "$kernel" "$dir/${tests[i]##*/}" -test.short -test.run "${tests[i + 1]}" || failed=1
    done
    # With real packets and containers: what this machine's own kernel may not be able to,
    # to refuse sockets, or does in another way. What connect() says differs on 5.10.
    if [ "$kernel" != 5.10 ]; then
        attacks='^TestAttacks$'
    fi
    # Before 6.4 the host side is another one.
    if [ "$kernel" = 6.1 ]; then
        attacks='^(TestAttacks|TestLegitimateUses)$'
        in_root "$kernel" e2e '^(TestNewBridge|TestMetadataForOneContainer)$' || failed=1
    fi
    [ -z "$attacks" ] || in_root "$kernel" dockertest "$attacks" || failed=1
    return "$failed"
}

# As many at once as there are processors, the longest first.
failed=0
for kernel in $(printf '%s\n' "${kernels[@]}" | sort -rV); do
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do
        wait -n || failed=1
    done
    on_kernel "$kernel" &
done
for job in $(jobs -p); do
    wait "$job" || failed=1
done
exit "$failed"
