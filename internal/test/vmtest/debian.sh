#!/usr/bin/env bash
#
# Boots a whole Debian, with systemd and Docker, in QEMU, and runs a script in it as
# root. See usage.
set -euo pipefail
cd "$(dirname "$0")/../../.."

readonly suite=trixie
readonly packages=systemd-sysv,dbus,docker.io,docker-cli,docker-buildx,docker-compose,apparmor,containernetworking-plugins,podman,crun,netavark,rootlesskit,slirp4netns,passt,uidmap,dbus-user-session,linux-image-cloud-amd64,initramfs-tools,iproute2,iptables,nftables,busybox-static,procps,bpftool,rpm,ansible-core,python3-apt,cloud-init
readonly needed=(mmdebstrap:mmdebstrap qemu-system-x86_64:qemu-system-x86 mke2fs:e2fsprogs debian-archive-keyring python-apt-common)

# What exits with this code is the harness, not the script.
readonly harness_failed=125
# A script that exits with this one is run again after a reboot.
readonly reboot=42

usage() {
    cat <<'END'
usage: debian.sh [--timeout SECONDS] [--here] FOLDER
       debian.sh --image

Boots Debian under emulation (KVM is not needed) with FOLDER, read-only, at
/mnt/test, and runs /mnt/test/run N there after multi-user.target and docker.service,
where N is the number of the boot, from 1. Prints what it writes, and exits with its
exit code. If that is 42 the machine is booted again first, with its disk as it was left.
An exit code of 125 means that no result came back. There is no network.

  --here  no emulation: boot in namespaces on this machine's own kernel, which is ten times
          faster. Control groups have the controllers, and processes the capabilities, that
          they have here. See here.sh --can.
  --image only make the image

The image is made once, by apt and with its signature checks, in VMTEST_CACHE (default:
egressbpf-vmtest in the user's cache folder). VMTEST_MIRROR is as for run.sh.
END
}

die() {
    printf 'debian.sh: %s\n' "$*" >&2
    exit "$harness_failed"
}

# What systemd does at the first boot only, such as ldconfig, is done in the image already.
readonly parameters='mitigations=off systemd.condition_needs_update=no systemd.condition_first_boot=no systemd.machine_id=00000000000000000000000000000001'

# The script is baked into the image, and stands for what the image is made of.
make_image() {
    local dir=$1 root=$1/root url keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    url=$(internal/test/vmtest/run.sh --mirror) && [ -n "$url" ] || die 'no Debian archive found in the apt sources: set VMTEST_MIRROR'
    echo "debian.sh: making Debian $suite from $url" >&2
    { apt-config dump | grep '^Acquire::' | grep -Ev '^Acquire::(Allow|IndexTargets)'; echo 'Acquire::Languages "none";'; } >"$dir/apt.conf"
    # Under emulation, a boot with all modules takes long.
    # shellcheck disable=SC2016 # mmdebstrap's shell expands it
    mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" --aptopt="$dir/apt.conf" \
        --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"' \
        --essential-hook='echo MODULES=list >"$1/etc/initramfs-tools/conf.d/vmtest"' \
        --essential-hook='printf "%s\n" virtio_pci virtio_blk ext4 >"$1/usr/share/initramfs-tools/modules.d/vmtest"' \
        "$suite" "$root" "deb [signed-by=$keyring] $url $suite main" >"$dir/log" 2>&1 || { tail -30 "$dir/log" >&2; die 'mmdebstrap failed'; }
    cp "$root"/boot/vmlinuz-* "$dir/vmlinuz"
    cp "$root"/boot/initrd.img-* "$dir/initrd"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/boot/initrd.img-*
    echo vmtest >"$root/etc/hostname"
    mkdir -p "$root/mnt/test"
    cat >"$root/etc/systemd/system/vmtest.service" <<'END'
[Unit]
After=docker.service multi-user.target
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/usr/local/sbin/vmtest
[Install]
WantedBy=default.target
END
    # The arguments of the first process are those of the kernel, or those that here.sh gives.
    cat >"$root/usr/local/sbin/vmtest" <<'END'
#!/bin/sh
arguments=$(cat /proc/cmdline; tr '\0' ' ' </proc/1/cmdline)
mountpoint -q /mnt/test || mount -o ro /dev/vdb /mnt/test
/mnt/test/run "$(echo $arguments | sed 's/.*vmtest.boot=//; s/ .*//')" >>/dev/ttyS1 2>&1 </dev/null
code=$?
[ "$code" != 125 ] || code=1 # such as docker run's
echo "vmtest exit code $code" >>/dev/ttyS1
sync
systemctl poweroff --force --force
END
    chmod 755 "$root/usr/local/sbin/vmtest"
    SYSTEMD_IGNORE_CHROOT=1 chroot "$root" systemctl --quiet enable vmtest.service
    SYSTEMD_IGNORE_CHROOT=1 chroot "$root" systemctl --quiet mask serial-getty@ttyS0.service serial-getty@ttyS1.service getty@tty1.service systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer
    mke2fs -q -F -t ext4 -L root -d "$root" "$dir/disk" 4G >/dev/null
    rm -rf "$root" "$dir/log" "$dir/apt.conf"
}

# cached prints the folder of the image. In a subshell of its own: an error ends it.
cached() {
    set -e
    local cache=${VMTEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/egressbpf-vmtest} key making
    key=$(sha256sum internal/test/vmtest/debian.sh | cut -c1-16)
    mkdir -p "$cache"
    exec {lock}>"$cache/debian.lock"
    flock "$lock"
    if [ ! -e "$cache/debian-$key" ]; then
        rm -rf "$cache"/debian-*
        making=$(mktemp -d "$cache/debian-making.XXXXXX")
        trap 'rm -rf "$making"' EXIT
        make_image "$making" >&2
        mv -T "$making" "$cache/debian-$key"
        trap - EXIT
    fi
    exec {lock}>&-
    echo "$cache/debian-$key"
}

timeout=600
only_image='' here=''
while [ $# -gt 0 ]; do
    case $1 in
    --image) only_image=yes && shift ;;
    --timeout) timeout=$2 && shift 2 ;;
    --here) here=yes && shift ;;
    --help) usage && exit ;;
    -*) usage >&2 && exit "$harness_failed" ;;
    *) break ;;
    esac
