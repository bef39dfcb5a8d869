#!/usr/bin/env bash
#
# Runs the tests whose result can differ between kernels on Debian's kernels, and trials of egressbpf
# on a whole Debian. Emulation is about ten times slower: so each kernel runs TestKernel,
# which shows all defences at work, and beyond that what the kernel of a developer's machine
# cannot show. What the kernels do is compared with docs/kernels.md.
# Usage: test.sh [--document|--download|--emulate] [KERNEL|TRIAL]...
#        test.sh --beside COMMAND [ARG]...
#   --document   only write docs/kernels.md, from TestKernel on each kernel
#   --download   only download what a later run needs
#   --emulate    emulate a machine for each trial
#   --beside     run the command too: emulated machines get what it leaves of the processors, and
#                trials on this machine's own kernel come after it. If it fails, all ends.
# A TRIAL is debian: the service; boot: the service at a boot of Debian's kernel; deb, rpm: the packages;
# image: egressbpf as a container; fleet: Ansible and cloud-init. All but boot take place on this
# machine's own kernel if it can have them. The default is all kernels that run.sh knows, and all
# trials but boot or, where each of them needs emulation, debian.
set -euo pipefail
cd "$(dirname "$0")/../../.."

# choose KERNEL sets, for each package, the tests that run on the bare kernel.
choose() {
    loader=TestKernel events='' verdict=''
    [ -z "$document" ] || return 0
    case $1 in
    5.10) # the oldest: no netfilter programs, fmod_ret, EPERM
        loader+='|TestSwap|TestRefusedSocketsOfRecognised'
        verdict='TestVerdict'
        ;;
    6.1) # the last long-lived one whose host side is tc
        loader+='|TestHostSideBefore64'
        ;;
    6.12) # the present Debian, with lsm_cgroup
        loader+='|TestKeptFamiliesRefuse|TestRefusedSocketsOfRecognised'
        ;;
    sid) # the newest
        loader+='|TestSwap|TestRemovedContainers'
        verdict='TestVerdict'
        ;;
    6.12-arm64)
        loader+='|TestSwap|TestRemovedContainers|TestRefusedSocketsOfRecognised'
        events='TestFlood'
        verdict='TestVerdict|TestOwner'
        ;;
    *-16k) # the size of a page matters to buffers of events
        events='TestFlood|TestReaders|TestMovedMaps'
        ;;
    esac
}

# Attacks through sockets of other families than IP's.
readonly packet_sockets='^(raw IP|AF_PACKET|AF_PACKET SOCK_DGRAM|AF_PACKET TX_RING|SOCK_PACKET|AF_XDP|io_uring|RDS|VLAN tag|802.1ad|multicast routing)$'
# Attacks that the host side stops: such sockets, and packets that a container changes or forwards.
readonly behind_the_hook='^(raw IP|AF_PACKET|AF_PACKET TSO|AF_PACKET, ACK|two VLAN tags|802.1ad|nft forged source|tc pedit|tun|veth and forwarding)$'

