#!/bin/busybox sh
#
# PID 1 of the guest that run.sh boots.  Its own errors go to the console
# (ttyS0) and end in a panic, which run.sh reports; the command writes to ttyS1,
# and its exit code goes to ttyS2.
# shellcheck shell=sh
set -eu

if [ -d /vmtest/tools ]; then
    # init-root.sh has run before this.
    export PATH=/vmtest/tools
else
    /bin/busybox mount -t proc proc /proc
    /bin/busybox --install -s /bin
    export PATH=/bin
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t tmpfs -o mode=755 tmpfs /run
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    while read -r module; do
        modprobe "$module"
    done </vmtest/modules
fi
ip link set lo up

stty -F /dev/ttyS1 raw -echo
stty -F /dev/ttyS2 raw -echo
code=0
/vmtest/command </dev/null >/dev/ttyS1 2>&1 || code=$?

# Stop processes that are left from writing; then stty waits until all output is sent.
kill -KILL -1 || true
stty -F /dev/ttyS1 raw
echo "exit $code" >/dev/ttyS2
poweroff -f