done
[ -n "$only_image" ] || { [ $# = 1 ] && [ -x "$1/run" ]; } || { usage >&2 && exit "$harness_failed"; }

[ "$(id -u)" = 0 ] || die 'this needs root, to make the image'
internal/test/testenv/install.sh "${needed[@]}"
image=$(cached) || exit "$harness_failed"
[ -z "$only_image" ] || exit 0
folder=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cp --sparse=always "$image/disk" "$dir/disk"
[ -n "$here" ] || mke2fs -q -F -t ext4 -d "$folder" "$dir/files" 256M >/dev/null

boot_emulated() {
    setpriv --pdeathsig TERM timeout --kill-after=10 "$timeout" qemu-system-x86_64 -accel tcg,thread=multi -cpu max,la57=off -smp 2 -m 2G \
        -nodefaults -display none -no-reboot -nic none -serial "file:$dir/console" -serial "file:$dir/out" \
        -kernel "$image/vmlinuz" -initrd "$image/initrd" \
        -append "root=/dev/vda rw console=ttyS0 quiet panic=-1 systemd.show_status=no $parameters vmtest.boot=$boot" \
        -drive "file=$dir/disk,if=virtio,format=raw,cache=unsafe" -drive "file=$dir/files,if=virtio,format=raw,readonly=on" \
        </dev/null >"$dir/log" 2>&1 || true
}

boot_here() {
    setpriv --pdeathsig TERM timeout --kill-after=30 "$timeout" internal/test/vmtest/here.sh "$dir/disk" "$folder" "$dir/out" "$boot" >"$dir/log" 2>&1 || true
}

code=$reboot
failures=0
for ((boot = 1; code == reboot; boot++)); do
    rm -f "$dir/out"
    if [ -n "$here" ]; then boot_here; else boot_emulated; fi
    [ -e "$dir/out" ] || { cat "$dir/log" >&2 && die "boot $boot: the machine did not start"; }
    tr -d '\r' <"$dir/out" | grep -v '^vmtest exit code ' || true
    code=$(tr -d '\r' <"$dir/out" | sed -n 's/^vmtest exit code //p')
    # Emulation can fail by itself: once more, if the script had not begun.
    if [ -z "$code" ] && [ -z "$here" ] && [ ! -s "$dir/out" ] && ((++failures < 3)); then
        code=$reboot
        ((boot--)) || true
        continue
    fi
    if [ -z "$code" ]; then
        tail -qn 20 "$dir/console" "$dir/log" >&2 || true
        die "boot $boot: no result after at most $timeout s"
    fi
done
exit "$code"
