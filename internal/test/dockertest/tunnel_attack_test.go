package dockertest

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// hostDevices unpack packets that come to the host. Each has what the kernel needs for it,
// and a script that makes it. For some this is a port or a route.
var hostDevices = map[string]struct{ needs, made string }{
	"vxlan0": {"CONFIG_VXLAN", "ip link add vxlan0 type vxlan id 42 dstport 4789; ip link set vxlan0 up"},
	"vxlan1": {"CONFIG_VXLAN", "ip link add vxlan1 type vxlan id 43 dstport 4790; ip link set vxlan1 up"},
	"vxlan2": {"CONFIG_VXLAN", "ip link add vxlan2 type vxlan id 42 dstport 443; ip link set vxlan2 up"},
	"vxlan3": {"CONFIG_VXLAN", "ip link add vxlan3 type vxlan id 42 dstport 4797 gbp; ip link set vxlan3 up"},
	"vxlan4": {"CONFIG_VXLAN", "ip link add vxlan4 type vxlan external gpe dstport 4796; ip link set vxlan4 up"},
	"vxlan6": {"CONFIG_VXLAN", "ip link add vxlan6 type vxlan id 42 dstport 4789 local $gw6 udp6zerocsumrx; ip link set vxlan6 up"},

	"geneve0": {"CONFIG_GENEVE", "ip link add geneve0 type geneve id 44 remote $peer4; ip link set geneve0 up"},
	"geneve6": {"CONFIG_GENEVE", "ip link add geneve6 type geneve id 44 remote $peer6; ip link set geneve6 up"},

	"ipip1":   {"CONFIG_NET_IPIP", "ip link show ipip1 || ip link add ipip1 type ipip local $gw4; ip link set ipip1 up"},
	"sit1":    {"CONFIG_IPV6_SIT", "ip link show sit1 || ip link add sit1 type sit local $gw4; ip link set sit1 up"},
	"gre1":    {"CONFIG_NET_IPGRE", "ip link show gre1 || ip link add gre1 type gre local $gw4; ip link set gre1 up"},
	"gretap1": {"CONFIG_NET_IPGRE", "ip link add gretap1 type gretap local $gw4; ip link set gretap1 up"},
	"tnl6":    {"CONFIG_IPV6_TUNNEL", "ip link show tnl6 || ip link add tnl6 type ip6tnl local $gw6 mode any; ip link set tnl6 up"},
	"gretap6": {"CONFIG_IPV6_GRE", "ip link add gretap6 type ip6gretap local $gw6; ip link set gretap6 up"},
	"gre6":    {"CONFIG_IPV6_GRE", "ip link add gre6 type ip6gre local $gw6; ip link set gre6 up"},

	// These turn UDP into packets for one of the above.
	"fou ipip": {"CONFIG_NET_FOU, CONFIG_NET_IPIP", "ip link show ipip1 || ip link add ipip1 type ipip local $gw4; ip fou add port 5555 ipproto 4"},
	"fou sit":  {"CONFIG_NET_FOU, CONFIG_IPV6_SIT", "ip link show sit1 || ip link add sit1 type sit local $gw4; ip fou add port 5556 ipproto 41"},
	"fou gre":  {"CONFIG_NET_FOU, CONFIG_NET_IPGRE", "ip link show gre1 || ip link add gre1 type gre local $gw4; ip fou add port 5557 ipproto 47"},
	"gue ipip": {"CONFIG_NET_FOU, CONFIG_NET_IPIP", "ip link show ipip1 || ip link add ipip1 type ipip local $gw4; ip fou add port 5558 gue"},
	"gue sit":  {"CONFIG_NET_FOU, CONFIG_IPV6_SIT", "ip link show sit1 || ip link add sit1 type sit local $gw4; ip fou add port 5559 gue"},
	"fou tnl6": {"CONFIG_IPV6_FOU, CONFIG_IPV6_TUNNEL", "ip link show tnl6 || ip link add tnl6 type ip6tnl local $gw6 mode any; ip fou add port 5560 ipproto 41 -6"},
	"gue tnl6": {"CONFIG_IPV6_FOU, CONFIG_IPV6_TUNNEL", "ip link show tnl6 || ip link add tnl6 type ip6tnl local $gw6 mode any; ip fou add port 5561 gue -6"},

	"bareudp0": {"CONFIG_BAREUDP", "ip link add bareudp0 type bareudp dstport 6800 ethertype ipv4 multiproto; ip link set bareudp0 up"},
	"mpls udp": {"CONFIG_BAREUDP, CONFIG_MPLS_ROUTING", "ip link add bareudp1 type bareudp dstport 6635 ethertype mpls_uc; ip link set bareudp1 up" + mplsTo("bareudp1")},
	"mpls gre": {"CONFIG_NET_IPGRE, CONFIG_MPLS_ROUTING", "ip link add gre2 type gre local $gw4 remote $peer4; ip link set gre2 up" + mplsTo("gre2")},

	"l2tp0": {"CONFIG_L2TP_ETH", "ip l2tp add tunnel tunnel_id 1 peer_tunnel_id 1 encap udp local $gw4 remote $peer4 udp_sport 1701 udp_dport 1701; " +
		"ip l2tp add session name l2tp0 tunnel_id 1 session_id 1 peer_session_id 1; ip link set l2tp0 up"},
	"l2tp1": {"CONFIG_L2TP_IP, CONFIG_L2TP_ETH", "ip l2tp add tunnel tunnel_id 2 peer_tunnel_id 2 encap ip local $gw4 remote $peer4; " +
		"ip l2tp add session name l2tp1 tunnel_id 2 session_id 2 peer_session_id 2; ip link set l2tp1 up"},

	// Their packets are not for the host itself, so they do not pass LOCAL_IN.
	"seg6 6": {"CONFIG_IPV6_SEG6_LWTUNNEL", "ip -6 route add fd00:5e6::6 encap seg6local action End.DT6 table main dev docker0"},
	"seg6 x": {"CONFIG_IPV6_SEG6_LWTUNNEL", "ip -6 route add fd00:5e6::e encap seg6local action End.DX6 nh6 fd91::2 dev docker0"},
	"seg6 4": {"CONFIG_IPV6_SEG6_LWTUNNEL", "ip -6 route add fd00:5e6::4 encap seg6local action End.DX4 nh4 10.91.0.2 dev docker0"},
	"seg6 2": {"CONFIG_IPV6_SEG6_LWTUNNEL", "ip -6 route add fd00:5e6::2 encap seg6local action End.DX2 oif server dev docker0"},
}

