package dockertest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/testenv"
)

// sight says what can see an attack, and so stop it.
type sight int

const (
	hook     sight = iota // it passes the packet hook as what it is
	families              // it needs a socket of a refused family
	host                  // the kernel makes it of what may pass, behind the hook
)

// profile is where an attack is tried.
type profile int

const (
	bridged  profile = 1 << iota // Docker's default capabilities on the default network
	netAdmin                     // the same with CAP_NET_ADMIN
	hostNet                      // the default capabilities with --network=host
)

func (p profile) String() string {
	return map[profile]string{bridged: "bridge", netAdmin: "net-admin", hostNet: "host-network"}[p]
}

// target is what is to arrive.
type target struct {
	name  string
	to    netip.AddrPort
	proto uint8
	n     int    // packets
	decoy uint16 // a port of an innocent address, for attacks that rewrite
}

const mails, burst = 60, 5

var targets = []target{
	{"metadata4 UDP", at(lab.Metadata4, 80), unix.IPPROTO_UDP, 1, 9000},
	{"metadata4 SYN", at(lab.Metadata4, 80), unix.IPPROTO_TCP, 1, 9001},
	{"metadata6 UDP", at(lab.Metadata6, 80), unix.IPPROTO_UDP, 1, 9002},
	{"metadata6 SYN", at(lab.Metadata6, 80), unix.IPPROTO_TCP, 1, 9003},
	{"mail4", at(lab.Mail4, 25), unix.IPPROTO_TCP, mails, 9004},
	{"mail6", at(lab.Mail6, 25), unix.IPPROTO_TCP, mails, 9005},
}

func (tg target) v6() bool   { return tg.to.Addr().Is6() }
func (tg target) mail() bool { return tg.n == mails }

func only4(tg target) bool     { return !tg.v6() }
func only6(tg target) bool     { return tg.v6() }
func metadata(tg target) bool  { return !tg.mail() }
func metadata6(tg target) bool { return !tg.mail() && tg.v6() }

// either returns the address in the target's family.
func (tg target) either(v4, v6 netip.Addr) netip.Addr {
	if tg.v6() {
		return v6
	}
	return v4
}

// arrived returns how much of what was sent to a target the server has got.
func (tg target) arrived(packets []lab.Packet) int {
	if tg.mail() {
		return syns(packets, tg.to.Port())
	}
	return lab.Count(packets, func(p lab.Packet) bool { return blocked(p.Dst.Addr()) || blocked(p.Src.Addr()) })
}

func blocked(a netip.Addr) bool {
	return a.Unmap() == lab.Metadata4 || a == lab.Metadata6 || a == lab.NAT64
}

// attack is a way of sending past the filter.
type attack struct {
	name string
	sight
	in     profile
	only   func(target) bool // nil: all targets
	device string            // of the host's, which it needs
	// begin and end are scripts for prisoner.host.
	begin, end string
	send       func(*prisoner, target) error
}

