package dockertest

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// adminAttacks make the container's own kernel send the packets, which needs CAP_NET_ADMIN.
func adminAttacks() []attack {
	decoy := func(p *prisoner, tg target) error { return p.Send("raw IP", p.link, p.decoys(tg, p.own(tg))...) }
	// Over a pair of devices: packets that come in at one have no address of the container.
	pair := func(p *prisoner, tg target) error { return p.Send("raw IP", p.link, p.decoys(tg, p.stranger(tg))...) }
	// Over the loopback.
	self := func(p *prisoner, tg target) error {
		tg.to = at(p.own(tg), tg.decoy)
		return p.Send("raw IP", p.link, p.forged(tg, p.own(tg))...)
	}
	on := func(device string, gateway func(*prisoner) net.HardwareAddr) func(*prisoner, target) error {
		return func(p *prisoner, tg target) error {
			link := lab.Link{Device: device, Source: p.link.Source, Gateway: gateway(p)}
			return p.Send("AF_PACKET", link, p.forged(tg, p.stranger(tg))...)
		}
	}
	bridge := func(p *prisoner) net.HardwareAddr { return p.link.Gateway }
	vxlan := func(p *prisoner) net.HardwareAddr { return p.mac("vxlan0") }

	const early = "type filter hook prerouting priority -300"
	all := []attack{
		{name: "raw IP SO_MARK", sight: hook, send: by("raw IP SO_MARK"),
			begin: "ip rule add fwmark 1 table 7; ip route add default via $gw4 dev eth0 table 7",
			end:   "ip rule del fwmark 1 table 7; ip route flush table 7"},
		{name: "raw IP SO_BINDTODEVICE", sight: hook, send: by("raw IP SO_BINDTODEVICE")},
		{name: "neighbour", sight: hook, begin: neighbours("add"), end: neighbours("del"), send: by("raw IP")},
		{name: "own address", sight: hook, only: metadata,
			begin: "ip addr add 169.254.169.254/32 dev eth0; ip addr add fd00:ec2::254/128 dev eth0 nodad",
			end:   "ip addr del 169.254.169.254/32 dev eth0; ip addr del fd00:ec2::254/128 dev eth0",
			send:  func(p *prisoner, tg target) error { return p.Send("raw IP", p.link, p.decoys(tg, tg.to.Addr())...) }},
		{name: "segment route", sight: hook, only: metadata6, send: decoy,
			begin: "ip route add 2001:db8::1/128 encap seg6 mode inline segs fd00:ec2::254 via $gw6 dev eth0",
			end:   "ip route del 2001:db8::1/128"},
		{name: "nft DNAT", sight: hook, send: decoy,
			begin: nft("inet", "type nat hook output priority -100", dnat), end: "nft delete table inet a"},
		{name: "nft postrouting", sight: hook, send: decoy,
			begin: nft("inet", "type filter hook postrouting priority 300", rewrite("")), end: "nft delete table inet a"},
		{name: "nft egress", sight: host, send: decoy,
			begin: nft("netdev", `type filter hook egress device "eth0" priority 0`, rewrite("")), end: "nft delete table netdev a"},
		{name: "nft dup", sight: host, send: self,
			begin: nft("ip", early, forTargets(only4, rewrite(`dup to $gw4 device "eth0"`))) + "; " +
				nft("ip6", early, forTargets(only6, rewrite(`dup to $gw6 device "eth0"`))),
			end: "nft delete table ip a; nft delete table ip6 a"},
		{name: "nft forged source", sight: host, only: metadata, send: self,
			begin: nft("inet", early, forge), end: "nft delete table inet a"},
		{name: "nft fwd", sight: host, send: pair,
			begin: "$pair; " + nft("netdev", `type filter hook ingress device "v1" priority 0`,
				rewrite(`ether daddr set $gwmac ether saddr set $ownmac fwd to "eth0"`)),
			end: "nft delete table netdev a; ip link del v0"},
		{name: "veth and forwarding", sight: host, send: pair,
			begin: "$pair; " + nft("inet", early, rewrite("")), end: "nft delete table inet a; ip link del v0"},
		{name: "tun", sight: host, send: func(p *prisoner, tg target) error {
			return p.Send("tun", lab.Link{Device: "t0"}, p.forged(tg, p.stranger(tg))...)
		}},
		// RDS connects to a port of its own, once from each address.
		{name: "RDS", sight: families, send: rds,
			only: func(tg target) bool { return tg.to.Addr() == lab.Metadata4 && tg.proto == unix.IPPROTO_TCP }},
		{name: "tc pedit", sight: host, begin: pedit(), end: "tc qdisc del dev eth0 clsact", send: decoy},
		{name: "AF_PACKET and mirred", sight: families, send: on("v0", bridge),
			begin: "$pair; tc qdisc add dev v1 clsact; " +
				"tc filter add dev v1 ingress protocol all u32 match u32 0 0 action mirred egress redirect dev eth0",
			end: "ip link del v0"},
		{name: "AF_PACKET on a bridge", sight: families, send: on("v0", bridge),
			begin: "$pair; ip link add b0 type bridge; ip link set v1 master b0; ip link set eth0 master b0; ip link set b0 up",
			end:   "ip link del b0; ip link del v0"},
		{name: "AF_PACKET on macvlan", sight: families, send: on("m0", bridge),
			begin: "ip link add m0 link eth0 type macvlan mode bridge; ip link set m0 up", end: "ip link del m0"},
		{name: "AF_PACKET on VXLAN", sight: families, device: "vxlan0", send: on("x0", vxlan),
			begin: "$vxlan", end: "ip link del x0"},
		{name: "nft egress of VXLAN", sight: host, device: "vxlan0", send: decoy,
			begin: "$vxlan; ip route add 198.51.100.1 dev x0; ip route add 2001:db8::1 dev x0; " +
				"ip neigh add 198.51.100.1 lladdr $vxmac dev x0; ip neigh add 2001:db8::1 lladdr $vxmac dev x0; " +
				nft("netdev", `type filter hook egress device "x0" priority 0`, rewrite("")),
			end: "nft delete table netdev a; ip link del x0"},
	}
	for i := range all {
		all[i].in = netAdmin
	}
	return all
}

