package lab

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Agent is a process in a container that makes system calls for a test, to produce the
// traffic that the test asks for.
type Agent struct {
	t   testing.TB
	rpc *rpc.Client
	end func()
}

// Agent starts this program again as an agent, in the container's network and in a cgroup,
// from its first instruction.
func (n *Netns) Agent(t testing.TB, cgroupPath string) *Agent {
	t.Helper()
	dir, err := os.Open(cgroupPath)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe", AgentArg)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	var a *Agent
	n.Do(func() { a = StartAgent(t, cmd) })
	return a
}

// StartAgent starts a command that becomes an agent, or that passes its stdin and stdout to
// an agent: this program with the argument AgentArg. The agent ends with the test.
func StartAgent(t testing.TB, cmd *exec.Cmd) *Agent {
	t.Helper()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	a := &Agent{t: t, rpc: rpc.NewClient(pipes{stdout, stdin})}
	a.end = sync.OnceFunc(func() {
		// The agent ends at the end of its stdin.
		_ = a.rpc.Close()
		_ = cmd.Wait()
	})
	t.Cleanup(a.end)
	return a
}

// End ends the agent and its sockets.
func (a *Agent) End() { a.end() }

type pipes struct {
	io.ReadCloser
	w io.WriteCloser
}

func (p pipes) Write(b []byte) (int, error) { return p.w.Write(b) }
func (p pipes) Close() error                { return errors.Join(p.w.Close(), p.ReadCloser.Close()) }

func (a *Agent) call(method string, args, reply any) {
	a.t.Helper()
	if err := a.rpc.Call("Remote."+method, args, reply); err != nil {
		a.t.Fatalf("agent: %s: %v", method, err)
	}
}

// Result is the result of a system call.
type Result struct {
	Errno   syscall.Errno // 0 if it succeeded
	Elapsed time.Duration
	Data    []byte // received
}

// Socket is a socket of an agent.
type Socket struct {
	agent  *Agent
	fd     int
	family int
}

// Socket makes a socket whose send and receive calls time out after answerPatience.
func (a *Agent) Socket(family, typ, proto int) *Socket {
	a.t.Helper()
	var fd int
	a.call("Socket", SocketArgs{family, typ, proto}, &fd)
	return &Socket{a, fd, family}
}

func (s *Socket) do(op string, to netip.AddrPort, data []byte, flags, option, value int) (r Result) {
	s.agent.t.Helper()
	s.agent.call("Do", Call{s.fd, s.family, op, to, data, flags, option, value}, &r)
	return r
}

// Connect connects to an address in the socket's family: an IPv4 address is
// v4-mapped for a socket of IPv6.
func (s *Socket) Connect(to netip.AddrPort) Result { return s.do("connect", to, nil, 0, 0, 0) }

// ConnectMeanwhile begins to connect and returns a function that waits for the result.
func (s *Socket) ConnectMeanwhile(to netip.AddrPort) (wait func() Result) {
	var r Result
	call := s.agent.rpc.Go("Remote.Do", Call{FD: s.fd, Family: s.family, Op: "connect", To: to}, &r, nil)
	return func() Result {
		s.agent.t.Helper()
		<-call.Done
		if call.Error != nil {
			s.agent.t.Fatalf("agent: connect: %v", call.Error)
		}
		return r
	}
}

// Bind binds the socket.
func (s *Socket) Bind(to netip.AddrPort) Result { return s.do("bind", to, nil, 0, 0, 0) }

// Listen makes the socket answer connections, which nobody accepts.
func (s *Socket) Listen() Result { return s.do("listen", netip.AddrPort{}, nil, 0, 0, 0) }

// Shutdown shuts the socket down for sending.
func (s *Socket) Shutdown() Result { return s.do("shut down", netip.AddrPort{}, nil, 0, 0, 0) }

