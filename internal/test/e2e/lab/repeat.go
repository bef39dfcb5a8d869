package lab

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Deafness is how a socket is kept from hearing that the server has ended its connection,
// so that it repeats its first data.
type Deafness string

const (
	// DeafByHops needs no capability: the socket drops packets that came through a router
	// (IP_MINTTL).
	DeafByHops Deafness = "IP_MINTTL"
	// DeafByDevice needs CAP_NET_RAW: while the socket is bound to another device, the
	// container's own kernel resets the connection.
	DeafByDevice Deafness = "SO_BINDTODEVICE"
	// DeafFromSYN is the same for a connection whose SYN has data (TCP fast open).
	DeafFromSYN Deafness = "SO_BINDTODEVICE after fast open"
)

// Repeats are connections of sockets that each send some data and then go deaf. They need a
// network with a round-trip time (Slow).
type Repeats struct {
	Own, To netip.AddrPort // Own is the first's; the others have the next ports
	Sockets int
	By      Deafness
	For     time.Duration
}

const hello = "EHLO x\r\nMAIL FROM:<a@b>\r\n"

// Repeat lets a container make such connections, and waits while they repeat.
func (a *Agent) Repeat(r Repeats) {
	a.t.Helper()
	var errs []string
	a.call("Repeat", r, &errs)
	for _, err := range errs {
		a.t.Error(err)
	}
}

// Repeat is [Agent.Repeat].
func (m *Remote) Repeat(r Repeats, errs *[]string) error {
	var all sync.WaitGroup
	var mu sync.Mutex
	for i := range r.Sockets {
		all.Go(func() {
			if err := r.one(netip.AddrPortFrom(r.Own.Addr(), r.Own.Port()+uint16(i))); err != nil {
				mu.Lock()
				defer mu.Unlock()
				*errs = append(*errs, err.Error())
			}
		})
	}
	all.Wait()
	return nil
}