document='' download='' here=() beside=()
! internal/test/vmtest/here.sh --can || here=(--here)
sudo=() # for images
[ "$(id -u)" = 0 ] || sudo=(sudo)
case ${1-} in
--document) document=yes && shift ;;
--download) download=yes && shift ;;
--emulate) here=() && shift ;;
--beside)
    beside=("${@:2}")
    [ ${#beside[@]} -gt 0 ] || { echo 'test.sh: --beside needs a command' >&2 && exit 2; }
    set --
    ;;
esac
machines=("$@")
if [ ${#machines[@]} = 0 ]; then
    mapfile -t machines < <(internal/test/vmtest/run.sh --kernels)
    if [ -n "$document" ]; then
        true
    elif [ ${#here[@]} = 0 ]; then
        machines+=(debian)
    else
        machines+=(debian deb rpm image fleet)
    fi
fi
readonly trials='^(boot|debian|deb|rpm|image|fleet)$'

if [ -n "$download" ]; then
    for machine in "${machines[@]}"; do
        case $machine in
        boot | debian | deb | rpm | image | fleet) "${sudo[@]}" internal/test/vmtest/debian.sh --image ;;
        6.1 | 6.12)
            internal/test/vmtest/run.sh --download "$machine"
            internal/test/vmtest/run.sh --download --root "$machine"
            ;;
        *) internal/test/vmtest/run.sh --download "$machine" ;;
        esac
    done
    exit
fi

dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$dir"' EXIT
trap 'exit 1' USR1
mkdir "$dir"/{amd64,arm64,facts}
: >"$dir/passed"
case " ${machines[*]} " in *arm64*) architectures='amd64 arm64' ;; *) architectures=amd64 ;; esac
for arch in $architectures; do
    for package in internal/loader internal/events internal/test/verdict; do
        GOARCH=$arch CGO_ENABLED=0 go test -c -o "$dir/$arch/${package##*/}" "./$package"
    done
done
if [ -z "$document" ]; then
    for package in internal/test/{dockertest,e2e,hardened}; do
        CGO_ENABLED=0 go test -c -o "$dir/amd64/${package##*/}" "./$package"
    done
    CGO_ENABLED=0 go build -buildvcs=false -o "$dir/egressbpf" ./cmd/egressbpf
fi

patience=(--timeout 1500)
[ ${#beside[@]} = 0 ] || patience=(--timeout 3600)

# guest NAME MACHINE COMMAND... runs the command, and again if no result came back:
# emulation itself can fail.
guest() {
    local name=$1 machine=$2 from=$SECONDS code=0 emulated=yes behind=() as=()
    shift 2
    [ "$1" != sudo ] || { as=(sudo) && shift; } # it may have to ask at the terminal
    [[ " $* " != *' --here '* ]] || emulated=
    if [ -n "$emulated" ] && [ ${#beside[@]} -gt 0 ]; then
        # A nice value counts among the processes of a session; among sessions, where there are
        # autogroups, it is theirs that counts.
        # shellcheck disable=SC2016
        behind=(setsid --wait bash -c 'echo 10 2>/dev/null >/proc/self/autogroup; exec nice -n 10 "$@"' bash)
    fi
    for _ in 1 2; do
        code=0
        "${as[@]}" setpriv --pdeathsig TERM "${behind[@]}" "$@" >"$log" 2>&1 || code=$?
        [ "$code" = 125 ] && [ -n "$emulated" ] || break
    done
    if [ "$code" != 0 ]; then
        cat "$log"
        echo "$machine: $name failed"
        return "$code"
    fi
    echo "ok   $name on $machine, $((SECONDS - from)) s"
}

# alone KERNEL runs tests with nothing else on the machine, all in one boot, which takes long.
alone() {
    local arch=amd64 loader events verdict package tests files=() script=$dir/alone-$1
    case $1 in *arm64*) arch=arm64 ;; esac
    choose "$1"
    {
        echo '#!/bin/sh'
        echo 'failed=0'
        for package in loader events verdict; do
            tests=${!package}
            [ -n "$tests" ] || continue
            files+=(--file "$dir/$arch/$package:/bin/$package")
            echo "/bin/$package -test.short -test.run '^($tests)\$' || failed=1"
        done
        echo 'exit $failed'
    } >"$script"
    guest "${loader:+loader }${events:+events }${verdict:+verdict }" "$1" \
        internal/test/vmtest/run.sh "${patience[@]}" "${files[@]}" "$1" "$script" || return
    cp "$log" "$dir/facts/$1"
}

# in_root KERNEL E2E ATTACKS-ON NAMES runs, with this machine's root and Docker, tests of e2e, and the attacks of
# these names against one set of defences.
in_root() {
    local script=$dir/root-$1
    {
        echo '#!/bin/sh'
        echo 'failed=0'
        echo "$dir/amd64/e2e -test.run '^($2)\$' || failed=1"
        echo "$dir/amd64/dockertest -test.run '^TestAttacks\$/^$3\$' -attacks '$4' || failed=1"
        echo 'exit $failed'
    } >"$script"
    chmod +x "$script"
    guest 'e2e dockertest' "$1" internal/test/vmtest/run.sh --root "${patience[@]}" --append apparmor=0 \
        --env "EGRESSBPF_BINARY=$dir/egressbpf" "$1" "$script"
}

# boots KERNEL prints a line for each boot of a kernel, for on_kernel: those with this machine's root take longest.
boots() {
    if [ -z "$document" ]; then
        case $1 in
        6.1) echo root ;;
        6.12) printf '%s\n' root hardened lockdown ;;
        esac
    fi
    echo alone
}

# Tests with real packets and containers run for what this machine's own kernel may lack
# (refusing sockets) or does differently (the host side before 6.4).
on_kernel() {
    case $2-$1 in
    root-6.1) in_root "$1" 'TestNewBridge|TestMetadataForOneContainer|TestMonitorOfTheHostSide' host_side "$behind_the_hook" ;;
    # It has kinds of tunnels that other machines may lack.
    root-6.12) in_root "$1" TestUnusualTunnels families "$packet_sockets" ;;
    lockdown-*) guest lockdown "$1" internal/test/vmtest/run.sh --root "${patience[@]}" --append lockdown=confidentiality "$1" "$dir/amd64/loader" -test.run '^TestLockedDown$' ;;
    hardened-*)
        guest hardened "$1" internal/test/vmtest/run.sh --root "${patience[@]}" --append lockdown=integrity --append security=apparmor \
            --env "EGRESSBPF_BINARY=$dir/egressbpf" "$1" "$dir/amd64/hardened" -guest \
            -test.run '^(TestLockdown|TestHardenedSettings|TestPrivateMount|TestNoJIT|TestAppArmor)$'
        ;;
    alone-*) alone "$1" ;;
    esac
}