// unavailable says how the lack of what not every kernel and engine has shows, and
// what it is. Any other error is the test's, or an attack that has died.
var unavailable = map[string]struct {
	needs  string
	errors []string
}{
	"socketcall":           {"CONFIG_IA32_EMULATION, and seccomp's leave", []string{"function not implemented", "operation not permitted"}},
	"io_uring":             {"Linux 5.19, and seccomp's leave", []string{"function not implemented", "operation not permitted", "operation 45: invalid argument"}},
	"AF_XDP":               {"CONFIG_XDP_SOCKETS", []string{"address family not supported"}},
	"RDS":                  {"CONFIG_RDS_TCP", []string{"address family not supported"}},
	"IPIP":                 {"CONFIG_NET_IPIP", []string{"Unknown device type"}},
	"GRE":                  {"CONFIG_NET_IPGRE", []string{"Unknown device type"}},
	"6in4":                 {"CONFIG_IPV6_SIT", []string{"Unknown device type"}},
	"GENEVE":               {"CONFIG_GENEVE", []string{"Unknown device type"}},
	"VXLAN":                {"CONFIG_VXLAN", []string{"Unknown device type"}},
	"VXLAN in VXLAN":       {"CONFIG_VXLAN", []string{"Unknown device type"}},
	"AF_PACKET on VXLAN":   {"CONFIG_VXLAN", []string{"Unknown device type"}},
	"nft egress of VXLAN":  {"CONFIG_VXLAN", []string{"Unknown device type"}},
	"AF_PACKET on macvlan": {"CONFIG_MACVLAN", []string{"Unknown device type"}},
	"tc pedit":             {"CONFIG_NET_ACT_PEDIT and _CSUM", []string{"Failed to load TC action module"}},
	"tun":                  {"CONFIG_TUN", []string{"no such file or directory"}},
	"nft egress":           {"CONFIG_NETFILTER_EGRESS, of Linux 5.16", []string{"not supported"}},
	"segment route":        {"CONFIG_IPV6_SEG6_LWTUNNEL", []string{"not supported"}},
	"AF_PACKET and mirred": {"CONFIG_NET_ACT_MIRRED", []string{"Failed to load TC action module"}},
	"nft dup":              {"CONFIG_NFT_DUP_IPV4 and _IPV6", []string{"not supported", "No such file or directory"}},
	"nft fwd":              {"CONFIG_NFT_FWD_NETDEV", []string{"not supported", "No such file or directory"}},
}

// lacks returns what an attack cannot be had without, if an error says that.
func (a attack) lacks(why string) string {
	lack := unavailable[a.name]
	if slices.ContainsFunc(lack.errors, func(text string) bool { return strings.Contains(why, text) }) {
		return lack.needs
	}
	return ""
}

func attacks() []attack {
	return slices.Concat(socketAttacks(), headerAttacks(), answerAttacks(), tunnelAttacks(), adminAttacks())
}

// by sends as a road of the lab does.
func by(road string) func(*prisoner, target) error {
	return func(p *prisoner, tg target) error { return p.Send(road, p.link, p.forged(tg, p.own(tg))...) }
}

// socketAttacks are roads other than IP's sockets, and the one of raw IP for
// comparison.
func socketAttacks() []attack {
	all := []attack{
		{name: "raw IP", sight: hook, in: bridged | netAdmin | hostNet, send: by("raw IP")},
		{name: "AF_PACKET", sight: families, in: bridged | netAdmin | hostNet, send: by("AF_PACKET")},
		{name: "AF_PACKET on lo", sight: families, in: bridged, send: func(p *prisoner, tg target) error {
			none := make(net.HardwareAddr, 6)
			return p.Send("AF_PACKET", lab.Link{Device: "lo", Source: none, Gateway: none}, p.forged(tg, p.stranger(tg))...)
		}},
		{name: "by another container", sight: families, in: bridged, send: func(p *prisoner, tg target) error {
			return p.Send("AF_PACKET", p.linkTo(p.other.link.Source), p.forged(tg, p.own(tg))...)
		}},
	}
	for _, road := range []string{
		"AF_PACKET SOCK_DGRAM", "AF_PACKET QDISC_BYPASS", "AF_PACKET VNET_HDR", "AF_PACKET TX_RING", "AF_PACKET padded",
		"SOCK_PACKET", "socketcall", "io_uring", "AF_XDP",
		"VLAN tag", "two VLAN tags", "three VLAN tags", "802.1ad", "802.1ad over VLAN", "two of 802.1ad",
	} {
		all = append(all, attack{name: road, sight: families, in: bridged | hostNet, send: by(road)})
	}
	return all
}