func (r *Repeats) one(own netip.AddrPort) error {
	caps := uint32(0)
	if r.By != DeafByHops {
		caps = 1 << unix.CAP_NET_RAW
	}
	if err := keepOnly(caps); err != nil {
		return err
	}
	w := &walker{own: own, raw: -1}
	var err error
	if w.fd, err = unix.Socket(w.family(), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	defer w.close()
	_ = unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	_ = unix.SetsockoptInt(w.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	// Only newer kernels can be made to repeat sooner.
	const tcpRTOMaxMS = 44
	_ = unix.SetsockoptInt(w.fd, unix.IPPROTO_TCP, tcpRTOMaxMS, 1000)
	if err := unix.Bind(w.fd, sockaddr(w.family(), own)); err != nil {
		return fmt.Errorf("bind to %s: %w", own, err)
	}
	if r.By == DeafFromSYN {
		return r.fast(w)
	}
	if err := w.connect(r.To); err != nil {
		return err
	}
	if !w.connected(900 * time.Millisecond) {
		return nil // refused, or a token too late
	}
	if r.By == DeafByHops {
		if err := w.listenNoFurther(); err != nil {
			return err
		}
	}
	if _, err := unix.Write(w.fd, []byte(hello)); err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	for end := time.Now().Add(r.For); time.Now().Before(end); {
		if r.By == DeafByHops {
			time.Sleep(time.Until(end))
			continue
		}
		if err := unix.BindToDevice(w.fd, "lo"); err != nil {
			return err
		}
		time.Sleep(140 * time.Millisecond) // what the server says meanwhile is reset
		if err := unix.BindToDevice(w.fd, ""); err != nil {
			return err
		}
		before := w.repeated()
		for w.repeated() == before && time.Now().Before(end) {
			time.Sleep(200 * time.Microsecond)
		}
	}
	return nil
}

// fast sends data with the SYN, and lets the kernel reset the server's answer.
func (r *Repeats) fast(w *walker) error {
	_ = unix.Sendto(w.fd, []byte(hello), unix.MSG_FASTOPEN|unix.MSG_NOSIGNAL, sockaddr(w.family(), r.To))
	if err := unix.BindToDevice(w.fd, "lo"); err != nil {
		return err
	}
	time.Sleep(200 * time.Millisecond)
	if err := unix.BindToDevice(w.fd, ""); err != nil {
		return err
	}
	w.connected(r.For)
	return nil
}

// repeated returns how many segments the kernel has repeated.
func (w *walker) repeated() uint32 {
	info, err := unix.GetsockoptTCPInfo(w.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0
	}
	return info.Total_retrans
}

// listenNoFurther makes the socket drop packets that came through a router.
func (w *walker) listenNoFurther() error {
	if w.own.Addr().Is4() {
		return unix.SetsockoptInt(w.fd, unix.IPPROTO_IP, unix.IP_MINTTL, 255)
	}
	return unix.SetsockoptInt(w.fd, unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT, 255)
}

// keepOnly drops all other capabilities of the thread, which ends with its goroutine.
func keepOnly(caps uint32) error {
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{{Effective: caps, Permitted: caps}}
	return unix.Capset(&header, &data[0])
}

// Injection is TCP that a container sends as another protocol (Disguise). A rule of the
// container's own firewall, which needs CAP_NET_ADMIN, turns it into TCP behind the filter.
type Injection string

const (
	// InjectOverlapping begins a connection, again and again, with a segment that starts
	// before the connection's first sequence number.
	InjectOverlapping Injection = "overlapping"
	// InjectAcknowledgements acknowledges more and more and, in between, sends
	// acknowledgements that open a connection at a server with SYN cookies.
	InjectAcknowledgements Injection = "acknowledgements"
)

// Disguise is the protocol as which injected TCP is sent.
const Disguise = 253

// Inject lets a container send a number of rounds of an injection.
func (a *Agent) Inject(how Injection, own, to netip.AddrPort, rounds int) {
	a.t.Helper()
	a.call("Inject", InjectArgs{how, own, to, rounds}, &Result{})
}

// InjectArgs are the arguments of [Agent.Inject].
type InjectArgs struct {
	How     Injection
	Own, To netip.AddrPort
	Rounds  int
}

// Inject is [Agent.Inject].
func (m *Remote) Inject(r InjectArgs, _ *Result) error {
	family := Family(r.To.Addr())
	raw, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(raw)
	w := &walker{own: r.Own}
	seen, err := w.sniff()
	if err != nil {
		return err
	}
	defer unix.Close(seen)
	patience := unix.NsecToTimeval(int64(time.Second))
	_ = unix.SetsockoptTimeval(seen, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience)
	var sendErr error
	send := func(seq, ack uint32, flags uint8, data string) {
		tcp := TCP(r.Own.Port(), r.To.Port(), seq, flags)
		binary.BigEndian.PutUint32(tcp[8:], ack)
		p := Header{Src: r.Own.Addr(), Dst: r.To.Addr(), Proto: unix.IPPROTO_TCP}.Finished(append(tcp, data...))
		if family == unix.AF_INET {
			p[9] = Disguise
		} else {
			p[6] = Disguise
		}
		if err := unix.Sendto(raw, p, 0, sockaddr(family, netip.AddrPortFrom(r.To.Addr(), 0))); err != nil {
			sendErr = err
		}
		time.Sleep(5 * time.Millisecond)
	}
	const number, first = 1000, 1001
	// begin sends a SYN and returns the acknowledgement of the answer; false if there is no
	// answer.
	begin := func() (uint32, bool) {
		send(number, 0, tcpSYN, "")
		answer, err := w.await(seen, r.To, tcpSYN|tcpACK)
		if err != nil {
			return 0, false
		}
		return binary.BigEndian.Uint32(answer[4:]) + 1, true
	}
	switch r.How {
	case InjectOverlapping:
		for range r.Rounds {
			ack, ok := begin()
			if !ok {
				break
			}
			const data = "\n" + hello
			send(first-1, ack, tcpACK, data)
			time.Sleep(20 * time.Millisecond)
			send(first-1+uint32(len(data)), 0, tcpRST, "")
		}
	case InjectAcknowledgements:
		ack, ok := begin()
		for i := range r.Rounds {
			if !ok {
				break
			}
			for range 4 {
				send(first, ack, tcpACK, "")
				send(first, 0, tcpRST, "")
			}
			send(first, ack+4*uint32(i+1), tcpACK, "")
		}
	}
	return sendErr
}

// Slow puts a delay between the host and the server, in each direction.
func (n *Network) Slow(t testing.TB, delay time.Duration) {
	t.Helper()
	between := newNetns(t)
	n.Server.IP(t, "link set eth0 netns "+between.Path()+" name near")
	between.IP(t, "link set near promisc on up",
		"link add far type veth peer name eth0 address 02:00:00:00:91:02 netns "+n.Server.Path(),
		"link set far promisc on up")
	n.Server.IP(t, "link set eth0 up", "addr add 10.91.0.2/30 dev eth0", "addr add fd91::2/64 dev eth0 nodad",
		"route add 10.90.0.0/24 via 10.91.0.1", "route add fd90::/64 via fd91::1",
		"neigh add 10.91.0.1 lladdr 02:00:00:00:91:01 dev eth0 nud permanent",
		"neigh add fd91::1 lladdr 02:00:00:00:91:01 dev eth0 nud permanent")
	open := func(name string) (fd int) {
		between.Do(func() {
			dev, err := net.InterfaceByName(name)
			if err == nil {
				fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			}
			if err == nil {
				// With the checksums and the segmentation that are still to be done.
				err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)
			}
			if err == nil {
				const all = 0x0300 // ETH_P_ALL, in network byte order
				err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: dev.Index})
			}
			if err != nil {
				t.Fatal(err)
			}
		})
		return fd
	}
	near, far := open("near"), open("far")
	var pipes sync.WaitGroup
	ended := make(chan struct{})
	t.Cleanup(func() {
		close(ended)
		pipes.Wait()
		unix.Close(near)
		unix.Close(far)
	})
	type delayed struct {
		packet []byte
		due    time.Time
	}
	pipe := func(from, to int) {
		// In order.
		queue := make(chan delayed, 4096)
		pipes.Go(func() {
			for d := range queue {
				time.Sleep(time.Until(d.due))
				_, _ = unix.Write(to, d.packet)
			}
		})
		defer close(queue)
		patience := unix.NsecToTimeval(int64(100 * time.Millisecond))
		_ = unix.SetsockoptTimeval(from, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience)
		for {
			select {
			case <-ended:
				return
			default:
			}
			packet := make([]byte, 1<<17)
			size, sender, err := unix.Recvfrom(from, packet, 0)
			if err != nil {
				continue
			}
			if s, ok := sender.(*unix.SockaddrLinklayer); ok && s.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			queue <- delayed{packet[:size], time.Now().Add(delay)}
		}
	}
	pipes.Go(func() { pipe(near, far) })
	pipes.Go(func() { pipe(far, near) })
}