// Send sends on a connected socket, or to an address if it is valid.
func (s *Socket) Send(data []byte, to netip.AddrPort) Result {
	return s.do("send", to, data, 0, 0, 0)
}

// SendFlags is Send with flags of sendto(2).
func (s *Socket) SendFlags(data []byte, to netip.AddrPort, flags int) Result {
	return s.do("send", to, data, flags, 0, 0)
}

// Disconnect undoes Connect.
func (s *Socket) Disconnect() Result { return s.do("disconnect", netip.AddrPort{}, nil, 0, 0, 0) }

// Receive waits for a packet or for data of a stream.
func (s *Socket) Receive() Result { return s.do("receive", netip.AddrPort{}, nil, 0, 0, 0) }

// Set sets an option to a number, or to data if data is not empty.
func (s *Socket) Set(level, option, value int, data []byte) {
	s.agent.t.Helper()
	if r := s.do("set", netip.AddrPort{}, data, level, option, value); r.Errno != 0 {
		s.agent.t.Fatalf("agent: setsockopt(%d, %d): %v", level, option, r.Errno)
	}
}

// BindLink binds a packet socket to a device, for sending frames.
func (s *Socket) BindLink(device string) Result {
	return s.do("bind link", netip.AddrPort{}, []byte(device), 0, 0, 0)
}