// mplsTo makes the host forward packets with a label to the server.
func mplsTo(device string) string {
	return "; modprobe -q mpls_router || true; sysctl -qw net.mpls.platform_labels=1000 net.mpls.conf." + device + ".input=1; " +
		"ip -f mpls route replace 100 via inet 10.91.0.2 dev server"
}

// tunnel is a way of wrapping packets for the host: in UDP, if it has a port, or in IP.
type tunnel struct {
	name, device string
	only         func(target) bool
	v6           bool // outside
	port         uint16
	proto        uint8
	wrap         func(p *prisoner, inner []byte) []byte
}

// tunnels are the tunnels of this host. Without a port, the protocol tells them apart.
func tunnels() []tunnel {
	const ethernet = 0x6558 // RFC 1701
	header := func(header ...byte) func(*prisoner, []byte) []byte {
		return func(_ *prisoner, inner []byte) []byte { return slices.Concat(header, inner) }
	}
	framed := func(device string, header ...byte) func(*prisoner, []byte) []byte {
		return func(p *prisoner, inner []byte) []byte { return slices.Concat(header, p.frameFor(device, inner)) }
	}
	typed := func(before ...byte) func(*prisoner, []byte) []byte { // RFC 2784
		return func(_ *prisoner, inner []byte) []byte {
			return append(binary.BigEndian.AppendUint16(before, lab.EtherType(inner)), inner...)
		}
	}
	numbered := func(_ *prisoner, inner []byte) []byte { // draft-ietf-nvo3-vxlan-gpe
		return slices.Concat([]byte{0x0c, 0, 0, map[uint16]byte{unix.ETH_P_IP: 1, unix.ETH_P_IPV6: 2}[lab.EtherType(inner)], 0, 0, 42, 0}, inner)
	}
	vxlan := func(device string) func(*prisoner, []byte) []byte { return framed(device, 8, 0, 0, 0, 0, 0, 42, 0) } // RFC 7348
	label := []byte{0, 100 >> 4, 100&15<<4 | 1, 64}                                                                // RFC 3032
	return []tunnel{
		{name: "VXLAN", device: "vxlan0", port: 4789, wrap: vxlan("vxlan0")},
		{name: "VXLAN at another port", device: "vxlan2", port: 443, wrap: vxlan("vxlan2")},
		{name: "VXLAN with a group policy", device: "vxlan3", port: 4797, wrap: framed("vxlan3", 0x88, 0, 0, 1, 0, 0, 42, 0)},
		{name: "VXLAN-GPE", device: "vxlan4", port: 4796, wrap: numbered},
		{name: "VXLAN-GPE over IPv6", device: "vxlan4", v6: true, port: 4796, wrap: numbered},
		{name: "VXLAN over IPv6", device: "vxlan6", v6: true, port: 4789, wrap: vxlan("vxlan6")},
		{name: "GENEVE", device: "geneve0", port: 6081, wrap: framed("geneve0", 0, 0, ethernet>>8, ethernet&0xff, 0, 0, 44, 0)}, // RFC 8926
		{name: "GENEVE over IPv6", device: "geneve6", v6: true, port: 6081, wrap: framed("geneve6", 0, 0, ethernet>>8, ethernet&0xff, 0, 0, 44, 0)},
		{name: "FOU", device: "fou ipip", only: only4, port: 5555, wrap: header()},
		{name: "FOU of IPv6", device: "fou sit", only: only6, port: 5556, wrap: header()},
		{name: "FOU of GRE", device: "fou gre", port: 5557, wrap: typed(0, 0)},
		{name: "FOU over IPv6", device: "fou tnl6", only: only6, v6: true, port: 5560, wrap: header()},
		{name: "GUE", device: "gue ipip", only: only4, port: 5558, wrap: header(0, unix.IPPROTO_IPIP, 0, 0)},
		{name: "GUE of IPv6", device: "gue sit", only: only6, port: 5559, wrap: header(0, unix.IPPROTO_IPV6, 0, 0)},
		{name: "GUE version 1", device: "gue ipip", only: only4, port: 5558, wrap: header()},
		{name: "GUE over IPv6", device: "gue tnl6", only: only6, v6: true, port: 5561, wrap: header(0, unix.IPPROTO_IPV6, 0, 0)},
		{name: "bare UDP", device: "bareudp0", port: 6800, wrap: header()},
		{name: "bare UDP over IPv6", device: "bareudp0", v6: true, port: 6800, wrap: header()},
		{name: "MPLS in UDP", device: "mpls udp", port: 6635, wrap: header(label...)},
		{name: "L2TP", device: "l2tp0", port: 1701, wrap: framed("l2tp0", 0, 3, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0)}, // RFC 3931
		{name: "L2TP in IP", device: "l2tp1", proto: 115, wrap: framed("l2tp1", 0, 0, 0, 2, 0, 0, 0, 0)},
		{name: "IPIP", device: "ipip1", only: only4, proto: unix.IPPROTO_IPIP, wrap: header()},
		{name: "6in4", device: "sit1", only: only6, proto: unix.IPPROTO_IPV6, wrap: header()},
		{name: "GRE", device: "gre1", proto: unix.IPPROTO_GRE, wrap: typed(0, 0)},
		{name: "GRE with a sequence number", device: "gre1", proto: unix.IPPROTO_GRE, wrap: func(p *prisoner, inner []byte) []byte {
			return slices.Concat(binary.BigEndian.AppendUint16([]byte{0x10, 0}, lab.EtherType(inner)), []byte{0, 0, 0, 1}, inner) // RFC 2890
		}},
		{name: "GRE of WCCP", device: "gre1", only: only4, proto: unix.IPPROTO_GRE, wrap: header(0, 0, 0x88, 0x3e)},
		{name: "GRE of Ethernet", device: "gretap1", proto: unix.IPPROTO_GRE, wrap: framed("gretap1", 0, 0, ethernet>>8, ethernet&0xff)},
		{name: "GRE of MPLS", device: "mpls gre", proto: unix.IPPROTO_GRE, wrap: header(slices.Concat([]byte{0, 0, 0x88, 0x47}, label)...)},
		{name: "IPv4 in IPv6", device: "tnl6", only: only4, v6: true, proto: unix.IPPROTO_IPIP, wrap: header()},
		{name: "IPv6 in IPv6", device: "tnl6", only: only6, v6: true, proto: unix.IPPROTO_IPV6, wrap: header()},
		{name: "GRE over IPv6", device: "gre6", v6: true, proto: unix.IPPROTO_GRE, wrap: typed(0, 0)},
		{name: "GRE of Ethernet over IPv6", device: "gretap6", v6: true, proto: unix.IPPROTO_GRE, wrap: framed("gretap6", 0, 0, ethernet>>8, ethernet&0xff)},
	}
}

