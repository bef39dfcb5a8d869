package explain

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// Numbers of protocols, from IANA's registry.
const (
	protoTCP     = 6
	protoUDP     = 17
	protoUDPLite = 136
)

// probe is the packet that the program judges.
type probe struct {
	etherType uint16
	packet    []byte // from the IP header on
	device    int    // by which it leaves
}

// newProbe makes the first packet to a destination, from addresses and ports that the policy
// does not mention.
func newProbe(p *policy.Policy, dst policy.Rule) (*probe, error) {
	addr := dst.Prefix.Addr()
	src, err := sourceFor(p, addr)
	if err != nil {
		return nil, err
	}
	transport, err := transportFor(p, dst)
	if err != nil {
		return nil, err
	}
	made := &probe{device: loopbackIndex}
	if !addr.IsLoopback() {
		if made.device, err = anyDevice(); err != nil {
			return nil, err
		}
	}
	if addr.Is4() {
		made.etherType, made.packet = 0x0800, ipv4(src, addr, dst.Proto, transport)
	} else {
		made.etherType, made.packet = 0x86dd, ipv6(src, addr, dst.Proto, transport)
	}
	return made, nil
}

const loopbackIndex = 1

// anyDevice returns a network device that is not the loopback. The program does not tell the
// others apart.
func anyDevice() (int, error) {
	all, err := net.Interfaces()
	if err != nil {
		return 0, fmt.Errorf("list network devices: %w", err)
	}
	for _, device := range all {
		if device.Index != loopbackIndex {
			return device.Index, nil
		}
	}
	return 0, errNoDevice
}

// sourceFor returns an address for documentation that no entry for a single address blocks: a
// packet from such an address would be blocked as well.
func sourceFor(p *policy.Policy, dst netip.Addr) (netip.Addr, error) {
	first := netip.MustParseAddr("192.0.2.1")
	if dst.Is6() {
		first = netip.MustParseAddr("2001:db8::1")
	}
	blocked := p.Blocked()
	for src, n := first, 0; n <= len(blocked); src, n = src.Next(), n+1 {
		if !slices.ContainsFunc(blocked, func(r policy.Rule) bool { return r.Prefix.IsSingleIP() && r.Prefix.Addr() == src }) {
			return src, nil
		}
	}
	return netip.Addr{}, errors.New("the policy blocks every address that the packet could come from")
}

// transportFor returns the header behind the IP header. Without a port in dst the port is 0,
// for which no entry of a policy can be.
func transportFor(p *policy.Policy, dst policy.Rule) ([]byte, error) {
	if !policy.HasPorts(dst.Proto) {
		return make([]byte, 8), nil
	}
	header := make([]byte, 8)
	if dst.Proto == protoTCP {
		header = make([]byte, 20)
		header[12] = 5 << 4 // words of the header
		const syn = 2
		header[13] = syn
	}
	// Nobody sends from a mail port, which would count as a forged answer.
	for port := 40000; port > 0; port-- {
		if !slices.Contains(p.SMTP.Ports, uint16(port)) {
			binary.BigEndian.PutUint16(header, uint16(port))
			binary.BigEndian.PutUint16(header[2:], dst.Port)
			if dst.Proto == protoUDP {
				binary.BigEndian.PutUint16(header[4:], uint16(len(header)))
			}
			return header, nil
		}
	}
	return nil, errors.New("every port that the packet could come from is a mail port")
}

func ipv4(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	const size = 20
	b := make([]byte, size, size+len(payload))
	b[0] = 4<<4 | size/4
	binary.BigEndian.PutUint16(b[2:], uint16(size+len(payload)))
	b[8], b[9] = 64, proto
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	return append(b, payload...)
}

func ipv6(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	const size = 40
	b := make([]byte, size, size+len(payload))
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b[6], b[7] = proto, 64
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	return append(b, payload...)
}
