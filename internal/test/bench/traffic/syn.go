package traffic

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
)

// SYNs sends TCP packets that open connections, one after the other, through a raw socket.
// Each has a sequence number of its own, and a port that comes again after many others.
type SYNs struct {
	fd     int
	packet []byte
	to     address
	n      uint32
	// sender is the number of this sender, which decides on its ports.
	sender uint32
	sum    uint32
}

// senders is how many senders there may be.
const senders = 2

// NewSYNs makes a socket in a network namespace. Its cgroup is that of this process.
func NewSYNs(from *lab.Netns, src, dst netip.Addr, port, sender uint16) (*SYNs, error) {
	s := &SYNs{to: newAddress(dst, 0), sender: uint32(sender)}
	err := from.Do(func() (err error) {
		// With its own IP header.
		s.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	if err != nil {
		return nil, err
	}
	const size = 40
	p := make([]byte, size)
	p[0] = 0x45
	binary.BigEndian.PutUint16(p[2:], size)
	p[8], p[9] = 64, unix.IPPROTO_TCP
	copy(p[12:], src.AsSlice())
	copy(p[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(p[22:], port)
	p[32], p[33] = 5<<4, 0x02
	binary.BigEndian.PutUint16(p[34:], 64240)
	// What of the pseudo header and the packet does not change.
	for i := 12; i < size; i += 2 {
		s.sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	s.sum += unix.IPPROTO_TCP + size - 20
	s.packet = p
	return s, nil
}

// Send sends the next one. An error EPERM means that a program refused it.
func (s *SYNs) Send() error {
	const first, ports = 1024, 64000
	port := uint16(first + (s.n*senders+s.sender)%ports)
	seq := s.n * 7919
	s.n++
	binary.BigEndian.PutUint16(s.packet[20:], port)
	binary.BigEndian.PutUint32(s.packet[24:], seq)
	sum := s.sum + uint32(port) + seq>>16 + seq&0xffff
	sum = sum>>16 + sum&0xffff
	sum += sum >> 16
	binary.BigEndian.PutUint16(s.packet[36:], ^uint16(sum))
	return sendTo(s.fd, s.packet, s.to)
}