// headerAttacks are headers that are easily misread.
func headerAttacks() []attack {
	const nop, lsrr, segmentRoute = 1, 131, 4 // RFC 791, RFC 8754
	var all []attack
	for _, odd := range []struct {
		name string
		only func(target) bool
		make func(*prisoner, target) [][]byte
	}{
		{"IP options", only4, func(p *prisoner, tg target) [][]byte {
			return p.each(tg, lab.Header{Options: []byte{nop, nop, nop, 0}}, whole)
		}},
		{"source route", only4, func(p *prisoner, tg target) [][]byte {
			route := append([]byte{nop, lsrr, 7, 4}, tg.to.Addr().AsSlice()...)
			return p.each(tg, lab.Header{Dst: p.gateway(tg), Options: route}, whole)
		}},
		{"fragments", nil, func(p *prisoner, tg target) [][]byte {
			return p.each(tg, lab.Header{}, func(h lab.Header, payload []byte) [][]byte {
				payload = append(payload, make([]byte, 40-len(payload))...)
				first, last := h, h
				first.More, last.Offset = true, 24
				return [][]byte{first.Finished(payload[:24]), last.Finished(payload[24:])}
			})
		}},
		{"hop-by-hop options", only6, func(p *prisoner, tg target) [][]byte {
			return p.each(tg, lab.Header{}, behind(unix.IPPROTO_HOPOPTS, 0, 1, 4, 0, 0, 0, 0))
		}},
		{"destination options", only6, func(p *prisoner, tg target) [][]byte {
			return p.each(tg, lab.Header{}, behind(unix.IPPROTO_DSTOPTS, 0, 1, 4, 0, 0, 0, 0))
		}},
		{"atomic fragment", only6, func(p *prisoner, tg target) [][]byte {
			return p.each(tg, lab.Header{}, behind(unix.IPPROTO_FRAGMENT, 0, 0, 0, 0, 0, 0, 1))
		}},
		{"routing header", only6, func(p *prisoner, tg target) [][]byte {
			via := p.gateway(tg)
			route := slices.Concat([]byte{4, segmentRoute, 1, 1, 0, 0, 0}, tg.to.Addr().AsSlice(), via.AsSlice())
			return p.each(tg, lab.Header{Dst: via}, behind(unix.IPPROTO_ROUTING, route...))
		}},
		{"NAT64", metadata6, func(p *prisoner, tg target) [][]byte { return p.each(tg, lab.Header{Dst: lab.NAT64}, whole) }},
		{"v4-mapped", metadata6, func(p *prisoner, tg target) [][]byte {
			return p.each(tg, lab.Header{Dst: lab.Mapped(lab.Metadata4)}, whole)
		}},
	} {
		all = append(all, attack{name: odd.name, sight: families, in: bridged, only: odd.only,
			send: func(p *prisoner, tg target) error { return p.Send("AF_PACKET", p.link, odd.make(p, tg)...) }})
	}
	return all
}

// answerAttacks have another kernel answer to the metadata service.
func answerAttacks() []attack {
	toHost := func(echo bool) func(*prisoner, target) error {
		return func(p *prisoner, tg target) error {
			return p.Send("AF_PACKET", p.link, answered(tg, p.gateway(tg), echo))
		}
	}
	toOther := func(echo bool) func(*prisoner, target) error {
		return func(p *prisoner, tg target) error {
			return p.Send("AF_PACKET", p.linkTo(p.other.link.Source), answered(tg, p.other.own(tg), echo))
		}
	}
	all := []attack{
		{name: "the host's refusal", send: toHost(false)},
		{name: "the host's echo", send: toHost(true)},
		{name: "a container's refusal", send: toOther(false)},
		{name: "a container's echo", send: toOther(true)},
		{name: "echo of a broadcast", send: func(p *prisoner, tg target) error {
			all := bytes.Repeat([]byte{0xff}, 6)
			return p.Send("AF_PACKET", p.linkTo(all), answered(tg, p.gateway(tg), true))
		}},
	}
	for i := range all {
		all[i].sight, all[i].in, all[i].only = families, bridged, metadata
	}
	return all
}

