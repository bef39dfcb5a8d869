# shellcheck shell=bash
# What the trials on a whole Debian share; they read it from beside them. The metadata service is a
# network namespace that counts what arrives.
set -euo pipefail

failed=
fail() { echo "FAIL: $*"; failed=yes; }

# finish CODE UNIT... ends the trial: with 1 if something failed, and what the units logged last.
finish() {
    local code=$1 unit units=()
    shift
    [ -n "$failed" ] || exit "$code"
    for unit; do units+=(-u "$unit"); done
    journalctl --no-pager "${units[@]}" | tail -n 30
    exit 1
}

step() { printf '   %4s s  %s\n' "$(cut -d. -f1 /proc/uptime)" "$*"; }
arrived() { ip netns exec server iptables -t raw -nvxL PREROUTING | awk '/169.254.169.254/ { print $1 }'; }
forget() { ip netns exec server iptables -t raw -Z; }

# nothing_arrived WHEN
nothing_arrived() {
    local n
    n=$(arrived)
    [ "$n" = 0 ] || { fail "$1: $n packets arrived at the metadata service"; forget; }
}

ask='wget -T 5 -q -O - http://169.254.169.254/'

# refused WHAT COMMAND... lets the command ask the metadata service: it must fail, and
# nothing may arrive.
refused() {
    local what=$1 out
    shift
    if out=$("$@" 2>&1); then fail "$what: reached the metadata service: $out"; fi
    case $out in *refused*) ;; *) fail "$what: was not refused: $out" ;; esac
    nothing_arrived "$what"
}

# reached WHAT COMMAND... lets the command ask the metadata service: it must succeed.
reached() {
    local what=$1 out
    shift
    out=$("$@" 2>&1) || fail "$what: did not reach the metadata service: $out"
    [ "$(arrived)" != 0 ] || fail "$what: nothing arrived"
    forget
}

container() { docker run --rm "$@"; }

# await WHAT COMMAND...
await() {
    local what=$1
    shift
    for _ in $(seq 1200); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1 # there is nothing to wait on
    done
    fail "$what: not after 2 minutes"
}

in_force() {
    egressbpf status >/tmp/status 2>&1 || { fail "$1: status"; cat /tmp/status; }
}

# serve makes the metadata service, from each boot on, and an image.
serve() {
    cat >/usr/local/sbin/metadata <<'END'
#!/bin/sh -e
ip netns add server
ip link add meta0 type veth peer name meta1 netns server
ip addr add 10.99.0.1/30 dev meta0
ip link set meta0 up
ip route add 169.254.169.254 via 10.99.0.2
srv() { ip netns exec server "$@"; }
srv ip addr add 10.99.0.2/30 dev meta1
srv ip link set meta1 up
srv ip link set lo up
srv ip addr add 169.254.169.254/32 dev lo
srv ip route add default via 10.99.0.1
srv iptables -t raw -A PREROUTING -d 169.254.169.254
srv iptables -t raw -A PREROUTING -p tcp --syn --dport 25
mkdir -p /run/metadata && echo credentials >/run/metadata/index.html
srv busybox httpd -h /run/metadata -p 80
END
    chmod 755 /usr/local/sbin/metadata
    cat >/etc/systemd/system/metadata.service <<'END'
[Unit]
Before=docker.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/metadata
[Install]
WantedBy=multi-user.target
END
    systemctl enable --quiet --now metadata
    await 'the metadata service answers' busybox $ask
    busybox tar c -C / bin/busybox | docker import -c 'ENTRYPOINT ["/bin/busybox"]' - image >/dev/null
    forget
}

# refused_often CONTAINER checks the container's row in stats; REFUSED is the third column.
refused_often() { egressbpf stats | awk -v name="$1" '$1 == name && $3 > 3 { found = 1 } END { exit !found }'; }
