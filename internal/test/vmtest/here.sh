#!/usr/bin/env bash
#
# Boots the Debian in a disk image on this machine's own kernel, in namespaces of its own, but at the root
# of the control groups, as on a host. Nobody else may have them: see --can.
# Usage: here.sh DISK FOLDER OUT BOOT   (for debian.sh)
#        here.sh --can                  whether this machine allows it, and why not
set -euo pipefail

groups=$(findmnt --noheadings --first-only --output TARGET --types cgroup2) || groups=

tops() { find "$groups" -mindepth 1 -maxdepth 1 -type d; }

# lacks prints what is missing.
lacks() {
    if [ "$(id -u)" != 0 ]; then
        echo 'it needs root'
    elif [ -z "$groups" ] || [ ! -w "$groups/cgroup.procs" ]; then
        echo 'it needs control groups of version 2, and to write to them'
    elif compgen -G "$groups/*.slice" >/dev/null || grep -qs '^populated 1' "$groups"/*/cgroup.events; then
        echo 'a system manager or an engine has the control groups'
    elif [ ! -e /dev/loop-control ]; then
        echo 'it needs loop devices'
    fi
}
lack=$(lacks)
if [ -n "$lack" ]; then
    echo "no Debian on this machine's own kernel: $lack" >&2
    exit 1
fi
[ "${1-}" != --can ] || exit 0
disk=$1 folder=$2 out=$3 boot=$4

# Tests of this machine's kernel run alone: see LockHost of testenv.
exec {lock}<"$groups"
flock "$lock"

options=$(findmnt --noheadings --first-only --output OPTIONS --mountpoint "$groups")
before=$(tops)
controllers=$(<"$groups/cgroup.subtree_control")
# What systemd and dockerd set for the whole kernel. A /proc/sys that cannot be written to would keep
# rootless containers from a /proc of their own.
settings=$(cd /proc/sys && grep -H '' fs/file-max fs/nr_open kernel/keys/root_max*)
root=$(mktemp -d)
machine=
cleanup() {
    set +e # whatever fails, the rest is put back
    [ -z "$machine" ] || kill -KILL "$machine" # and with it all in its namespaces
    umount -R "$root" || umount -Rl "$root" # still used by what is being killed
    rmdir "$root"
    mount -t cgroup2 -o "remount,$options" none "$groups"
    local made group controller setting value
    while IFS=: read -r setting value; do
        echo "$value" >"/proc/sys/$setting"
    done <<<"$settings"
    # It takes a while until nobody is in a group any more.
    for _ in $(seq 100); do
        mapfile -t made < <(tops | grep -vxF "$before")
        [ ${#made[@]} -gt 0 ] || break
        for group in "${made[@]}"; do
            find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null
        done
        sleep 0.1
    done
    for controller in $(<"$groups/cgroup.subtree_control"); do
        [[ " $controllers " == *" $controller "* ]] || echo "-$controller" >"$groups/cgroup.subtree_control"
    done
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
mount -o loop "$disk" "$root"
mount --bind -o ro "$folder" "$root/mnt/test"
: >"$out"

# What sets up hardware, and the settings of the whole kernel.
readonly masked='systemd-sysctl systemd-udevd systemd-udev-trigger systemd-modules-load console-getty'

# enter is the first process in the namespaces.
enter() {
    local root=$1 out=$2 boot=$3 unit name numbers
    cd "$root"
    hostname vmtest
    ip link set lo up
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount -t cgroup2 -o nsdelegate cgroup2 sys/fs/cgroup
    mount -t bpf bpf sys/fs/bpf
    mount -t tmpfs -o mode=755 dev dev
    mkdir dev/pts dev/net
    mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
    while read -r name numbers; do
        # shellcheck disable=SC2086 # major and minor
        mknod -m 666 "dev/$name" c $numbers
    done <<'END'
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
fuse 10 229
net/tun 10 200
END
    ln -s /proc/self/fd dev/fd
    ln -s pts/ptmx dev/ptmx
    mknod -m 600 dev/console c 1 3 # not a link to null, whose mode getty would change
    : >dev/ttyS1
    mount --bind "$out" dev/ttyS1
    for unit in $masked; do
        mount --bind dev/null "usr/lib/systemd/system/$unit.service"
    done
    pivot_root . .
    umount -l .
    exec env -i container=vmtest PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . \
        /sbin/init systemd.condition_needs_update=no systemd.condition_first_boot=no "vmtest.boot=$boot"
}

echo "$BASHPID" >"$groups/cgroup.procs"
export -f enter
export masked
setpriv --pdeathsig KILL unshare --fork --kill-child --pid --mount --net --uts --ipc --propagation private -- \
    bash -euc 'enter "$@"' bash "$root" "$out" "$boot" </dev/null {lock}>&- &
machine=$!
wait "$machine" || true
machine=
