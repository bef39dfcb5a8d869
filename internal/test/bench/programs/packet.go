package programs

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	syn  = 0x02
	ack  = 0x10
	mail = 25
	web  = 443
)

// packet is a TCP packet, or a UDP datagram, from a container to dst.
type packet struct {
	dst   string
	port  uint16
	flags byte
	udp   bool
	size  int // from the IP header on
}

const ethernet = 14

// bytes returns it behind an Ethernet header, as BPF_PROG_TEST_RUN wants it.
func (p packet) bytes() []byte {
	proto := byte(unix.IPPROTO_TCP)
	if p.udp {
		proto = unix.IPPROTO_UDP
	}
	data := make([]byte, ethernet+p.size)
	ip := data[ethernet:]
	dst := netip.MustParseAddr(p.dst)
	transport := ip[20:]
	if dst.Is4() {
		binary.BigEndian.PutUint16(data[12:], unix.ETH_P_IP)
		ip[0] = 0x45
		binary.BigEndian.PutUint16(ip[2:], uint16(p.size))
		ip[8], ip[9] = 64, proto
		copy(ip[12:], netip.MustParseAddr("172.17.0.2").AsSlice())
		copy(ip[16:], dst.AsSlice())
	} else {
		binary.BigEndian.PutUint16(data[12:], unix.ETH_P_IPV6)
		ip[0] = 0x60
		binary.BigEndian.PutUint16(ip[4:], uint16(p.size-40))
		ip[6], ip[7] = proto, 64
		copy(ip[8:], netip.MustParseAddr("fd4d:1::2").AsSlice())
		copy(ip[24:], dst.AsSlice())
		transport = ip[40:]
	}
	binary.BigEndian.PutUint16(transport[0:], 40000)
	binary.BigEndian.PutUint16(transport[2:], p.port)
	if p.udp {
		binary.BigEndian.PutUint16(transport[4:], uint16(len(transport)))
	} else {
		transport[12], transport[13] = 5<<4, p.flags
	}
	return data
}

// The packets that are measured, by what is special in them.
var (
	tcp4      = packet{dst: "198.51.100.1", port: web, flags: ack, size: 64}
	tcp6      = packet{dst: "2620::1", port: web, flags: ack, size: 80}
	tcp4Large = packet{dst: "198.51.100.1", port: web, flags: ack, size: 1500}
	tcp6Large = packet{dst: "2620::1", port: web, flags: ack, size: 1500}
	udp4      = packet{dst: "198.51.100.1", port: web, udp: true, size: 64}
	udp6      = packet{dst: "2620::1", port: web, udp: true, size: 80}
	syn4      = packet{dst: "198.51.100.1", port: web, flags: syn, size: 60}
	syn6      = packet{dst: "2620::1", port: web, flags: syn, size: 80}
	mail4     = packet{dst: "198.51.100.1", port: mail, flags: syn, size: 60}
	mail6     = packet{dst: "2620::1", port: mail, flags: syn, size: 80}
	metadata4 = packet{dst: "169.254.169.254", port: 80, flags: syn, size: 60}
	metadata6 = packet{dst: "fd00:ec2::254", port: 80, flags: syn, size: 80}
)
