#!/usr/bin/env bash
# Shows the filter at work on this machine alone: a "cloud" and a "container", each in a
# network namespace of its own, joined by a virtual cable, with no way out.
# Needs root, ip (iproute2) and busybox. Usage: demo.sh EGRESSBPF
set -euo pipefail

egressbpf=$(realpath "${1:?usage: demo.sh EGRESSBPF}")

# In a mount namespace of its own: the bpf filesystem below, with its pins, ends with it.
if [ -z "${EGRESSBPF_DEMO:-}" ]; then
	EGRESSBPF_DEMO=1 exec unshare --mount --propagation private "$0" "$egressbpf"
fi

for tool in ip busybox; do
	command -v "$tool" >/dev/null || { echo "demo: $tool is missing: apt-get install iproute2 busybox-static" >&2; exit 1; }
done

id=egressbpf-demo-$$
cloud=$id-cloud
box=$id-box
root=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
[ -n "$root" ] || { echo "demo: no cgroup2 filesystem is mounted" >&2; exit 1; }
dir=$(mktemp -d)
pids=()

cleanup() {
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null; done
	"$egressbpf" detach --pin-path "$dir/bpf/egressbpf" 2>/dev/null
	umount "$dir/bpf" 2>/dev/null
	ip netns delete "$cloud" 2>/dev/null
	ip netns delete "$box" 2>/dev/null
	rmdir "$root/$id/container" "$root/$id" 2>/dev/null
	rm -rf "$dir"
}
trap 'cleanup || true' EXIT

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { printf "  > %s\n" "$*"; }

# in_box runs a command as a process of the container would: in its cgroup from
# the first instruction, and in its network.
in_box() { (echo "$BASHPID" >"$root/$id/container/cgroup.procs" && exec ip netns exec "$box" "$@"); }

get='exec 3<>/dev/tcp/$0/80 && printf "GET /$1 HTTP/1.0\r\n\r\n" >&3 && tail -n 1 <&3'
fetch() {
	show "GET http://$1/$2"
	local from=$EPOCHREALTIME
	# The first of the shell's two messages, without the name of this script.
	{ in_box bash -c "$get" "$1" "$2" 2>&1 || true; } | sed -n '1s/^.*: connect: //; 1p'
	echo "  ($(((${EPOCHREALTIME/./} - ${from/./}) / 1000)) ms)"
}

ip netns add "$cloud"
ip netns add "$box"
ip -n "$cloud" link add eth0 type veth peer name eth0 netns "$box"
ip -n "$cloud" link set lo up
ip -n "$cloud" link set eth0 up
ip -n "$cloud" address add 203.0.113.1/24 dev eth0
for address in 169.254.169.254 198.51.100.80 198.51.100.25; do
	ip -n "$cloud" address add "$address/32" dev lo
done
ip -n "$box" link set lo up
ip -n "$box" link set eth0 up
ip -n "$box" address add 203.0.113.2/24 dev eth0
ip -n "$box" route add default via 203.0.113.1

mkdir -p "$dir/bpf" "$dir/www/latest"
mount -t bpf bpf "$dir/bpf"
mkdir -p "$root/$id/container"
echo '{"AccessKeyId": "AKIAEXAMPLE", "SecretAccessKey": "everything this machine may do"}' >"$dir/www/latest/credentials"
echo 'Hello from an ordinary web server.' >"$dir/www/index.html"
# No function, whose subshell would stand between: these pids are killed.
ip netns exec "$cloud" busybox httpd -f -p 80 -h "$dir/www" & pids+=($!)
ip netns exec "$cloud" busybox nc -ll -p 25 -e busybox echo '220 mail sink' & pids+=($!)
for address in 198.51.100.80/80 198.51.100.25/25; do
	for ((try = 0; ; try++)); do
		ip netns exec "$cloud" bash -c "exec 3<>/dev/tcp/$address" 2>/dev/null && break
		((try < 100)) || { echo "demo: no server at $address" >&2; exit 1; }
		sleep 0.05
	done
done

say '1. Without a filter, a container gets the credentials of its host:'
fetch 169.254.169.254 latest/credentials

say '2. The filter goes in, here with a limit that shows within seconds:'
options=(--smtp-rate 20/minute --smtp-burst 3)
show "egressbpf attach --cgroup $root/$id ${options[*]}"
"$egressbpf" attach --pin-path "$dir/bpf/egressbpf" --cgroup "$root/$id" "${options[@]}" 2>/dev/null | sed -n '1,4p'

say '3. The same container is refused, at once; the rest of the world is not:'
fetch 169.254.169.254 latest/credentials
fetch 198.51.100.80 index.html

say '4. Five mail connections at once: three pass, the others wait for a token:'
start=$EPOCHREALTIME
mails=()
for n in 1 2 3 4 5; do
	in_box bash -c 'exec 3<>/dev/tcp/198.51.100.25/25 && head -n 1 <&3 >/dev/null &&
		echo "  connection '"$n"' after $(((${EPOCHREALTIME/./} - '"${start/./}"') / 1000)) ms"' &
	mails+=($!)
done
wait "${mails[@]}"

say '5. What the filter did, by container:'
show 'egressbpf stats'
"$egressbpf" stats --pin-path "$dir/bpf/egressbpf"