// answered returns a packet of the metadata service to a closed port, or an echo
// request.
func answered(tg target, to netip.Addr, echo bool) []byte {
	h := lab.Header{Src: tg.to.Addr(), Dst: to, Proto: tg.proto}
	switch {
	case echo && tg.v6():
		h.Proto = unix.IPPROTO_ICMPV6
		return h.Finished(lab.Echo(true))
	case echo:
		h.Proto = unix.IPPROTO_ICMP
		return h.Finished(lab.Echo(false))
	case tg.proto == unix.IPPROTO_UDP:
		return h.Finished(lab.UDP(80, 9, 8))
	}
	return h.Finished(lab.TCP(80, 9, 1, tcpSYN))
}

const tcpSYN = 0x02

// tunnelAttacks have the host unwrap an innocent packet.
func tunnelAttacks() []attack {
	all := []attack{
		{name: "VXLAN", device: "vxlan0", send: func(p *prisoner, tg target) error {
			return p.SendUDP(at(p.gw4, 4789), p.vxlan("vxlan0", 42, p.forged(tg, p.stranger(tg)))...)
		}},
		{name: "VXLAN in VXLAN", device: "vxlan1", send: func(p *prisoner, tg target) error {
			var outer [][]byte
			for _, inner := range p.vxlan("vxlan1", 43, p.forged(tg, p.stranger(tg))) {
				h := lab.Header{Src: stranger4, Dst: p.gw4, Proto: unix.IPPROTO_UDP}
				datagram := lab.UDP(1024, 4790, len(inner))
				copy(datagram[8:], inner)
				outer = append(outer, h.Finished(datagram))
			}
			return p.SendUDP(at(p.gw4, 4789), p.vxlan("vxlan0", 42, outer)...)
		}},
		{name: "GENEVE", device: "geneve0", send: func(p *prisoner, tg target) error {
			var wrapped [][]byte
			for _, inner := range p.forged(tg, p.stranger(tg)) {
				const vni = 44
				wrapped = append(wrapped, append([]byte{0, 0, 0x65, 0x58, 0, 0, vni, 0}, p.frameFor("geneve0", inner)...)) // RFC 8926
			}
			return p.SendUDP(at(p.gw4, 6081), wrapped...)
		}},
	}
	for _, tunnel := range []struct {
		name, device string
		proto        uint8
		only         func(target) bool
		header       func(target) []byte
	}{
		{"IPIP", "ipip1", unix.IPPROTO_IPIP, only4, func(target) []byte { return nil }},
		{"6in4", "sit1", unix.IPPROTO_IPV6, only6, func(target) []byte { return nil }},
		{"GRE", "gre1", unix.IPPROTO_GRE, nil, func(tg target) []byte {
			if tg.v6() {
				return []byte{0, 0, 0x86, 0xdd}
			}
			return []byte{0, 0, 0x08, 0x00}
		}},
	} {
		all = append(all, attack{name: tunnel.name, device: tunnel.device, only: tunnel.only, send: func(p *prisoner, tg target) error {
			var wrapped [][]byte
			for _, inner := range p.forged(tg, p.stranger(tg)) {
				h := lab.Header{Src: p.own4, Dst: p.gw4, Proto: tunnel.proto}
				wrapped = append(wrapped, h.Finished(append(tunnel.header(tg), inner...)))
			}
			return p.Send("raw IP", p.link, wrapped...)
		}})
	}
	for i := range all {
		all[i].sight, all[i].in = host, bridged
	}
	return all
}

