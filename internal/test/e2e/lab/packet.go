package lab

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// Header is an IP header for a payload. The kernel fills in the IPv4 checksum; nobody on
// the way checks the checksum of the transport header.
type Header struct {
	Src, Dst netip.Addr
	Proto    uint8
	ID       uint16
	Options  []byte // IPv4, a multiple of four bytes
	Offset   int    // of a fragment: a multiple of eight bytes
	More     bool   // fragments follow
}

// Packet returns an IPv4 or IPv6 packet. A fragment of IPv6 gets a fragment header.
func (h Header) Packet(payload []byte) []byte {
	frag := uint16(h.Offset)
	if h.Dst.Is4() {
		frag /= 8
		if h.More {
			frag |= 0x2000
		}
		b := make([]byte, 20, 20+len(h.Options)+len(payload))
		b[0] = 0x45 + byte(len(h.Options)/4)
		binary.BigEndian.PutUint16(b[2:], uint16(cap(b)))
		binary.BigEndian.PutUint16(b[4:], h.ID)
		binary.BigEndian.PutUint16(b[6:], frag)
		b[8], b[9] = 64, h.Proto
		copy(b[12:], h.Src.AsSlice())
		copy(b[16:], h.Dst.AsSlice())
		return slices.Concat(b, h.Options, payload)
	}
	next := h.Proto
	if h.Offset > 0 || h.More {
		if h.More {
			frag |= 1
		}
		payload = append(binary.BigEndian.AppendUint32([]byte{next, 0, byte(frag >> 8), byte(frag)}, uint32(h.ID)), payload...)
		next = 44
	}
	b := make([]byte, 40)
	b[0] = 0x60
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b[6], b[7] = next, 64
	copy(b[8:], h.Src.AsSlice())
	copy(b[24:], h.Dst.AsSlice())
	return append(b, payload...)
}

// TCP returns a TCP header.
func TCP(sport, dport uint16, seq uint32, flags uint8) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, sport)
	binary.BigEndian.PutUint16(b[2:], dport)
	binary.BigEndian.PutUint32(b[4:], seq)
	b[12], b[13] = 5<<4, flags
	b[14] = 0xff
	return b
}

// UDP returns a UDP datagram with a payload of n bytes.
func UDP(sport, dport uint16, n int) []byte {
	b := make([]byte, 8+n)
	binary.BigEndian.PutUint16(b, sport)
	binary.BigEndian.PutUint16(b[2:], dport)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	return b
}

// Echo returns an ICMP echo request, whose checksum is right for zero bytes.
func Echo(v6 bool) []byte {
	if v6 {
		return []byte{128, 0, 0, 0, 0, 1, 0, 1} // the kernel fills in the checksum
	}
	return []byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1}
}