# The packages of this commit are upgraded from, and gone back to.
readonly earlier=3344bc4

# packaged FOLDER NAME BUILD SOURCE VERSION EPOCH builds the source, as BUILD/egressbpf-NAME, and makes packages
# of it in FOLDER/NAME.
packaged() {
    local command="$3/egressbpf-$2"
    (cd "$4" && CGO_ENABLED=0 go build -buildvcs=false -trimpath -o "$command" \
        -ldflags "-s -w -X github.com/egressbpf/egressbpf/internal/loader.version=$5" ./cmd/egressbpf) || return
    SOURCE_DATE_EPOCH=$6 dist/packages/build.sh "$5" amd64 "$command" "$command" "$1/$2" || return
    echo "$5" >"$1/$2/version"
}

package_both() {
    local made=$1.made
    rm -rf "$made" "$1.build"
    mkdir -p "$1.build/source" && git archive "$earlier" | tar x -C "$1.build/source" || return
    packaged "$made" earlier "$1.build" "$1.build/source" "$earlier" "$(git log -1 --format=%ct "$earlier")" || return
    packaged "$made" this "$1.build" . "$(git describe --tags --always --dirty)" "$(git log -1 --format=%ct)" || return
    mv "$made" "$1"
}

# whole NAME [--here] boots a whole Debian with the folder of that name.
whole() {
    guest 'all of egressbpf' "$1" "${sudo[@]}" internal/test/vmtest/debian.sh "${patience[@]}" "${@:2}" "$dir/$1"
}

# service TRIAL [--here] runs `make install` and tests the service on a whole Debian.
service() {
    mkdir "$dir/$1"
    cp internal/test/vmtest/{guest.sh,debian/run} "$dir/$1"
    if [ "$1" = boot ]; then
        : >"$dir/$1/brief"
    else
        cp internal/test/critest/runc-without-shares "$dir/$1"
        CGO_ENABLED=0 go build -o "$dir/$1/pod" ./internal/test/vmtest/debian/pod
    fi
    flock "$dir" make --no-print-directory install DESTDIR="$dir/$1/root" SUDO= >"$log" 2>&1 || { cat "$log"; return 1; }
    whole "$@"
}

