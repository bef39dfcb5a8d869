#!/bin/busybox sh
#
# PID 1 of the guest that run.sh boots.  Its own errors go to the console and end in a
# panic, which run.sh reports; the command's output and its exit code go to serial ports
# of their own.
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

out=/dev/$(sed -n 2p /vmtest/ports) result=/dev/$(sed -n 3p /vmtest/ports)
stty -F "$out" raw -echo
stty -F "$result" raw -echo
code=0
/vmtest/command </dev/null >"$out" 2>&1 || code=$?

# Stop processes that are left from writing; then stty waits until all output is sent.
kill -KILL -1 || true
stty -F "$out" raw
echo "exit $code" >"$result"
poweroff -f
