package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Packet is an IP packet that was captured.
type Packet struct {
	Src, Dst netip.AddrPort // with ports where the packet has them
	Proto    uint8          // behind IPv6 extension headers
	Fragment bool
	Offset   int   // of a fragment, in bytes
	Flags    uint8 // of TCP
	Seq, Ack uint32
	Len      int // from the IP header on
	payload  string
}

// SYN says whether the packet opens a TCP connection to a port.
func (p Packet) SYN(port uint16) bool {
	return p.Proto == unix.IPPROTO_TCP && p.Flags&(tcpSYN|tcpACK) == tcpSYN && p.Dst.Port() == port
}

func (p Packet) String() string {
	s := fmt.Sprintf("%s > %s proto %d len %d", p.Src, p.Dst, p.Proto, p.Len)
	if p.Proto == unix.IPPROTO_TCP {
		s += fmt.Sprintf(" flags %#x seq %d", p.Flags, p.Seq)
	}
	if p.Fragment {
		s += fmt.Sprintf(" fragment at %d", p.Offset)
	}
	return s
}

// Capture sees every IP packet that a device receives, whatever happens to it afterwards.
type Capture struct {
	net  *Network
	file *os.File

	mu      sync.Mutex
	changed *sync.Cond
	packets []Packet
	last    map[string]bool // sentinels
	err     error
}

// Capture captures what reaches the server until the test ends.
func (n *Network) Capture(t testing.TB) *Capture {
	t.Helper()
	return n.capture(t, n.Server, "eth0")
}

// CaptureBridge captures what the host receives from containers, but not what containers
// send to each other.
func (n *Network) CaptureBridge(t testing.TB) *Capture {
	t.Helper()
	return n.capture(t, n.Host, "br0")
}

// CaptureAnswers captures what the host receives from the server. Settle does not work there.
func (n *Network) CaptureAnswers(t testing.TB) *Capture {
	t.Helper()
	return n.capture(t, n.Host, "server")
}

func (n *Network) capture(t testing.TB, ns *Netns, device string) *Capture {
	t.Helper()
	c := &Capture{net: n, last: map[string]bool{}}
	c.changed = sync.NewCond(&c.mu)
	var fd int
	var err error
	ns.Do(func() { fd, err = packetSocket(device) })
	if err != nil {
		t.Fatalf("capture: %v", err)
	}
	c.file = os.NewFile(uintptr(fd), "capture")
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.read()
	}()
	t.Cleanup(func() {
		c.file.Close()
		<-done
	})
	return c
}

func packetSocket(device string) (int, error) {
	// With no protocol, nothing comes in before bind.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	var req *unix.Ifreq
	if req, err = unix.NewIfreq(device); err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20)
	}
	if err == nil {
		all := uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8)
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: int(req.Uint32())})
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (c *Capture) read() {
	buf := make([]byte, 1<<17)
	for {
		n, err := c.file.Read(buf)
		c.mu.Lock()
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				c.err = err
			}
			c.changed.Broadcast()
			c.mu.Unlock()
			return
		}
		if p, ok := parse(buf[:n]); ok {
			if strings.HasPrefix(p.payload, sentinel) {
				c.last[p.payload] = true
			} else {
				c.packets = append(c.packets, p)
			}
			c.changed.Broadcast()
		}
		c.mu.Unlock()
	}
}