// endpoint is the address at which the host unpacks.
func (p *prisoner) endpoint(tn tunnel) netip.AddrPort {
	if tn.v6 {
		return at(p.gw6, tn.port)
	}
	return at(p.gw4, tn.port)
}

// outside is the header of the packet that carries another one.
func (p *prisoner) outside(tn tunnel) lab.Header {
	p.serial++
	h := lab.Header{Src: p.own4, Dst: p.gw4, Proto: tn.proto, ID: uint16(p.serial)}
	if tn.v6 {
		h.Src, h.Dst = p.own6, p.gw6
	}
	if tn.port != 0 {
		h.Proto = unix.IPPROTO_UDP
	}
	return h
}

// wrapped wraps packets.
func (p *prisoner) wrapped(tn tunnel, packets [][]byte) (all [][]byte) {
	for _, packet := range packets {
		all = append(all, tn.wrap(p, packet))
	}
	return all
}

// sendBy sends packets in a tunnel from an ordinary socket, if the tunnel has a port.
func (p *prisoner) sendBy(tn tunnel, packets [][]byte) error {
	if tn.port == 0 {
		return p.Send("raw IP", p.link, p.packed(tn, packets, whole)...)
	}
	return p.SendUDPFrom(tn.port, nil, p.endpoint(tn), p.wrapped(tn, packets)...)
}

