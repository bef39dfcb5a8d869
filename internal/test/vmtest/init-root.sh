#!/bin/busybox sh
#
# PID 1 of the guest that run.sh --root boots.  It makes a root from the host's root
# and runs init.sh in it.  Errors end in a panic, as in init.sh.
# shellcheck shell=sh
set -eu

/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/bin
while read -r module; do
    modprobe "$module"
done </vmtest/modules

mkdir /host /memory /target
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /host
mount -t tmpfs -o mode=755 tmpfs /memory
mkdir -m 755 /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /target

cd /target
mkdir -p dev proc sys tmp run var/tmp var/lib/docker var/lib/containerd vmtest/tools
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t devtmpfs devtmpfs dev
mkdir -p dev/pts dev/shm
# The kernel needs these too: TOMOYO looks for them when runc executes a descriptor.
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
mount -t devpts -o mode=620,ptmxmode=666 devpts dev/pts
for dir in dev/shm var/tmp; do
    mount -t tmpfs -o mode=1777 tmpfs "$dir"
done
for dir in run var/lib/docker var/lib/containerd; do
    mount -t tmpfs -o mode=755 tmpfs "$dir"
done
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf -o mode=700 bpf sys/fs/bpf
mount -t securityfs securityfs sys/kernel/security
mount -t tracefs tracefs sys/kernel/tracing
cp -a /vmtest .
cp /bin/busybox vmtest/tools
chroot . /vmtest/tools/busybox --install -s /vmtest/tools
# The kernel loads modules with this, and not every host has it.
[ -e sbin/modprobe ] || ln -s /vmtest/tools/modprobe sbin/modprobe

dir=/host$(cat /vmtest/kernel_dir)
modules=lib/modules/$(cat "$dir/version")
mkdir -p "$modules"
mount --bind "$dir" "$modules"

umount /proc
exec switch_root /target /vmtest/tools/sh /vmtest/init
