#!/usr/bin/env bash
#
# Runs the tests whose result can differ between kernels on each of Debian's kernels, and
# egressbpf as a service on a whole Debian. Emulation is about ten times slower, so tests of
# mere arithmetic are left out.
# Usage: test.sh [KERNEL|debian]...   (default: all that run.sh knows, and debian)
set -euo pipefail
cd "$(dirname "$0")/../../.."

# For the oldest kernel: tests whose result depends on the compiler or the verifier.
oldest='^(TestVerdict|TestOwner|TestRecognised|TestPermitted|TestContention|TestHostIngress.+)$'
loader='^(TestAttach|TestFormats|TestKilledInMigration|TestRecognise|TestRemovedContainers|TestRefusedSocketsOfRecognised|TestHostSideBefore64)$'
events='^(TestRefusedConnect|TestFlood|TestReaders|TestMovedMaps|TestDetached|TestAudit)$'
on_some='^(TestSwap|TestRelease|TestRemovedCgroup|TestDetachedByOthers|TestKeptFamiliesRefuse)$'

machines=("$@")
if [ ${#machines[@]} = 0 ]; then
    mapfile -t machines < <(internal/test/vmtest/run.sh --kernels)
    machines+=(debian)
fi

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for package in internal/loader internal/events internal/test/{verdict,dockertest,e2e}; do
    CGO_ENABLED=0 go test -c -o "$dir/${package##*/}" "./$package"
done
CGO_ENABLED=0 go build -buildvcs=false -o "$dir/egressbpf" ./cmd/egressbpf

# guest NAME MACHINE COMMAND... runs the command, and again if no result came back:
# emulation itself can fail.
guest() {
    local name=$1 machine=$2 from=$SECONDS code=0
    shift 2
    for _ in 1 2; do
        code=0
        "$@" >"$dir/out-$machine" 2>&1 || code=$?
        [ "$code" = 125 ] || break
    done
    if [ "$code" != 0 ]; then
        cat "$dir/out-$machine"
        echo "$machine: $name failed"
        return "$code"
    fi
    echo "ok   $name on $machine, $((SECONDS - from)) s"
}

# alone KERNEL PACKAGE TESTS [OPTION]... runs tests with nothing else on the machine.
alone() {
    guest "$2" "$1" internal/test/vmtest/run.sh --timeout 1500 "${@:4}" "$1" "$dir/$2" -test.short -test.run "$3"
}

# in_root KERNEL PACKAGE TESTS runs tests with this machine's root and Docker.
in_root() {
    guest "$2" "$1" internal/test/vmtest/run.sh --root --timeout 1500 --append apparmor=0 --env "EGRESSBPF_BINARY=$dir/egressbpf" \
        "$1" "$dir/$2" -test.run "$3"
}

# Tests with real packets and containers run for what this machine's own kernel may lack
# (refusing sockets) or does differently (the host side before 6.4).
on_kernel() {
    local failed=0
    case $1 in
    5.10) alone "$1" verdict "$oldest" || failed=1 ;;
    6.1)
        in_root "$1" e2e '^(TestNewBridge|TestMetadataForOneContainer|TestMonitor|TestMonitorOfTheHostSide)$' || failed=1
        ;;
    # It has kinds of tunnels that other machines may lack.
    6.12) in_root "$1" e2e '^TestUnusualTunnels$' || failed=1 ;;
    esac
    alone "$1" loader "$loader" || failed=1
    alone "$1" events "$events" || failed=1
    [ "$1" = 6.1 ] || alone "$1" loader "$on_some" || failed=1
    [ "$1" != 6.12 ] || alone "$1" loader '^TestLockedDown$' --root --append lockdown=confidentiality || failed=1
    # What connect() says differs on 5.10.
    case $1 in
    5.10) ;;
    6.1) in_root "$1" dockertest '^TestAttacks$/^host_side$' || failed=1 ;;
    *) in_root "$1" dockertest '^TestAttacks$/^all$' || failed=1 ;;
    esac
    return "$failed"
}

# The packages of this commit are upgraded from, and gone back to.
readonly earlier=c10a985

# packaged NAME SOURCE VERSION EPOCH builds the source in a folder and makes packages of it.
packaged() {
    local command="$dir/egressbpf-$1"
    (cd "$2" && CGO_ENABLED=0 go build -buildvcs=false -trimpath -o "$command" \
        -ldflags "-s -w -X github.com/egressbpf/egressbpf/internal/loader.version=$3" ./cmd/egressbpf) || return
    SOURCE_DATE_EPOCH=$4 dist/packages/build.sh "$3" amd64 "$command" "$command" "$dir/debian/$1" || return
    echo "$3" >"$dir/debian/$1/version"
}

package_both() {
    mkdir "$dir/earlier" && git archive "$earlier" | tar x -C "$dir/earlier" || return
    packaged earlier "$dir/earlier" "$earlier" "$(git log -1 --format=%ct "$earlier")" || return
    packaged this . "$(git describe --tags --always --dirty)" "$(git log -1 --format=%ct)"
}

# on_debian tests the packages, and the service that they install, on a whole Debian.
on_debian() {
    mkdir "$dir/debian"
    cp internal/test/vmtest/debian/run "$dir/debian"
    package_both >"$dir/out-debian" 2>&1 || { cat "$dir/out-debian"; return 1; }
    # The image needs root.
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    guest 'all of egressbpf' debian "${sudo[@]}" internal/test/vmtest/debian.sh --timeout 1500 "$dir/debian"
}

# As many machines at once as there are processors, the longest test first.
failed=0
for machine in $(printf '%s\n' "${machines[@]}" | sort -rV); do
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do
        wait -n || failed=1
    done
    case $machine in
    debian) on_debian & ;;
    *) on_kernel "$machine" & ;;
    esac
done
for job in $(jobs -p); do
    wait "$job" || failed=1
done
exit "$failed"
