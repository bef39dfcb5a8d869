package verdict

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// model says in plain Go what the documentation says happens to a packet. It shares neither
// code nor structure with the programs: it walks the lists, and panics to give up on a
// packet.
type model struct {
	blocked, single, allowed []policy.Rule
	smtp                     policy.SMTP
}

func newModel(p policy.Policy) *model {
	m := &model{blocked: p.Blocked(), allowed: p.Allowed(), smtp: p.SMTP}
	for _, r := range m.blocked {
		if r.Prefix.IsSingleIP() {
			m.single = append(m.single, r)
		}
	}
	return m
}

// judge returns the verdict on a packet. Admitted stands for mail that takes a
// token, if there is one.
func (m *model) judge(etherType uint16, packet []byte, device int) verdict {
	h, readable := read(etherType, packet)
	switch {
	case !readable:
		return malformed
	case listed(m.allowed, h.dst, h.proto, h.dport):
	case listed(m.blocked, h.dst, h.proto, h.dport), listed(m.single, h.src, h.proto, h.sport),
		m.perhaps(m.blocked, h.dst, h.proto, h.dport), m.perhaps(m.single, h.src, h.proto, h.sport):
		return blocked
	}
	// Packets that a tunnel of the host would take for somebody else's, and packets that a TCP
	// socket would take for a mail server's.
	if device == loopback && slices.Contains(tunnelProtocols, h.proto) {
		return blocked
	}
	if h.proto == protoTCP && h.sport >= 0 && slices.Contains(m.smtp.Ports, uint16(h.sport)) && !m.smtp.Rate.Unlimited() {
		return rateLimited
	}
	mail := h.proto == protoTCP && h.dport >= 0 && slices.Contains(m.smtp.Ports, uint16(h.dport))
	switch {
	case !mail || device == loopback || m.exempt(h.dst):
		return pass
	case h.flags&syn != 0 && h.flags&ack == 0:
		return admitted
	case m.smtp.Rate.Unlimited():
		return unlimited
	}
	return rateLimited // no TCP socket sends it
}

var tunnelProtocols = []uint8{protoIPv4, protoIPv6, protoGRE, protoEtherIP, protoIPComp, protoL2TP, protoMPLS, protoEthernet}

func (m *model) exempt(a netip.Addr) bool {
	return slices.ContainsFunc(m.smtp.Exempt, func(p netip.Prefix) bool { return covers(p, a) })
}

// listed says whether any rule holds for an address, a protocol and a port. The port is below 0
// if it is not known or does not exist.
func listed(list []policy.Rule, a netip.Addr, proto uint8, port int) bool {
	return slices.ContainsFunc(list, func(r policy.Rule) bool {
		return covers(r.Prefix, a) && (r.Proto == 0 || r.Proto == proto) && (r.Port == 0 || int(r.Port) == port)
	})
}

var (
	nat64      = netip.MustParsePrefix("64:ff9b::/96")
	localNAT64 = netip.MustParsePrefix("64:ff9b:1::/48")
	compatible = netip.MustParsePrefix("::/96")
	sixToFour  = netip.MustParsePrefix("2002::/16")
)

// covers looks at each meaning of an address: a v4-mapped address is only the IPv4 address; an
// address that embeds an IPv4 address is both.
func covers(p netip.Prefix, a netip.Addr) bool {
	b := a.As16()
	switch {
	case nat64.Contains(a), compatible.Contains(a) && b[12] != 0:
		if p.Contains(netip.AddrFrom4([4]byte(b[12:]))) {
			return true
		}
	case sixToFour.Contains(a):
		if p.Contains(netip.AddrFrom4([4]byte(b[2:]))) {
			return true
		}
	}
	return p.Contains(a.Unmap())
}

// perhaps says whether a list has an IPv4 address that an address may stand for, read with
// one of the lengths that a local NAT64 prefix can have (RFC 6052, 2.2), unless that is
// allowed.
func (m *model) perhaps(list []policy.Rule, a netip.Addr, proto uint8, port int) bool {
	if !localNAT64.Contains(a) {
		return false
	}
	b := a.As16()
	for _, bits := range []int{48, 56, 64, 96} {
		var embedded []byte
		for i := bits / 8; len(embedded) < 4; i++ {
			if i != 8 { // bits 64 to 71 are zero
				embedded = append(embedded, b[i])
			}
		}
		v4 := netip.AddrFrom4([4]byte(embedded))
		if embedded[0] != 0 && embedded[3] != 0 && listed(list, v4, proto, port) && !listed(m.allowed, v4, proto, port) {
			return true
		}
	}
	return false
}

