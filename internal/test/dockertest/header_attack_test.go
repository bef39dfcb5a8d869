package dockertest

import (
	"bytes"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// headerAttacks use headers that are easily misread.
func headerAttacks() []attack {
	var all []attack
	for _, odd := range oddHeaders() {
		all = append(all, attack{name: odd.name, sight: families, in: bridged, only: odd.only,
			send: func(p *prisoner, tg target) error {
				return p.Send("AF_PACKET", p.link, odd.make(p, tg, p.own(tg))...)
			}})
	}
	for _, s := range spellings {
		forged := func(p *prisoner, tg target) [][]byte { return p.each(tg, lab.Header{Dst: s.addr}, whole) }
		all = append(all,
			attack{name: s.name, sight: families, in: bridged, only: metadata6,
				send: func(p *prisoner, tg target) error { return p.Send("AF_PACKET", p.link, forged(p, tg)...) }},
			attack{name: "raw IP, " + s.name, sight: hook, in: bridged | hostNet, only: metadata6,
				send: func(p *prisoner, tg target) error { return p.Send("raw IP", p.link, forged(p, tg)...) }})
	}
	return all
}

// spelling is an IPv6 address that stands for an IPv4 address.
type spelling struct {
	name string
	addr netip.Addr
}

// spellings are IPv6 addresses that stand for the metadata service's address.
var spellings = []spelling{
	{"v4-mapped", lab.Mapped(lab.Metadata4)},
	{"v4-compatible", embedded("::/96")},
	{"6to4", embedded("2002::/16")},
	{"NAT64", lab.NAT64},
	{"NAT64, local /48", embedded("64:ff9b:1::/48")},
	{"NAT64, local /56", embedded("64:ff9b:1:ab00::/56")},
	{"NAT64, local /64", embedded("64:ff9b:1:abcd::/64")},
	{"NAT64, local /96", embedded("64:ff9b:1:abcd:0:1::/96")},
}

// embedded puts the metadata service's address after a prefix as in RFC 6052: the ninth
// byte stays free.
func embedded(prefix string) netip.Addr {
	network := netip.MustParsePrefix(prefix)
	addr, i := network.Addr().As16(), network.Bits()/8
	for _, b := range lab.Metadata4.As4() {
		if i == 8 {
			i++
		}
		addr[i] = b
		i++
	}
	return netip.AddrFrom16(addr)
}

// oddHeader makes packets for a target, from an address.
type oddHeader struct {
	name string
	only func(target) bool
	make func(p *prisoner, tg target, from netip.Addr) [][]byte
}

func oddHeaders() []oddHeader {
	const nop, lsrr, segmentRoute = 1, 131, 4 // RFC 791, RFC 8754
	packed := func(name string, only func(target) bool, pack func(lab.Header, []byte) [][]byte) oddHeader {
		return oddHeader{name, only, func(p *prisoner, tg target, from netip.Addr) [][]byte {
			return p.each(tg, lab.Header{Src: from}, pack)
		}}
	}
	return []oddHeader{
		{"IP options", only4, func(p *prisoner, tg target, from netip.Addr) [][]byte {
			return p.each(tg, lab.Header{Src: from, Options: []byte{nop, nop, nop, 0}}, whole)
		}},
		{"source route", only4, func(p *prisoner, tg target, from netip.Addr) [][]byte {
			route := append([]byte{nop, lsrr, 7, 4}, tg.to.Addr().AsSlice()...)
			return p.each(tg, lab.Header{Src: from, Dst: p.gateway(tg), Options: route}, whole)
		}},
		packed("fragments", nil, inFragments(24)),
		packed("hop-by-hop options", only6, behind(unix.IPPROTO_HOPOPTS, padding...)),
		packed("destination options", only6, behind(unix.IPPROTO_DSTOPTS, padding...)),
		packed("atomic fragment", only6, behind(unix.IPPROTO_FRAGMENT, 0, 0, 0, 0, 0, 0, 1)),
		{"routing header", only6, func(p *prisoner, tg target, from netip.Addr) [][]byte {
			via := p.gateway(tg)
			route := slices.Concat([]byte{4, segmentRoute, 1, 1, 0, 0, 0}, tg.to.Addr().AsSlice(), via.AsSlice())
			return p.each(tg, lab.Header{Src: from, Dst: via}, behind(unix.IPPROTO_ROUTING, route...))
		}},
	}
}

// padding is an extension header with options that do nothing, without its first byte.
var padding = []byte{0, 1, 4, 0, 0, 0, 0}

// inFragments splits a packet into two fragments.
func inFragments(at int) func(lab.Header, []byte) [][]byte {
	return func(h lab.Header, payload []byte) [][]byte {
		if len(payload) < 2*at {
			payload = append(payload, make([]byte, 2*at-len(payload))...)
		}
		first, last := h, h
		first.More, last.Offset = true, at
		return [][]byte{first.Finished(payload[:at]), last.Finished(payload[at:])}
	}
}

// answerAttacks make another kernel send its answer to the metadata service.
func answerAttacks() []attack {
	group := net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
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
		{name: "forged source, closed port of the host", send: toHost(false)},
		{name: "forged source, ping of the host", send: toHost(true)},
		{name: "forged source, closed port of a container", send: toOther(false)},
		{name: "forged source, ping of a container", send: toOther(true)},
		{name: "forged source, ping in a broadcast frame", send: func(p *prisoner, tg target) error {
			all := bytes.Repeat([]byte{0xff}, 6)
			return p.Send("AF_PACKET", p.linkTo(all), answered(tg, p.gateway(tg), true))
		}},
	}
	for i := range all {
		all[i].only = metadata
	}
	all = append(all,
		attack{name: "forged source, unknown option to the host", only: metadata6, send: func(p *prisoner, tg target) error {
			return p.Send("AF_PACKET", p.link, unknownOption(tg, p.gw6))
		}},
		attack{name: "forged source, unknown option through the host", only: metadata6, send: func(p *prisoner, tg target) error {
			return p.Send("AF_PACKET", p.link, unknownOption(tg, lab.Other6))
		}},
		attack{name: "forged source, unknown option to a multicast group", only: metadata6, send: func(p *prisoner, tg target) error {
			return p.Send("AF_PACKET", p.linkTo(group), unknownOption(tg, netip.MustParseAddr("ff02::1")))
		}},
		attack{name: "forged source, unknown option behind a VLAN tag", only: metadata6, send: func(p *prisoner, tg target) error {
			return p.Send("VLAN tag", p.link, unknownOption(tg, p.gw6))
		}})
	for i := range all {
		all[i].sight, all[i].in = families, bridged
	}
	return all
}

// unknownOption returns a packet with the metadata service as its source and an unknown
// hop-by-hop option, of a type that a node which does not know it must report (RFC 8200,
// 4.2). The kernel reports it before netfilter sees the packet, and includes much of the
// packet in its answer.
func unknownOption(tg target, to netip.Addr) []byte {
	h := lab.Header{Src: tg.to.Addr(), Dst: to, Proto: tg.proto}
	return behind(unix.IPPROTO_HOPOPTS, 0, 0x9e, 4, 0, 0, 0, 0)(h, make([]byte, 900))[0]
}

// answered returns a packet with the metadata service as its source, to a closed port, or
// an echo request.
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

// whole is a packet in one piece.
func whole(h lab.Header, payload []byte) [][]byte { return [][]byte{h.Finished(payload)} }

// behind puts an extension header, given without its first byte, before the payload.
func behind(proto uint8, extension ...byte) func(lab.Header, []byte) [][]byte {
	return func(h lab.Header, payload []byte) [][]byte {
		payload = slices.Concat([]byte{h.Proto}, extension, payload)
		h.Proto = proto
		return [][]byte{h.Packet(payload)}
	}
}