// packed wraps packets with their outer headers.
func (p *prisoner) packed(tn tunnel, packets [][]byte, pack func(lab.Header, []byte) [][]byte) (outer [][]byte) {
	for _, payload := range p.wrapped(tn, packets) {
		h := p.outside(tn)
		if tn.port != 0 {
			payload = h.Datagram(1024, tn.port, payload)
		}
		outer = append(outer, pack(h, payload)...)
	}
	return outer
}

// sendBehindInnocent sends packets in a tunnel as segments of one packet whose first segment is
// harmless.
func (p *prisoner) sendBehindInnocent(tn tunnel, tg target, packets [][]byte, options ...lab.Option) error {
	return p.SendSegments(options, p.endpoint(tn), p.wrapped(tn, append(p.innocent(tg), packets...))...)
}

// innocent makes a packet that must pass.
func (p *prisoner) innocent(tg target) [][]byte {
	tg.to, tg.proto, tg.n = at(tg.either(lab.Other4, lab.Other6), 9), unix.IPPROTO_UDP, 1
	return p.forged(tg, p.stranger(tg))
}

// frameFor makes a frame for a device of the host.
func (p *prisoner) frameFor(device string, packet []byte, tags ...uint16) []byte {
	return lab.Link{Source: p.link.Source, Gateway: p.mac(device)}.Frame(packet, tags...)
}

// tunnelAttacks make the host unpack an innocent packet.
func tunnelAttacks() []attack {
	var all []attack
	var vxlan, vxlan6 tunnel
	for _, tn := range tunnels() {
		switch tn.name {
		case "VXLAN":
			vxlan = tn
		case "VXLAN over IPv6":
			vxlan6 = tn
		}
		all = append(all, attack{name: tn.name, device: tn.device, only: tn.only, send: func(p *prisoner, tg target) error {
			return p.sendBy(tn, p.forged(tg, p.stranger(tg)))
		}})
		if tn.port == 0 || tn.name == "L2TP" { // which knows its peer by the port
			continue
		}
		all = append(all, attack{name: tn.name + " in segments", device: tn.device, only: tn.only, send: func(p *prisoner, tg target) error {
			return p.sendBehindInnocent(tn, tg, p.forged(tg, p.stranger(tg)))
		}})
	}
	all = append(all, insideAttacks(vxlan)...)
	all = append(all, outsideAttacks(vxlan, vxlan6)...)
	all = append(all, segmentRoutes()...)
	all = append(all, addressAttacks(vxlan, vxlan6)...)
	for i := range all {
		if all[i].in = bridged; all[i].sight != families {
			all[i].sight = host
		}
	}
	// The host side does not judge what the host sends to itself.
	return append(all, attack{name: "VXLAN, by the loopback", device: vxlan.device, sight: host, closed: true, in: hostNet, send: func(p *prisoner, tg target) error {
		return p.SendUDP(at(netip.MustParseAddr("127.0.0.1"), vxlan.port), p.wrapped(vxlan, p.forged(tg, p.stranger(tg)))...)
	}})
}