// parse reads a frame as far as it makes sense. It returns false for packets that the
// namespaces' kernels send on their own.
func parse(frame []byte) (Packet, bool) {
	if len(frame) < 14 {
		return Packet{}, false
	}
	etherType, b := binary.BigEndian.Uint16(frame[12:]), frame[14:]
	for (etherType == unix.ETH_P_8021Q || etherType == unix.ETH_P_8021AD) && len(b) >= 4 {
		etherType, b = binary.BigEndian.Uint16(b[2:]), b[4:]
	}
	p := Packet{Len: len(b)}
	var src, dst netip.Addr
	switch {
	case etherType == unix.ETH_P_IP && len(b) >= 20:
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		p.Proto = b[9]
		frag := binary.BigEndian.Uint16(b[6:])
		p.Offset = int(frag&0x1fff) * 8
		p.Fragment = p.Offset > 0 || frag&0x2000 != 0
		b = b[min(int(b[0]&15)*4, len(b)):]
	case etherType == unix.ETH_P_IPV6 && len(b) >= 40:
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		p.Proto = b[6]
		b = b[40:]
		for len(b) >= 8 && p.Offset == 0 {
			switch p.Proto {
			case unix.IPPROTO_FRAGMENT:
				frag := binary.BigEndian.Uint16(b[2:])
				p.Fragment, p.Offset = true, int(frag&0xfff8)
				p.Proto, b = b[0], b[8:]
				continue
			case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
				p.Proto, b = b[0], b[min((int(b[1])+1)*8, len(b)):]
				continue
			}
			break
		}
		// Neighbour, router and group discovery.
		if p.Proto == unix.IPPROTO_ICMPV6 && len(b) > 0 && b[0] >= 130 && b[0] <= 143 {
			return p, false
		}
	default:
		return p, etherType == unix.ETH_P_IP || etherType == unix.ETH_P_IPV6
	}
	var ports [2]uint16
	if p.Offset == 0 && len(b) >= 8 && (p.Proto == unix.IPPROTO_TCP || p.Proto == unix.IPPROTO_UDP || p.Proto == unix.IPPROTO_UDPLITE) {
		ports = [2]uint16{binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])}
		if p.Proto == unix.IPPROTO_UDP {
			p.payload = string(b[8:min(len(b), 64)])
		} else if len(b) >= 14 {
			p.Seq, p.Ack, p.Flags = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:]), b[13]
		}
	}
	p.Src, p.Dst = netip.AddrPortFrom(src, ports[0]), netip.AddrPortFrom(dst, ports[1])
	return p, true
}

const sentinel = "lab sentinel "

// Settle returns every captured packet. These include all packets that had been sent when
// it was called and that arrive without being repeated: Settle sends a sentinel from each
// CPU, on the path of the containers' packets, which arrives after them.
func (c *Capture) Settle(t testing.TB) []Packet {
	t.Helper()
	texts, err := c.net.sendSentinels()
	if err != nil {
		t.Fatalf("send a sentinel: %v", err)
	}
	c.await(t, "sentinels", func() bool {
		for _, text := range texts {
			if !c.last[text] {
				return false
			}
		}
		return true
	})
	var stats *unix.TpacketStats
	raw, err := c.file.SyscallConn()
	if err == nil {
		ctlErr := raw.Control(func(fd uintptr) {
			stats, err = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
		})
		err = errors.Join(err, ctlErr)
	}
	if err != nil {
		t.Fatalf("capture: %v", err)
	}
	if stats.Drops > 0 {
		t.Fatalf("capture missed %d packets", stats.Drops)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Packet(nil), c.packets...)
}

// Packets returns the packets that were captured so far.
func (c *Capture) Packets() []Packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Packet(nil), c.packets...)
}

// Forget drops the packets that were captured so far.
func (c *Capture) Forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.packets = nil
}

// Await waits until the wanted number of matching packets has arrived.
func (c *Capture) Await(t testing.TB, wanted int, what string, match func(Packet) bool) {
	t.Helper()
	c.await(t, fmt.Sprint(wanted, " ", what), func() bool { return Count(c.packets, match) >= wanted })
}

// Count returns how many packets match.
func Count(packets []Packet, match func(Packet) bool) int {
	n := 0
	for _, p := range packets {
		if match(p) {
			n++
		}
	}
	return n
}

// await waits until ok, which is called with the lock held.
func (c *Capture) await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	late := false
	timer := time.AfterFunc(patience, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		late = true
		c.changed.Broadcast()
	})
	defer timer.Stop()
	for !ok() {
		if late || c.err != nil {
			t.Fatalf("%s did not arrive in %v (%v); what did: %v", what, patience, c.err, c.packets)
		}
		c.changed.Wait()
	}
}

func (n *Network) sendSentinels() (texts []string, err error) {
	n.probe.Do(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var all, one unix.CPUSet
		if err = unix.SchedGetaffinity(0, &all); err != nil {
			return
		}
		defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &all)) }()
		var fd int
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		defer unix.Close(fd)
		for cpu := 0; all.Count() > len(texts) && err == nil; cpu++ {
			if !all.IsSet(cpu) {
				continue
			}
			one.Zero()
			one.Set(cpu)
			if err = unix.SchedSetaffinity(0, &one); err == nil {
				text := fmt.Sprint(sentinel, n.sentinels.Add(1))
				texts = append(texts, text)
				err = unix.Sendto(fd, []byte(text), 0, &unix.SockaddrInet4{Port: 9, Addr: serverEnd[0].As4()})
			}
		}
	})
	return texts, err
}
