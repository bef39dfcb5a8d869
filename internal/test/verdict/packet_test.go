package verdict

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
)

// Numbers of protocols and extension headers, from IANA's registry.
const (
	protoHopOpts  = 0
	protoICMP     = 1
	protoIPv4     = 4
	protoTCP      = 6
	protoUDP      = 17
	protoDCCP     = 33
	protoIPv6     = 41
	protoRouting  = 43
	protoFragment = 44
	protoGRE      = 47
	protoESP      = 50
	protoAH       = 51
	protoICMPv6   = 58
	protoNone     = 59
	protoDstOpts  = 60
	protoEtherIP  = 97
	protoIPComp   = 108
	protoL2TP     = 115
	protoSCTP     = 132
	protoMobility = 135
	protoUDPLite  = 136
	protoMPLS     = 137
	protoHIP      = 139
	protoShim6    = 140
	protoEthernet = 143
	protoTest     = 253 // for experiments, RFC 3692
)

// TCP flags.
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
	urg
	ece
	cwr
)

// segment is what follows a header, with its protocol number.
type segment struct {
	proto uint8
	data  []byte
}

func bare(proto uint8, size int) segment { return segment{proto, make([]byte, size)} }

// withPorts returns a header of size bytes, from port 40000.
func withPorts(proto uint8, dport uint16, size int) segment {
	s := bare(proto, size)
	binary.BigEndian.PutUint16(s.data[2:], dport)
	return s.from(40000)
}

func tcp(dport uint16, flags uint8) segment {
	s := withPorts(protoTCP, dport, 20)
	s.data[13] = flags
	return s.doff(5)
}

func udp(dport uint16) segment { return withPorts(protoUDP, dport, 8) }

func icmp() segment { return bare(protoICMP, 8) }

func (s segment) edit(offset int, data ...byte) segment {
	s.data = slices.Clone(s.data)
	copy(s.data[offset:], data)
	return s
}

func (s segment) from(sport uint16) segment {
	return s.edit(0, byte(sport>>8), byte(sport))
}

func (s segment) doff(words uint8) segment { return s.edit(12, words<<4) }

// grow appends n bytes; cut keeps the first n.
func (s segment) grow(n int) segment {
	return segment{s.proto, append(slices.Clone(s.data), make([]byte, n)...)}
}
func (s segment) cut(n int) segment { return segment{s.proto, s.data[:n]} }

// extension puts an IPv6 extension header of size bytes, a multiple of 8, before
// a segment.
func extension(proto uint8, size int, s segment) segment {
	header := bare(proto, size).edit(0, s.proto, byte(size/8-1))
	header.data = append(header.data, s.data...)
	return header
}

func hopOpts(s segment) segment { return extension(protoHopOpts, 8, s) }
func dstOpts(s segment) segment { return extension(protoDstOpts, 8, s) }

// routing has type 253, which is for experiments.
func routing(left uint8, s segment) segment {
	return extension(protoRouting, 8, s).edit(2, 253, left)
}

// fragment takes an offset in bytes, a multiple of 8.
func fragment(offset uint16, more bool, s segment) segment {
	if more {
		offset |= 1
	}
	return extension(protoFragment, 8, s).edit(1, 0, byte(offset>>8), byte(offset))
}

// authentication is an AH, on IPv4 too, of size bytes, a multiple of 4.
func authentication(size int, s segment) segment {
	header := bare(protoAH, size).edit(0, s.proto, byte(size/4-2))
	header.data = append(header.data, s.data...)
	return header
}

// chain puts n destination options headers before a segment.
func chain(n int, s segment) segment {
	for range n {
		s = dstOpts(s)
	}
	return s
}

// packet is an IPv4 or IPv6 packet, depending on the spelling of dst; ::ffff:192.0.2.1 makes it
// IPv6. Fields that are not given have the values that a well-behaved sender sets.
type packet struct {
	src, dst string
	payload  segment

	link     *uint16 // type of the frame
	first    *uint8  // byte: version and, on IPv4, words of the header
	length   int     // added to the true value of the length field
	flags    uint16  // IPv4: evil 4, DF 2, MF 1
	offset   int     // IPv4: of a fragment, in bytes
	options  []byte  // IPv4, filled up with EOL
	addition []byte  // behind what the length field tells
}

func (p packet) v6() bool { return strings.Contains(p.dst, ":") }

func (p packet) etherType() uint16 {
	switch {
	case p.link != nil:
		return *p.link
	case p.v6():
		return etherIPv6
	}
	return etherIPv4
}

// bytes returns the packet from its IP header on.
func (p packet) bytes() []byte {
	if p.v6() {
		return append(p.header6(), append(p.payload.data, p.addition...)...)
	}
	return append(p.header4(), append(p.payload.data, p.addition...)...)
}

func (p packet) header4() []byte {
	size := 20 + (len(p.options)+3)/4*4
	b := make([]byte, size)
	b[0] = 4<<4 | uint8(size/4)
	if p.first != nil {
		b[0] = *p.first
	}
	binary.BigEndian.PutUint16(b[2:], uint16(size+len(p.payload.data)+p.length))
	binary.BigEndian.PutUint16(b[6:], p.flags<<13|uint16(p.offset/8))
	b[8] = 64
	b[9] = p.payload.proto
	copy(b[12:], netip.MustParseAddr(cmp.Or(p.src, "192.0.2.1")).AsSlice())
	copy(b[16:], netip.MustParseAddr(p.dst).AsSlice())
	copy(b[20:], p.options)
	return b
}

func (p packet) header6() []byte {
	b := make([]byte, 40)
	b[0] = 6 << 4
	if p.first != nil {
		b[0] = *p.first
	}
	binary.BigEndian.PutUint16(b[4:], uint16(len(p.payload.data)+p.length))
	b[6] = p.payload.proto
	b[7] = 64
	copy(b[8:], netip.MustParseAddr(cmp.Or(p.src, "2001:db8::1")).AsSlice())
	copy(b[24:], netip.MustParseAddr(p.dst).AsSlice())
	return b
}
