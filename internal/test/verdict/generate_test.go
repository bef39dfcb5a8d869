package verdict

import (
	"net/netip"
	"slices"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// chooser returns a number from 0 to n-1.
type chooser func(n int) int

func (c chooser) once(in int) bool { return c(in) == in-1 }

func pick[T any](c chooser, list []T) T { return list[c(len(list))] }

// fromBytes takes the choices from data, and always the first choice when data is used up.
// Each change that a fuzzer makes then changes one decision about the packet.
func fromBytes(data []byte) chooser {
	next := func() (b byte) {
		if len(data) > 0 {
			b, data = data[0], data[1:]
		}
		return b
	}
	return func(n int) int {
		if n <= 256 {
			return int(next()) % n
		}
		return (int(next())<<8 | int(next())) % n
	}
}

// generator makes packets that test a policy: to and from the addresses and ports at which its
// rules begin and end, in all spellings. Most of them are nearly well-formed.
type generator struct {
	addresses4, addresses6 []netip.Addr
	ports                  []uint16
}

func newGenerator(p policy.Policy) *generator {
	g := &generator{
		addresses4: []netip.Addr{netip.MustParseAddr(open4), netip.MustParseAddr(metadata)},
		addresses6: []netip.Addr{netip.MustParseAddr(open6), netip.MustParseAddr("fd00:ec2::254")},
		ports:      []uint16{0, 1, 53, 80, 65535},
	}
	within := slices.Clone(p.SMTP.Exempt)
	for _, r := range slices.Concat(p.Blocked(), p.Allowed()) {
		within = append(within, r.Prefix)
		if r.Port != 0 {
			g.ports = append(g.ports, r.Port, r.Port-1, r.Port+1)
		}
	}
	for _, prefix := range within {
		last := lastOf(prefix)
		for _, a := range []netip.Addr{prefix.Addr(), last, prefix.Addr().Prev(), last.Next()} {
			switch {
			case a.Is4():
				g.addresses4 = append(g.addresses4, a)
				g.addresses6 = append(g.addresses6, spellings(a)[1:]...)
			case a.Is6():
				g.addresses6 = append(g.addresses6, a)
			}
		}
	}
	for _, port := range p.SMTP.Ports {
		g.ports = append(g.ports, port, port, port, port-1, port+1)
	}
	return g
}

// packet returns a packet from its IP header on, and its EtherType.
func (g *generator) packet(c chooser) (etherType uint16, bytes []byte) {
	p := packet{payload: g.segment(c)}
	addresses := g.addresses4
	minimum := 20
	if c.once(2) {
		addresses = g.addresses6
		minimum = 40
		for range max(0, c(15)-5) {
			p.payload = extend(c, p.payload)
		}
	} else {
		if c.once(8) {
			p.payload = authentication(4*(2+c(4)), p.payload)
		}
		if c.once(4) {
			p.options = options(c)
		}
		if c.once(8) {
			p.offset = offset(c)
		}
		p.flags = uint16(c(8))
	}
	p.dst = pick(c, addresses).String()
	if c.once(4) {
		p.src = pick(c, addresses).String()
	}
	if c.once(16) {
		p.length = c(64) - 32
	}
	if c.once(32) {
		p.addition = make([]byte, c(64))
	}
	if c.once(32) {
		p.first = new(uint8(c(256)))
	}
	bytes = p.bytes()
	if c.once(8) {
		for range 1 + c(4) {
			bytes[c(min(len(bytes), 256))] = uint8(c(256))
		}
	}
	if c.once(32) {
		bytes = bytes[:minimum+c(len(bytes)-minimum+1)]
	}
	if c.once(256) {
		return pick(c, []uint16{etherIPv4, etherIPv6, 0x0806, 0x8100, 0}), bytes
	}
	return p.etherType(), bytes
}

func (g *generator) segment(c chooser) segment {
	var s segment
	dport := pick(c, g.ports)
	switch c(8) {
	case 0, 1:
		s = tcp(dport, uint8(c(256)))
	case 2, 3:
		s = tcp(dport, syn)
	case 4:
		s = udp(dport)
	case 5:
		s = segment{pick(c, []uint8{protoSCTP, protoDCCP, protoUDPLite, protoICMP, protoICMPv6, protoGRE, protoNone}), tcp(dport, syn).data}
	case 6:
		s = segment{uint8(c(256)), tcp(dport, syn).data}
	case 7:
		return bare(uint8(c(256)), c(40))
	}
	if c.once(4) {
		s = s.from(pick(c, g.ports))
	}
	switch c(8) {
	case 0:
		s = s.grow(c(100))
	case 1:
		s = s.cut(c(len(s.data) + 1))
	}
	return s
}

// extend puts an IPv6 extension header before a segment. One in 32 states a wrong size.
func extend(c chooser, s segment) segment {
	switch c(10) {
	case 0:
		s = fragment(0, c.once(2), s)
	case 1:
		s = fragment(uint16(offset(c)), c.once(2), s)
	case 2:
		s = routing(uint8(max(0, c(8)-6)), s)
	case 3, 4:
		s = authentication(4*(2+c(8)), s)
	default:
		s = extension(pick(c, []uint8{protoHopOpts, protoDstOpts, protoMobility, protoHIP, protoShim6}), 8*(1+c(3)), s)
	}
	if c.once(32) && s.proto != protoFragment {
		s = s.edit(1, uint8(c(8)))
	}
	return s
}

func offset(c chooser) int {
	return pick(c, []int{8, 16, 24, 32, 1448, 65528})
}

func options(c chooser) []byte {
	var list []byte
	for range c(6) {
		switch c(6) {
		case 0:
			list = append(list, optNop)
		case 1:
			list = append(list, uint8(c(256)), uint8(c(12)), 0, 0)
		case 2:
			list = append(list, pick(c, []byte{optEnd, optLSRR, optSSRR}))
		default:
			size := 2 + c(6)
			list = append(list, pick(c, []byte{optRR, optTimestamp, optRouterAlert, 30, 130}), uint8(size))
			list = append(list, make([]byte, size-2)...)
		}
	}
	return list[:min(len(list), 40)]
}