// addressAttacks send to other addresses that the host listens on.
func addressAttacks(vxlan, vxlan6 tunnel) []attack {
	broadcast := lab.Option{Level: unix.SOL_SOCKET, Name: unix.SO_BROADCAST, Value: []byte{1, 0, 0, 0}}
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		slices.Reverse(broadcast.Value)
	}
	var all []attack
	for _, to := range []struct {
		name string
		tn   tunnel
		addr string
	}{
		{"the host's other address", vxlan, "10.91.0.1"},
		{"the network's broadcast address", vxlan, "172.30.0.255"},
		{"the address 255.255.255.255", vxlan, "255.255.255.255"},
		{"a multicast group", vxlan, "224.0.0.1"},
		{"the host's other IPv6 address", vxlan6, "fd91::1"},
		{"the host's link-local IPv6 address", vxlan6, "fe80::1%eth0"},
		{"an IPv6 multicast group", vxlan6, "ff02::1%eth0"},
	} {
		send := func(segmented bool) func(*prisoner, target) error {
			return func(p *prisoner, tg target) error {
				packets, addr := p.forged(tg, p.stranger(tg)), at(netip.MustParseAddr(to.addr), to.tn.port)
				if segmented {
					return p.SendSegments([]lab.Option{broadcast}, addr, p.wrapped(to.tn, append(p.innocent(tg), packets...))...)
				}
				return p.SendUDPFrom(0, []lab.Option{broadcast}, addr, p.wrapped(to.tn, packets)...)
			}
		}
		all = append(all,
			attack{name: "VXLAN to " + to.name, device: to.tn.device, send: send(false)},
			attack{name: "VXLAN to " + to.name + " in segments", device: to.tn.device, send: send(true)})
	}
	return all
}