func rds(p *prisoner, tg target) error {
	p.serial++
	from := netip.AddrFrom4([4]byte{172, 30, 1, byte(p.serial)})
	if err := p.host("ip addr add " + from.String() + " dev eth0"); err != nil {
		return err
	}
	return p.Send("AF_RDS", p.link, p.forged(tg, from)...)
}

// nft makes a table "a" with a chain and a rule for each target's decoy.
func nft(family, chain string, rule func(target) string) string {
	var rules strings.Builder
	for _, tg := range targets {
		if r := rule(tg); r != "" {
			fmt.Fprintf(&rules, "meta protocol %s %s dport %d %s\n", tg.ip(), tg.transport(), tg.decoy, r)
		}
	}
	return fmt.Sprintf("nft -f - <<'end'\ntable %s a { chain c { %s;\n%s}; }\nend\ntrue", family, chain, &rules)
}

func (tg target) transport() string {
	if tg.proto == unix.IPPROTO_UDP {
		return "udp"
	}
	return "tcp"
}

func (tg target) ip() string {
	if tg.v6() {
		return "ip6"
	}
	return "ip"
}

// rewrite gives a decoy the target's address and port, and adds other statements.
func rewrite(more string) func(target) string {
	return func(tg target) string {
		return fmt.Sprintf("%s daddr set %s %s dport set %d %s", tg.ip(), tg.to.Addr(), tg.transport(), tg.to.Port(), more)
	}
}

// forge makes the metadata service the source of a decoy.
func forge(tg target) string { return fmt.Sprintf("%s saddr set %s", tg.ip(), tg.to.Addr()) }

func dnat(tg target) string { return fmt.Sprintf("dnat %s to %s", tg.ip(), tg.to) }

func forTargets(only func(target) bool, rule func(target) string) func(target) string {
	return func(tg target) string {
		if only(tg) {
			return rule(tg)
		}
		return ""
	}
}

// neighbours enters the targets as neighbours on the link, with the host's MAC address.
func neighbours(op string) string {
	var all []string
	for _, tg := range targets {
		if tg.proto == unix.IPPROTO_TCP {
			all = append(all, fmt.Sprintf("ip route %s %s dev eth0; ip neigh %[1]s %[2]s lladdr $gwmac dev eth0", op, tg.to.Addr()))
		}
	}
	return strings.Join(all, "; ")
}

// pedit makes tc rewrite decoys.
func pedit() string {
	script := "tc qdisc add dev eth0 clsact"
	for _, tg := range targets {
		protocol := map[string]string{"ip": "ip", "ip6": "ipv6"}[tg.ip()]
		script += fmt.Sprintf("; tc filter add dev eth0 egress protocol %s prio %d u32 match %s dport %d 0xffff "+
			"action pedit ex munge %s dst set %s munge %s dport set %d pipe action csum ip4h",
			protocol, tg.decoy, tg.ip(), tg.decoy, tg.ip(), tg.to.Addr(), tg.transport(), tg.to.Port())
	}
	return script
}