// adminAttacks have the container's own kernel do it, which needs CAP_NET_ADMIN.
func adminAttacks() []attack {
	decoy := func(p *prisoner, tg target) error { return p.Send("raw IP", p.link, p.decoys(tg, p.own(tg))...) }
	// Over a pair of devices: who comes in at one of them has no address of one's own.
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
		// It connects to a port of its own, and once from each address.
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

// rewrite gives a decoy the target's address and port, and does what else is said.
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

// neighbours puts the targets on the link, with the host's address there.
func neighbours(op string) string {
	var all []string
	for _, tg := range targets {
		if tg.proto == unix.IPPROTO_TCP {
			all = append(all, fmt.Sprintf("ip route %s %s dev eth0; ip neigh %[1]s %[2]s lladdr $gwmac dev eth0", op, tg.to.Addr()))
		}
	}
	return strings.Join(all, "; ")
}

// pedit has tc rewrite decoys.
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

// whole is a packet in one piece.
func whole(h lab.Header, payload []byte) [][]byte { return [][]byte{h.Finished(payload)} }

// behind puts an extension header, without its first byte, before the payload.
func behind(proto uint8, extension ...byte) func(lab.Header, []byte) [][]byte {
	return func(h lab.Header, payload []byte) [][]byte {
		payload = slices.Concat([]byte{h.Proto}, extension, payload)
		h.Proto = proto
		return [][]byte{h.Packet(payload)}
	}
}

// siege is an engine with containers that attack.
type siege struct {
	*engine
	seen    *lab.Capture
	serial  uint32           // of forged packets
	devices map[string]error // that the host has, or why not
}

// prisoner is a container that attacks.
type prisoner struct {
	*container
	*siege
	profile
	link     lab.Link
	own4     netip.Addr
	own6     netip.Addr
	gw4, gw6 netip.Addr
	other    *prisoner // on the same bridge
	mails    int       // that arrived in spite of a limit
}

// Addresses that are nobody's.
var (
	stranger4 = netip.MustParseAddr("172.30.0.200")
	stranger6 = netip.MustParseAddr("fd00:d0c::200")
)

func newSiege(t *testing.T) (*siege, []*prisoner) {
	t.Helper()
	s := &siege{engine: startEngine(t, lab.New(t)), devices: map[string]error{}}
	s.seen = s.Capture(t)
	// Answers, and what hosts say of those that they cannot deliver, look like attacks.
	s.Server.NFT(t, "table inet deaf { chain input { type filter hook input priority 0; policy drop; }; }")
	// Nothing but the filter is to stop what comes out of a tunnel.
	s.Host.NFT(t, "add table ip filter; add chain ip filter FORWARD { policy accept; }")
	s.Host.IP(t, "route add ::ffff:0:0/96 via fd91::2")
	s.Server.IP(t, "route add local ::ffff:0:0/96 dev lo")
	var routing []string
	for _, sysctl := range []string{
		"ipv4.ip_forward=1", "ipv4.conf.all.rp_filter=0", "ipv4.conf.default.rp_filter=0", "ipv6.conf.all.disable_ipv6=0",
		"ipv6.conf.all.forwarding=1", "ipv6.conf.all.accept_dad=0", "ipv6.conf.default.accept_dad=0",
	} {
		routing = append(routing, "--sysctl", "net."+sysctl)
	}
	tools := []string{"--cap-add", "NET_ADMIN", "-v", "/:/host:ro"}
	if _, err := os.Stat("/dev/net/tun"); err == nil {
		tools = append(tools, "--device", "/dev/net/tun")
	}
	a, b, c := s.prisoner(t, bridged, routing), s.prisoner(t, netAdmin, append(tools, routing...)), s.prisoner(t, hostNet, []string{"--network=host"})
	a.other, b.other = b, a
	for name, kind := range map[string]string{
		"vxlan0": "vxlan id 42 dstport 4789", "vxlan1": "vxlan id 43 dstport 4790", "geneve0": "geneve id 44 remote " + a.own4.String(),
		"ipip1": "ipip local 172.30.0.1", "gre1": "gre local 172.30.0.1", "sit1": "sit local 172.30.0.1",
	} {
		exit := s.Run(t, exec.Command("sh", "-c", fmt.Sprintf("ip link add %s type %s && ip link set %[1]s up", name, kind)))
		if exit.Code != 0 {
			s.devices[name] = fmt.Errorf("%s: %s", name, strings.TrimSpace(exit.Stderr))
		}
	}
	return s, []*prisoner{a, b, c}
}

// mac returns the address of a device.
func mac(ns *lab.Netns, device string) (addr net.HardwareAddr) {
	ns.Do(func() {
		if found, err := net.InterfaceByName(device); err == nil {
			addr = found.HardwareAddr
		}
	})
	return addr
}

func (s *siege) mac(device string) net.HardwareAddr { return mac(s.Host, device) }

// prisoner starts a container.
func (s *siege) prisoner(t *testing.T, in profile, flags []string) *prisoner {
	t.Helper()
	p := &prisoner{container: s.run(t, in.String(), flags...), siege: s, profile: in}
	if in == hostNet {
		p.link = lab.Link{Device: "server", Source: s.mac("server"), Gateway: mac(s.Server, "eth0")}
		p.own4, p.own6 = netip.MustParseAddr("10.91.0.1"), netip.MustParseAddr("fd91::1")
		return p
	}
	said := strings.Fields(s.docker(t, "inspect", "-f",
		"{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}} {{.MacAddress}} {{.Gateway}} {{.IPv6Gateway}}{{end}}", p.id))
	if len(said) != 5 {
		t.Fatalf("container %s has addresses %v", in, said)
	}
	p.own4, p.own6 = netip.MustParseAddr(said[0]), netip.MustParseAddr(said[1])
	p.gw4, p.gw6 = netip.MustParseAddr(said[3]), netip.MustParseAddr(said[4])
	own, err := net.ParseMAC(said[2])
	if err != nil {
		t.Fatal(err)
	}
	p.link = lab.Link{Device: "eth0", Source: own, Gateway: s.mac("docker0")}
	// Packets that wait for a neighbour's address would arrive when nobody looks.
	for _, gateway := range []netip.Addr{p.gw4, p.gw6} {
		testenv.Eventually(t, "reach "+gateway.String(), func() bool { return p.Connect(at(gateway, 80)).Errno == ok })
	}
	return p
}

func (p *prisoner) own(tg target) netip.Addr     { return tg.either(p.own4, p.own6) }
func (p *prisoner) gateway(tg target) netip.Addr { return tg.either(p.gw4, p.gw6) }
func (*prisoner) stranger(tg target) netip.Addr  { return tg.either(stranger4, stranger6) }

func (p *prisoner) linkTo(mac net.HardwareAddr) lab.Link {
	link := p.link
	link.Gateway = mac
	return link
}

// each makes the packets for a target, from the container unless the header says
// otherwise. SYNs have a sequence number and a source port each.
func (p *prisoner) each(tg target, h lab.Header, pack func(lab.Header, []byte) [][]byte) (packets [][]byte) {
	if !h.Src.IsValid() {
		h.Src = p.own(tg)
	}
	if !h.Dst.IsValid() {
		h.Dst = tg.to.Addr()
	}
	h.Proto = tg.proto
	for range tg.n {
		p.serial++
		h.ID = uint16(p.serial)
		port := uint16(1024 + p.serial%60000)
		payload := lab.UDP(port, tg.to.Port(), 8)
		if tg.proto == unix.IPPROTO_TCP {
			payload = lab.TCP(port, tg.to.Port(), p.serial, tcpSYN)
		}
		packets = append(packets, pack(h, payload)...)
	}
	return packets
}

func (p *prisoner) forged(tg target, from netip.Addr) [][]byte {
	return p.each(tg, lab.Header{Src: from}, whole)
}

// decoys makes packets that something is to rewrite for the target.
func (p *prisoner) decoys(tg target, from netip.Addr) [][]byte {
	tg.to = at(tg.either(lab.Other4, lab.Other6), tg.decoy)
	return p.forged(tg, from)
}

// frameFor makes a frame for a device of the host's.
func (p *prisoner) frameFor(device string, packet []byte) []byte {
	return lab.Link{Source: p.link.Source, Gateway: p.mac(device)}.Frame(packet)
}

// vxlan wraps packets for a device of the host's (RFC 7348).
func (p *prisoner) vxlan(device string, id uint32, packets [][]byte) (wrapped [][]byte) {
	header := binary.BigEndian.AppendUint32([]byte{8, 0, 0, 0}, id<<8)
	for _, packet := range packets {
		wrapped = append(wrapped, slices.Concat(header, p.frameFor(device, packet)))
	}
	return wrapped
}

// host runs a script with the host's tools, in the container, up to the first
// command that fails.
func (p *prisoner) host(script string) error {
	if script == "" {
		return nil
	}
	script = strings.NewReplacer(
		// What one sends, the other receives; decoys go there.
		"$pair", "ip link add v0 type veth peer name v1 address 02:00:00:00:00:01; ip link set v0 up; ip link set v1 up; "+
			"for to in 198.51.100.1 2001:db8::1; do ip route add $to dev v0; ip neigh add $to lladdr 02:00:00:00:00:01 dev v0; done",
		"$vxlan", "ip link add x0 type vxlan id 42 dstport 4789 remote 172.30.0.1 dev eth0; ip link set x0 up",
		"$vxmac", p.mac("vxlan0").String(), "$gwmac", p.link.Gateway.String(), "$ownmac", p.link.Source.String(),
		"$gw4", p.gw4.String(), "$gw6", p.gw6.String(),
	).Replace(script)
	_, err := p.Command("set -e; export PATH=/usr/sbin:/usr/bin:/sbin:/bin; "+script+"\n", "/bin/busybox", "chroot", "/host", "/bin/sh")
	return err
}

// outcome is what came of an attack.
type outcome struct {
	arrived map[string]int // by target
	failed  string
}

// settle is Capture.Settle for packets that wait in more devices' queues than a
// sentinel: in each, one overtakes them.
func (p *prisoner) settle(t *testing.T) []lab.Packet {
	t.Helper()
	const devices = 4
	for range devices - 1 {
		p.seen.Settle(t)
	}
	return p.seen.Settle(t)
}

// try makes an attack on all its targets.
func (p *prisoner) try(t *testing.T, a attack) outcome {
	t.Helper()
	if err := p.devices[a.device]; err != nil {
		return outcome{failed: err.Error()}
	}
	began := p.host(a.begin)
	defer func() {
		if err := p.host(a.end); err != nil && began == nil {
			t.Errorf("%s: %v", a.name, err)
		}
	}()
	if began != nil {
		return outcome{failed: began.Error()}
	}
	o := outcome{arrived: map[string]int{}}
	for _, tg := range targets {
		if a.only != nil && !a.only(tg) {
			continue
		}
		p.seen.Forget()
		if err := a.send(p, tg); err != nil && o.failed == "" {
			o.failed = fmt.Sprintf("%s: %v", tg.name, err)
		}
		o.arrived[tg.name] = tg.arrived(p.settle(t))
	}
	return o
}

// defences are what stands beside the hook, if the kernel can have it.
type defences struct {
	name               string
	flags              []string
	families, hostSide bool
}

// TestAttacks shows of each attack that it succeeds without the filter, and then
// what stops it. Each defence is left out in turn, to see what it carries.
func TestAttacks(t *testing.T) {
	s, prisoners := newSiege(t)
	possible := map[*prisoner][]attack{}
	table := map[string][]string{}
	note := func(p *prisoner, a attack, what string) {
		row := fmt.Sprintf("%-12s %-24s", p.profile, a.name)
		table[row] = append(table[row], fmt.Sprintf("%-9s", what))
	}
	for _, p := range prisoners {
		for _, a := range attacks() {
			if a.in&p.profile == 0 {
				continue
			}
			o := p.try(t, a)
			if o.failed != "" {
				if needs := a.lacks(o.failed); needs != "" {
					t.Logf("unavailable: %s, %s needs %s: %s", p.profile, a.name, needs, o.failed)
				} else {
					t.Errorf("without the filter, %s, %s: %s", p.profile, a.name, o.failed)
				}
				continue
			}
			for _, tg := range targets {
				if n, tried := o.arrived[tg.name]; tried && n < tg.n {
					t.Errorf("without the filter, %s, %s: %d of %d arrived at %s", p.profile, a.name, n, tg.n, tg.name)
				}
			}
			possible[p] = append(possible[p], a)
		}
	}
	sets := []defences{
		{"hook alone", []string{"--socket-families", "any", "--host-side", "off"}, false, false},
		{"families", []string{"--host-side", "off"}, true, false},
		{"host side", []string{"--socket-families", "any"}, false, true},
		{"all", nil, true, true},
	}
	t.Cleanup(func() { s.Egressbpf(t, "detach", "--cgroup", policed) }) // also after a failure
	for _, set := range sets {
		t.Run(set.name, func(t *testing.T) {
			s.Egressbpf(t, append([]string{"attach", "--cgroup", policed, "--smtp-rate", "1/day"}, set.flags...)...)
			s.expectDefences(t, &set)
			for _, p := range prisoners {
				p.mails = 0
				for _, a := range possible[p] {
					note(p, a, p.judge(t, set, a, p.try(t, a)))
				}
			}
			// Each container has a bucket, and their bridge has one.
			if n := prisoners[0].mails + prisoners[1].mails; n > 3*burst {
				t.Errorf("%s: %d mail connections arrived from one bridge, want at most %d", set.name, n, 3*burst)
			}
			s.Egressbpf(t, "detach", "--cgroup", policed)
		})
	}
	var rows []string
	for row, cells := range table {
		rows = append(rows, row+strings.Join(cells, " "))
	}
	slices.Sort(rows)
	t.Logf("what arrived with each set of defences, in turn:\n%s", strings.Join(rows, "\n"))
}

// expectDefences takes from a set of defences those that are not active, which must
// say why.
func (s *siege) expectDefences(t *testing.T, set *defences) {
	t.Helper()
	status, _ := s.Status(t)
	for name, want := range map[string]*bool{"socket_families": &set.families, "host_side": &set.hostSide} {
		i := slices.IndexFunc(status.Defences, func(d loader.Defence) bool { return d.Name == name })
		if i < 0 {
			t.Fatalf("%s: status does not tell of %s", set.name, name)
		}
		d := status.Defences[i]
		if d.Active && !*want {
			t.Errorf("%s: %s is active", set.name, name)
		}
		if !d.Active && d.Reason == "" {
			t.Errorf("%s: status does not say why %s is not active", set.name, name)
		}
		if !d.Active && *want {
			t.Logf("%s: no %s: %s", set.name, name, d.Reason)
		}
		*want = d.Active
	}
}

// stops says whether an attack must not succeed.
func (set defences) stops(a attack, in profile) bool {
	return a.sight == hook || a.sight == families && set.families || set.hostSide && in != hostNet
}

// judge checks what came of an attack, and says it: open, stopped or what arrived.
func (p *prisoner) judge(t *testing.T, set defences, a attack, o outcome) string {
	t.Helper()
	what := fmt.Sprintf("%s, %s, %s", set.name, p.profile, a.name)
	stops := set.stops(a, p.profile)
	var got []string
	open := true
	for _, tg := range targets {
		n, tried := o.arrived[tg.name]
		if !tried {
			if (a.only == nil || a.only(tg)) && o.failed != "" {
				t.Errorf("%s: not tried: %s", what, o.failed)
			}
			continue
		}
		if n > 0 {
			got = append(got, fmt.Sprintf("%s: %d", tg.name, n))
		}
		open = open && n >= tg.n
		switch {
		case !stops && n < tg.n:
			t.Errorf("%s: %d of %d arrived at %s, and nothing is known to have stopped it (%s)", what, n, tg.n, tg.name, o.failed)
		case stops && tg.mail():
			if p.mails += n; n > 0 && p.mails > 2*burst {
				t.Errorf("%s: %d mail connections arrived at %s, %d in all, want at most %d", what, n, tg.name, p.mails, 2*burst)
			}
		case stops && n > 0:
			t.Errorf("%s: arrived at %s", what, tg.name)
		}
	}
	switch {
	case len(got) == 0:
		return "stopped"
	case open:
		return "open"
	}
	return strings.Join(got, ", ")
}