// insideAttacks use headers that are easily misread, inside a tunnel.
func insideAttacks(vxlan tunnel) []attack {
	in := func(name string, tn tunnel, only func(target) bool, make func(*prisoner, target) [][]byte) attack {
		return attack{name: "VXLAN of " + name, device: tn.device, only: only, send: func(p *prisoner, tg target) error {
			return p.sendBy(tn, make(p, tg))
		}}
	}
	// as makes frames in another way.
	as := func(frame func(p *prisoner, inner []byte) []byte) tunnel {
		tn := vxlan
		tn.wrap = func(p *prisoner, inner []byte) []byte {
			return append([]byte{8, 0, 0, 0, 0, 0, 42, 0}, frame(p, inner)...)
		}
		return tn
	}
	padded := as(func(p *prisoner, inner []byte) []byte {
		return append(p.frameFor("vxlan0", inner), make([]byte, 64)...)
	})
	tagged := as(func(p *prisoner, inner []byte) []byte {
		return p.frameFor("vxlan0", inner, unix.ETH_P_8021Q, unix.ETH_P_8021Q, unix.ETH_P_8021Q)
	})
	each := func(pack func(lab.Header, []byte) [][]byte) func(*prisoner, target) [][]byte {
		return func(p *prisoner, tg target) [][]byte { return p.each(tg, lab.Header{Src: p.stranger(tg)}, pack) }
	}
	vxlan1 := tunnel{device: "vxlan1", port: 4790, wrap: func(p *prisoner, inner []byte) []byte {
		return append([]byte{8, 0, 0, 0, 0, 0, 43, 0}, p.frameFor("vxlan1", inner)...)
	}}
	nested := func(pack func(lab.Header, []byte) [][]byte) func(*prisoner, target) [][]byte {
		return func(p *prisoner, tg target) (outer [][]byte) {
			for _, payload := range p.wrapped(vxlan1, p.forged(tg, p.stranger(tg))) {
				h := p.outside(vxlan1)
				h.Src = stranger4
				outer = append(outer, pack(h, h.Datagram(1024, vxlan1.port, payload))...)
			}
			return outer
		}
	}
	all := []attack{
		in("VXLAN", vxlan, nil, nested(whole)),
		in("VXLAN in fragments", vxlan, nil, nested(inFragments(40))),
		in("three VLAN tags", tagged, nil, each(whole)),
		in("a padded packet", padded, nil, each(whole)),
		in("short fragments", padded, nil, each(inFragments(8))),
		in("two option headers", vxlan, only6, each(twice(unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS))),
		in("two option headers of one type", vxlan, only6, each(twice(unix.IPPROTO_DSTOPTS, unix.IPPROTO_DSTOPTS))),
		in("a forged source, closed port of the host", vxlan, metadata, func(p *prisoner, tg target) [][]byte {
			return [][]byte{answered(tg, p.gateway(tg), false)}
		}),
		in("a forged source, ping of the host", vxlan, metadata, func(p *prisoner, tg target) [][]byte {
			return [][]byte{answered(tg, p.gateway(tg), true)}
		}),
		in("a forged source, unknown option to the host", vxlan, metadata6, func(p *prisoner, tg target) [][]byte {
			return [][]byte{unknownOption(tg, p.gw6)}
		}),
		in("segments to mail", vxlan, target.mail, func(p *prisoner, tg target) [][]byte {
			return p.segments(tg, p.stranger(tg), tcpACK)
		}),
	}
	for _, odd := range oddHeaders() {
		all = append(all, in(odd.name, vxlan, odd.only, func(p *prisoner, tg target) [][]byte {
			return odd.make(p, tg, p.stranger(tg))
		}))
	}
	for _, s := range spellings {
		all = append(all, in(s.name, vxlan, metadata6, func(p *prisoner, tg target) [][]byte {
			return p.each(tg, lab.Header{Src: p.stranger(tg), Dst: s.addr}, whole)
		}))
	}
	return all
}

// twice puts two extension headers before the payload.
func twice(outer, inner uint8) func(lab.Header, []byte) [][]byte {
	return func(h lab.Header, payload []byte) [][]byte {
		payload = slices.Concat([]byte{h.Proto}, padding, payload)
		h.Proto = inner
		return behind(outer, padding...)(h, payload)
	}
}