// headers holds what a packet says about itself.
type headers struct {
	src, dst     netip.Addr
	proto        uint8
	sport, dport int // -1: none
	flags        uint8
	data         bool // of TCP: there is some behind its header
}

var errUnreadable = errors.New("cannot be judged")

func must(condition bool) {
	if !condition {
		panic(errUnreadable)
	}
}

// reader holds what is left of a packet.
type reader []byte

func (r *reader) take(n int) []byte {
	must(n <= len(*r))
	taken := (*r)[:n]
	*r = (*r)[n:]
	return taken
}

// read returns the headers; false if the packet cannot be judged or does not say where it
// really goes.
func read(etherType uint16, packet []byte) (h headers, ok bool) {
	defer func() {
		if err := recover(); err != nil && err != errUnreadable {
			panic(err)
		}
	}()
	h = headers{sport: -1, dport: -1}
	rest := reader(packet)
	position := 0 // of the rest in the packet that this is a fragment of
	var extensions []uint8
	switch etherType {
	case etherIPv4:
		position = h.readIPv4(&rest)
		extensions = []uint8{protoAH}
	case etherIPv6:
		h.readIPv6(&rest)
		extensions = []uint8{protoHopOpts, protoRouting, protoFragment, protoAH, protoDstOpts, protoMobility, protoHIP, protoShim6}
	default:
		return h, false
	}

	for n := 0; position == 0 && slices.Contains(extensions, h.proto); n++ {
		must(n < 8)
		position = h.readExtension(&rest)
	}
	if position == 0 {
		h.readTransport(&rest)
		return h, true
	}
	// A later fragment must not overwrite the bytes by which the first was judged.
	must(!slices.Contains(extensions, h.proto))
	must(h.proto != protoTCP || position >= 20)
	return h, true
}

func (h *headers) readIPv4(rest *reader) (position int) {
	size := len(*rest)
	ip := rest.take(20)
	words := int(ip[0] & 15)
	must(ip[0]>>4 == 4 && words >= 5)
	must(int(binary.BigEndian.Uint16(ip[2:])) == size)
	options := reader(rest.take(words*4 - 20))
	for len(options) > 0 {
		kind := options.take(1)[0]
		must(kind != optLSRR && kind != optSSRR)
		if kind == optEnd {
			break
		}
		if kind != optNop {
			size := int(options.take(1)[0])
			must(size >= 2)
			options.take(size - 2)
		}
	}
	h.src, h.dst = netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:]))
	h.proto = ip[9]
	return int(binary.BigEndian.Uint16(ip[6:])) % 8192 * 8
}

func (h *headers) readIPv6(rest *reader) {
	ip := rest.take(40)
	must(ip[0]>>4 == 6)
	must(int(binary.BigEndian.Uint16(ip[4:])) == len(*rest))
	h.src, h.dst = netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:]))
	h.proto = ip[6]
}

func (h *headers) readExtension(rest *reader) (position int) {
	fixed := rest.take(8)
	more := int(fixed[1])
	switch h.proto {
	case protoFragment:
		position = int(binary.BigEndian.Uint16(fixed[2:])) / 8 * 8
	case protoAH:
		rest.take(more * 4)
	case protoRouting:
		must(fixed[3] == 0)
		fallthrough
	default:
		rest.take(more * 8)
	}
	h.proto = fixed[0]
	return position
}

func (h *headers) readTransport(rest *reader) {
	var t []byte
	switch size := len(*rest); h.proto {
	case protoTCP:
		t = rest.take(20)
		h.flags = t[13]
		h.data = int(t[12]>>4*4) < size
	case protoUDP, protoUDPLite, protoSCTP, protoDCCP:
		t = rest.take(8)
	default:
		return
	}
	h.sport, h.dport = int(binary.BigEndian.Uint16(t)), int(binary.BigEndian.Uint16(t[2:]))
}