// Give passes the socket to another agent with SCM_RIGHTS, and closes it here. Both agents
// must see the same files.
func (s *Socket) Give(to *Agent) *Socket {
	s.agent.t.Helper()
	// Not in t.TempDir, whose path may be too long for an address.
	dir, err := os.MkdirTemp("", "give-")
	if err != nil {
		s.agent.t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	taken := &Socket{agent: to, family: s.family}
	handover := Handover{Path: dir + "/s", FD: s.fd}
	to.call("Await", handover, &handover.At)
	s.agent.call("Give", handover, &Result{})
	to.call("Take", handover, &taken.fd)
	return taken
}

// Enter moves the agent into a cgroup. Its sockets stay in their cgroup.
func (a *Agent) Enter(cgroupPath string) {
	a.t.Helper()
	a.call("Enter", cgroupPath, &Result{})
}

// Close closes the socket.
func (s *Socket) Close() { s.do("close", netip.AddrPort{}, nil, 0, 0, 0) }

// Ping waits until the agent answers.
func (a *Agent) Ping() {
	a.t.Helper()
	a.call("Flooded", false, &Flooded{})
}

// Connect makes a TCP connection to an address, which may be v4-mapped, and
// closes it.
func (a *Agent) Connect(to netip.AddrPort) Result {
	a.t.Helper()
	s := a.Socket(Family(to.Addr()), unix.SOCK_STREAM, 0)
	defer s.Close()
	return s.Connect(to)
}

// Family returns the family of sockets that send to an address.
func Family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// Raw sends a packet with its IP header.
func (a *Agent) Raw(packet []byte, to netip.Addr) Result {
	a.t.Helper()
	s := a.Socket(Family(to), unix.SOCK_RAW, unix.IPPROTO_RAW)
	defer s.Close()
	return s.Send(packet, netip.AddrPortFrom(to, 0))
}

// ConnectAtOnce begins n TCP connections at once, each from a thread of its own, and gives
// up all of them when the last has begun.
func (a *Agent) ConnectAtOnce(to netip.AddrPort, n int) {
	a.t.Helper()
	a.call("ConnectAtOnce", Stream{to, n}, &Result{})
}

// Resolve asks a DNS server for the IPv4 address of a name over udp or tcp.
func (a *Agent) Resolve(server netip.Addr, network string) (netip.Addr, error) {
	a.t.Helper()
	var r Lookup
	a.call("Resolve", Lookup{Server: server, Network: network}, &r)
	if r.Err != "" {
		return r.Server, errors.New(r.Err)
	}
	return r.Server, nil
}

// Transfer sends a number of bytes to a Listener and returns what was sent and what the
// other side says that it received.
func (a *Agent) Transfer(to netip.AddrPort, bytes int) (sent Receipt, received string) {
	a.t.Helper()
	var r Transferred
	a.call("Transfer", Stream{to, bytes}, &r)
	return r.Sent, r.Received
}

// Flood is traffic that goes on until it is stopped.
type Flood struct {
	Blocked []netip.Addr // over TCP, UDP and raw sockets
	// Mail is where forged SYNs from Source go, each with the next sequence number.
	Mail   netip.AddrPort
	Source netip.Addr
}

// Flooded counts system calls.
type Flooded struct {
	Refused, Denied, Sent uint64 // ECONNREFUSED, EPERM, success
	Other                 string // any other result, if there was one
	Mails, MailsSent      uint64
}

// Flood starts a flood, with a thread for each kind of traffic, and returns while it goes on.
func (a *Agent) Flood(f Flood) {
	a.t.Helper()
	a.call("Flood", f, &Result{})
}

// Flooded returns what a flood has done so far.
func (a *Agent) Flooded() (r Flooded) {
	a.t.Helper()
	a.call("Flooded", false, &r)
	return r
}

// StopFlood ends a flood.
func (a *Agent) StopFlood() (r Flooded) {
	a.t.Helper()
	a.call("Flooded", true, &r)
	return r
}

// The rest runs in the agent.

// uninterrupted keeps the Go runtime from interrupting system calls.
const uninterrupted = "asyncpreemptoff=1"

func serveAgent() {
	if os.Getenv("GODEBUG") != uninterrupted {
		os.Setenv("GODEBUG", uninterrupted)
		panic(syscall.Exec("/proc/self/exe", os.Args, os.Environ()))
	}
	// Nothing else may print in between.
	w := os.Stdout
	os.Stdout = os.Stderr
	if err := rpc.RegisterName("Remote", new(Remote)); err != nil {
		panic(err)
	}
	rpc.ServeConn(pipes{os.Stdin, w})
	os.Exit(0)
}

// Remote is the agent's side of the calls.
type Remote struct {
	stop    atomic.Bool
	flood   sync.WaitGroup
	mu      sync.Mutex
	flooded Flooded

	overruling *link.RawLink // held
	forgers    map[int]int   // raw sockets of an accomplice, by family

	// For sequences.
	slots  map[int]*walker
	starts map[netip.AddrPort]start
}

// SocketArgs are the arguments of socket(2).
type SocketArgs struct{ Family, Type, Proto int }

// Socket makes a socket.
func (*Remote) Socket(args SocketArgs, fd *int) (err error) {
	if *fd, err = unix.Socket(args.Family, args.Type|unix.SOCK_CLOEXEC, args.Proto); err != nil {
		return fmt.Errorf("%+v: %w", args, err)
	}
	tv := unix.NsecToTimeval(int64(answerPatience))
	return errors.Join(unix.SetsockoptTimeval(*fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
		unix.SetsockoptTimeval(*fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
}

// Call is a system call on a socket.
type Call struct {
	FD, Family    int
	Op            string
	To            netip.AddrPort
	Data          []byte
	Flags         int
	Option, Value int
}

// Do does a system call.
func (*Remote) Do(c Call, r *Result) error {
	begin := time.Now()
	err := c.do(r)
	r.Elapsed, r.Errno = time.Since(begin), errno(err)
	return nil
}

func (c *Call) do(r *Result) (err error) {
	to := sockaddr(c.Family, c.To)
	switch c.Op {
	case "connect":
		return unix.Connect(c.FD, to)
	case "bind":
		return unix.Bind(c.FD, to)
	case "bind link":
		device, err := net.InterfaceByName(string(c.Data))
		if err != nil {
			return unix.ENODEV
		}
		return unix.Bind(c.FD, &unix.SockaddrLinklayer{Ifindex: device.Index})
	case "send":
		if c.To.IsValid() {
			return unix.Sendto(c.FD, c.Data, c.Flags, to)
		}
		_, err = unix.Write(c.FD, c.Data)
	case "receive":
		r.Data = make([]byte, 1<<16)
		n, err := unix.Read(c.FD, r.Data)
		r.Data = r.Data[:max(n, 0)]
		return err
	case "set":
		if len(c.Data) > 0 {
			return unix.SetsockoptString(c.FD, c.Flags, c.Option, string(c.Data))
		}
		return unix.SetsockoptInt(c.FD, c.Flags, c.Option, c.Value)
	case "listen":
		return unix.Listen(c.FD, 100)
	case "shut down":
		return unix.Shutdown(c.FD, unix.SHUT_WR)
	case "disconnect":
		return disconnect(c.FD)
	case "close":
		return unix.Close(c.FD)
	}
	return err
}

// Handover is a socket on its way from one agent to another: it is FD in the first agent,
// passes through a socket at Path, and is At in the second.
type Handover struct {
	Path   string
	FD, At int
}

// Await makes the socket through which another socket arrives.
func (*Remote) Await(h Handover, at *int) (err error) {
	if *at, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	return unix.Bind(*at, &unix.SockaddrUnix{Name: h.Path})
}

// Give sends a socket.
func (*Remote) Give(h Handover, _ *Result) error {
	via, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(via)
	err = unix.Sendmsg(via, []byte{0}, unix.UnixRights(h.FD), &unix.SockaddrUnix{Name: h.Path}, 0)
	return errors.Join(err, unix.Close(h.FD))
}

// Take receives a socket.
func (*Remote) Take(h Handover, fd *int) error {
	defer unix.Close(h.At)
	control := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(h.At, make([]byte, 1), control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("%d messages: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("%d descriptors: %w", len(fds), err)
	}
	*fd = fds[0]
	return nil
}

// Enter is Agent.Enter.
func (*Remote) Enter(cgroupPath string, _ *Result) error {
	return os.WriteFile(filepath.Join(cgroupPath, "cgroup.procs"), []byte("0"), 0)
}

func errnoError(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

func errno(err error) syscall.Errno {
	var e syscall.Errno
	if err != nil && !errors.As(err, &e) {
		panic(err)
	}
	return e
}

func sockaddr(family int, a netip.AddrPort) unix.Sockaddr {
	if !a.IsValid() {
		return nil
	}
	if family == unix.AF_INET {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().Unmap().As4()}
	}
	to := &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	if zone := a.Addr().Zone(); zone != "" {
		device, err := net.InterfaceByName(zone)
		if err != nil {
			panic(err)
		}
		to.ZoneId = uint32(device.Index)
	}
	return to
}

// Stream says where TCP connections go, and how many connections or bytes.
type Stream struct {
	To netip.AddrPort
	N  int
}

// ConnectAtOnce is Agent.ConnectAtOnce.
func (*Remote) ConnectAtOnce(s Stream, _ *Result) error {
	family := Family(s.To.Addr())
	fds := make([]int, s.N)
	for i := range fds {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		fds[i] = fd
	}
	var ready, done sync.WaitGroup
	begin := make(chan struct{})
	results := make([]error, len(fds))
	for i, fd := range fds {
		ready.Add(1)
		done.Go(func() {
			ready.Done()
			<-begin
			results[i] = unix.Connect(fd, sockaddr(family, s.To))
		})
	}
	ready.Wait()
	close(begin)
	done.Wait()
	for _, err := range results {
		if err != nil && err != unix.EINPROGRESS && err != unix.ECONNREFUSED {
			return fmt.Errorf("connect: %w", err)
		}
	}
	return nil
}

// Lookup is a DNS lookup, or its result: the address in Server, or an error.
type Lookup struct {
	Server       netip.Addr
	Network, Err string
}

// Resolve is Agent.Resolve.
func (*Remote) Resolve(l Lookup, r *Lookup) error {
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, l.Network, netip.AddrPortFrom(l.Server, 53).String())
	}}
	ctx, cancel := context.WithTimeout(context.Background(), answerPatience)
	defer cancel()
	addrs, err := resolver.LookupNetIP(ctx, "ip4", "www.example.com.")
	if err != nil {
		r.Err = err.Error()
		return nil
	}
	r.Server = addrs[0].Unmap()
	return nil
}

// Transferred is the result of a transfer.
type Transferred struct {
	Sent     Receipt
	Received string
}

// Transfer is Agent.Transfer.
func (*Remote) Transfer(s Stream, r *Transferred) error {
	conn, err := net.DialTimeout("tcp", s.To.String(), patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	sum := crc32.NewIEEE()
	random := io.LimitReader(rand.NewChaCha8([32]byte{}), int64(s.N))
	if r.Sent.Bytes, err = io.Copy(conn, io.TeeReader(random, sum)); err != nil {
		return err
	}
	r.Sent.CRC = sum.Sum32()
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	received, err := io.ReadAll(conn)
	r.Received = string(received)
	return err
}

// Flood is Agent.Flood.
func (m *Remote) Flood(f Flood, _ *Result) error {
	again := func(attempt func() error, mail bool) {
		m.flood.Go(func() {
			// Tokens must not pile up; the other kinds may wait for what is tested.
			runtime.LockOSThread()
			if !mail {
				_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10)
			}
			for !m.stop.Load() {
				m.count(attempt(), mail)
			}
		})
	}
	// The last kind does not pass the socket hooks.
	for _, kind := range []int{unix.SOCK_STREAM | unix.SOCK_NONBLOCK, unix.SOCK_DGRAM, unix.SOCK_RAW} {
		i := 0
		again(func() error {
			i++
			return attempt(kind, f.Blocked[i%len(f.Blocked)])
		}, false)
	}
	fd, err := unix.Socket(Family(f.Mail.Addr()), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	header := Header{Src: f.Source, Dst: f.Mail.Addr(), Proto: unix.IPPROTO_TCP}
	to := sockaddr(Family(f.Mail.Addr()), netip.AddrPortFrom(f.Mail.Addr(), 0))
	seq := uint32(0)
	again(func() error {
		seq++
		return unix.Sendto(fd, header.Packet(TCP(1024, f.Mail.Port(), seq, tcpSYN)), 0, to)
	}, true)
	return nil
}

// attempt makes a socket and connects it to a port, or sends an echo request or a
// datagram.
func attempt(kind int, addr netip.Addr) error {
	family, proto, port := Family(addr), 0, uint16(80)
	if kind == unix.SOCK_RAW {
		proto, port = unix.IPPROTO_ICMP, 0
		if addr.Is6() {
			proto = unix.IPPROTO_ICMPV6
		}
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	to := sockaddr(family, netip.AddrPortFrom(addr, port))
	if kind&unix.SOCK_NONBLOCK != 0 {
		return unix.Connect(fd, to)
	}
	return unix.Sendto(fd, Echo(addr.Is6()), 0, to)
}

func (m *Remote) count(err error, mail bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := &m.flooded
	switch {
	case mail && (err == nil || err == unix.EPERM):
		f.Mails++
		if err == nil {
			f.MailsSent++
		}
	case err == unix.ECONNREFUSED:
		f.Refused++
	case err == unix.EPERM:
		f.Denied++
	case err == nil || err == unix.EINPROGRESS:
		f.Sent++
	default:
		f.Other = err.Error()
	}
}

// Flooded is Agent.Flooded, and Agent.StopFlood if stop is set.
func (m *Remote) Flooded(stop bool, r *Flooded) error {
	if stop {
		m.stop.Store(true)
		m.flood.Wait()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	*r = m.flooded
	return nil
}