// outsideAttacks use such headers on the packet that carries another one.
func outsideAttacks(vxlan, vxlan6 tunnel) []attack {
	by := func(road, name string, tn tunnel, pack func(lab.Header, []byte) [][]byte) attack {
		return attack{name: tn.name + ", " + name, device: tn.device, send: func(p *prisoner, tg target) error {
			return p.Send(road, p.link, p.packed(tn, p.forged(tg, p.stranger(tg)), pack)...)
		}}
	}
	packed := func(name string, tn tunnel, pack func(lab.Header, []byte) [][]byte) attack {
		return by("raw IP", name, tn, pack)
	}
	// The hook refuses fragments that hide their offset, so this needs another socket.
	hidden := by("AF_PACKET", "options in fragments", vxlan6, func(h lab.Header, payload []byte) [][]byte {
		payload = slices.Concat([]byte{h.Proto}, padding, payload)
		h.Proto = unix.IPPROTO_DSTOPTS
		return inFragments(48)(h, payload)
	})
	hidden.sight = families
	options := func(p *prisoner, names ...int) (all []lab.Option) {
		for _, name := range names {
			all = append(all, lab.Option{Level: unix.IPPROTO_IPV6, Name: name, Value: append([]byte{0}, padding...)})
		}
		return all
	}
	sticky := func(name string, names ...int) attack {
		return attack{name: "VXLAN over IPv6, " + name, device: vxlan6.device, send: func(p *prisoner, tg target) error {
			return p.SendUDPFrom(0, options(p, names...), p.endpoint(vxlan6), p.wrapped(vxlan6, p.forged(tg, p.stranger(tg)))...)
		}}
	}
	big := vxlan
	big.wrap = func(p *prisoner, inner []byte) []byte { return append(vxlan.wrap(p, inner), make([]byte, 3000)...) }
	big6 := vxlan6
	big6.wrap = func(p *prisoner, inner []byte) []byte { return append(vxlan6.wrap(p, inner), make([]byte, 3000)...) }
	// The first fragment has the beginning of the inner packet, but not its destination.
	const within = 40
	return []attack{
		packed("in fragments", vxlan, inFragments(within)),
		packed("in short fragments", vxlan, inFragments(8)),
		{name: "VXLAN, larger than the MTU", device: vxlan.device, send: func(p *prisoner, tg target) error { return p.sendBy(big, p.forged(tg, p.stranger(tg))) }},
		{name: "VXLAN over IPv6, larger than the MTU", device: vxlan6.device, send: func(p *prisoner, tg target) error { return p.sendBy(big6, p.forged(tg, p.stranger(tg))) }},
		packed("in fragments", vxlan6, inFragments(within)),
		packed("in short fragments", vxlan6, inFragments(8)),
		packed("an option header", vxlan6, behind(unix.IPPROTO_DSTOPTS, padding...)),
		packed("two option headers", vxlan6, twice(unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS)),
		packed("two option headers of one type", vxlan6, twice(unix.IPPROTO_DSTOPTS, unix.IPPROTO_DSTOPTS)),
		hidden,
		packed("fragments behind options", vxlan6, func(h lab.Header, payload []byte) (all [][]byte) {
			for _, fragment := range inFragments(within)(h, payload) {
				outer := h
				outer.Proto = unix.IPPROTO_FRAGMENT
				all = append(all, behind(unix.IPPROTO_HOPOPTS, padding...)(outer, fragment[40:])...)
			}
			return all
		}),
		sticky("options set on the socket", unix.IPV6_HOPOPTS, unix.IPV6_DSTOPTS),
		{name: "VXLAN over IPv6, options and segments", device: vxlan6.device, send: func(p *prisoner, tg target) error {
			return p.sendBehindInnocent(vxlan6, tg, p.forged(tg, p.stranger(tg)), options(p, unix.IPV6_HOPOPTS, unix.IPV6_DSTOPTS)...)
		}},
	}
}

// segmentRoutes make the host unpack packets for a segment of its own (RFC 8986).
func segmentRoutes() []attack {
	const ethernet = 143 // IANA's number for it
	var all []attack
	for _, end := range []struct {
		name, device, segment string
		only                  func(target) bool
		proto                 uint8
		inner                 func(*prisoner, []byte) []byte
	}{
		{"End.DT6", "seg6 6", "fd00:5e6::6", only6, unix.IPPROTO_IPV6, nil},
		{"End.DX6", "seg6 x", "fd00:5e6::e", only6, unix.IPPROTO_IPV6, nil},
		{"End.DX4", "seg6 4", "fd00:5e6::4", only4, unix.IPPROTO_IPIP, nil},
		{"End.DX2", "seg6 2", "fd00:5e6::2", nil, ethernet, func(p *prisoner, packet []byte) []byte {
			return lab.Link{Source: p.link.Source, Gateway: mac(p.Server, "eth0")}.Frame(packet)
		}},
	} {
		segment := netip.MustParseAddr(end.segment)
		for name, pack := range map[string]func(lab.Header, []byte) [][]byte{
			"":                      whole,
			", behind options":      behind(unix.IPPROTO_DSTOPTS, padding...),
			", by a routing header": behind(unix.IPPROTO_ROUTING, append([]byte{2, 4, 0, 0, 0, 0, 0}, segment.AsSlice()...)...),
		} {
			all = append(all, attack{name: end.name + name, device: end.device, only: end.only, send: func(p *prisoner, tg target) error {
				var outer [][]byte
				for _, packet := range p.forged(tg, p.stranger(tg)) {
					if end.inner != nil {
						packet = end.inner(p, packet)
					}
					outer = append(outer, pack(lab.Header{Src: p.own6, Dst: segment, Proto: end.proto}, packet)...)
				}
				return p.Send("raw IP", p.link, outer...)
			}})
		}
	}
	return all
}