# with_packages KIND [--here] installs, upgrades and removes packages, deb or rpm, or the container's image, on a
# whole Debian.
with_packages() {
    (
        flock 9
        [ -d "$dir/packages" ] || package_both "$dir/packages" >"$log" 2>&1 || { cat "$log"; exit 1; }
    ) 9>"$dir/packages.lock" || return
    cp -r "$dir/packages" "$dir/$1"
    echo "$1" >"$dir/$1/kind"
    cp internal/test/vmtest/{guest.sh,packages/run} "$dir/$1"
    if [ "$1" = image ]; then
        make --no-print-directory image >"$log" 2>&1 || { cat "$log"; return 1; }
        cp bin/image/egressbpf-image-amd64.tar "$dir/$1/image.tar"
        cp "$dir/packages.build/egressbpf-earlier" "$dir/$1/earlier/egressbpf"
        cp docs/container.md dist/container/compose.yaml dist/config.yaml "$dir/$1"
    fi
    CGO_ENABLED=0 go build -o "$dir/$1/traffic" ./internal/test/vmtest/packages/traffic
    whole "$@"
}

# on_debian TRIAL... makes trials one after the other.
on_debian() {
    local trial failed=0
    for trial; do
        case $trial in
        boot) service boot ;;
        debian) service debian "${here[@]}" ;;
        deb | rpm | image) with_packages "$trial" "${here[@]}" ;;
        fleet) guest 'Ansible and cloud-init' fleet internal/test/vmtest/fleet/test.sh --all "${here[@]}" ;;
        esac || failed=1
    done
    return "$failed"
}

# job starts a command as a job, with a file for what it prints. It counts as passed only if it says so.
started=0
job() {
    ((++started))
    log=$dir/log-$started
    { "$@" && echo >>"$dir/passed"; } &
}

# on_this_kernel runs what does without emulation, one after the other.
on_this_kernel() {
    if [ ${#beside[@]} -gt 0 ] && ! setpriv --pdeathsig TERM timeout 3h "${beside[@]}"; then
        kill -USR1 $$
        return 1
    fi
    on_debian "${on_this[@]}"
}

on_this=() emulated=() kernels=()
for machine in "${machines[@]}"; do
    if [[ ! $machine =~ $trials ]]; then
        kernels+=("$machine")
    elif [ "$machine" = boot ] || [ ${#here[@]} = 0 ]; then
        emulated+=("$machine")
    else
        on_this+=("$machine")
    fi
done
[ ${#kernels[@]} = 0 ] || mapfile -t kernels < <(printf '%s\n' "${kernels[@]}" | sort -rV)

# As many machines at once as there are processors, those that take longest first.
places=$(nproc)
[ ${#beside[@]} = 0 ] || ((++places))
[ ${#beside[@]} = 0 ] && [ ${#on_this[@]} = 0 ] || job on_this_kernel
waiting=()
for machine in "${emulated[@]}"; do
    waiting+=("on_debian $machine")
done
for machine in "${kernels[@]}"; do
    for boot in $(boots "$machine"); do
        waiting+=("on_kernel $machine $boot")
    done
done
for work in "${waiting[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$places" ]; do
        wait -n || true
    done
    # shellcheck disable=SC2086 # words without spaces
    job $work
done
wait

if [ -n "$document" ]; then
    go run ./internal/test/kernels write "$dir/facts" || exit 1
elif [ -n "$(ls "$dir/facts")" ]; then
    go run ./internal/test/kernels check "$dir/facts" || exit 1
fi
[ "$(wc -l <"$dir/passed")" = "$started" ]
