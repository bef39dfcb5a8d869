package lab

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Replay says how an agent makes many mail connections from the SYNs of a few. A socket for
// each port connects once, is disconnected, and then connects again and again with the same
// addresses, ports and sequence number.
type Replay struct {
	Mail   netip.AddrPort
	Source netip.Addr
	Ports  []uint16
	Rounds int // after the first connection
	Aim    Aim
	Hide   Hide
	Answer Answer
}

// Aim is how a socket gets its initial sequence number.
type Aim string

const (
	// By TCP_REPAIR, which needs CAP_NET_ADMIN.
	AimRepair Aim = "repair"
	// By connections to forged peers: when a socket is disconnected, its sequence number
	// advances by the largest window that the peer has offered (tcp_disconnect).
	AimWalk Aim = "walk"
)

// Hide is what happens to the first SYN of a connection.
type Hide string

const (
	HideNot   Hide = "sent"
	HideRoute Hide = "source-routed" // which the filter drops as malformed
	HideLo    Hide = "over lo"       // IPv4 alone: no route of IPv6 leads there
)

// Answer is who finishes the handshake.
type Answer string

const (
	// The server, when the SYN is repeated.
	AnswerServer Answer = "server"
	// A raw socket of the agent, which knows the server's SYN cookie.
	AnswerSYNACK Answer = "forged SYN-ACK"
	AnswerSYN    Answer = "forged SYN" // as in a simultaneous open
	// Nobody: TCP_REPAIR makes the socket connected.
	AnswerRepair Answer = "TCP_REPAIR"
)

// Replay returns how many connections the agent believes to have.
func (a *Agent) Replay(r Replay) (established int) {
	a.t.Helper()
	a.call("Replay", r, &established)
	return established
}

// The rest runs in the agent.

// Replay is Agent.Replay.
func (m *Remote) Replay(r Replay, established *int) error {
	var all sync.WaitGroup
	var mu sync.Mutex
	var failed error
	for _, port := range r.Ports {
		all.Go(func() {
			n, err := r.run(m, port)
			mu.Lock()
			defer mu.Unlock()
			*established += n
			if err != nil {
				failed = fmt.Errorf("port %d: %w", port, err)
			}
		})
	}
	all.Wait()
	return failed
}

const (
	tcpRST = 0x04

	// How long to wait for an answer of the server that may not come, and for the repeat of
	// a hurried SYN (HurrySYNs).
	answered = 200 * time.Millisecond
	repeated = 300 * time.Millisecond

	// include/uapi/linux/tcp.h
	repairSendQueue = 2
	repairRecvQueue = 1
	repairOffSilent = -1
)

func (r *Replay) run(m *Remote, port uint16) (established int, err error) {
	w, err := m.newWalker(netip.AddrPortFrom(r.Source, port), false)
	if err != nil {
		return 0, err
	}
	defer w.close()
	seq, err := w.whereabouts()
	if err != nil {
		return 0, err
	}
	if r.Aim == AimRepair {
		err = w.aim(r.Aim, seq)
	}
	if err != nil {
		return 0, err
	}
	seen, err := w.sniff()
	if err != nil {
		return 0, err
	}
	defer unix.Close(seen)
	if err := w.connect(r.Mail); err != nil {
		return 0, err
	}
	if !w.connected(repeated) {
		return 0, nil // it has no token
	}
	established++
	reply, err := w.await(seen, r.Mail, tcpSYN|tcpACK)
	if err != nil {
		return established, err
	}
	for range r.Rounds {
		if err := w.disconnect(); err != nil {
			return established, err
		}
		if err := w.aim(r.Aim, seq); err != nil {
			return established, fmt.Errorf("aim: %w", err)
		}
		ok, err := r.again(w, seq, binary.BigEndian.Uint32(reply[4:]))
		if err != nil {
			return established, err
		}
		if ok {
			established++
		}
	}
	return established, w.disconnect()
}

// again connects once more.
func (r *Replay) again(w *walker, seq, cookie uint32) (ok bool, err error) {
	if r.Answer == AnswerRepair {
		if err := w.repair(seq+1, cookie+1, r.Mail); err != nil {
			return false, err
		}
		return w.delivers(), nil
	}
	if err := w.hide(r.Hide, r.Mail.Addr()); err != nil {
		return false, fmt.Errorf("hide: %w", err)
	}
	if err := w.connect(r.Mail); err != nil {
		return false, err
	}
	if r.Answer == AnswerServer {
		if err := w.show(r.Hide); err != nil {
			return false, fmt.Errorf("show: %w", err)
		}
		return w.connected(repeated), nil
	}
	// The server refuses the SYN-ACK of a simultaneous open.
	if r.Answer == AnswerSYNACK {
		err = w.show(r.Hide)
	}
	flags, ack := uint8(tcpSYN|tcpACK), seq+1
	if r.Answer == AnswerSYN {
		flags, ack = tcpSYN, 0
	}
	if err == nil {
		err = w.forge(segment{from: r.Mail, seq: cookie, ack: ack, flags: flags, window: 65535})
	}
	if err == nil && r.Answer == AnswerSYN {
		err = w.forge(segment{from: r.Mail, seq: cookie + 1, ack: seq + 1, flags: tcpACK, window: 65535})
	}
	connected := err == nil && w.connected(answered)
	if err == nil && r.Answer == AnswerSYN {
		err = w.show(r.Hide)
	}
	if err != nil || !connected {
		return false, err
	}
	return w.delivers(), nil
}

// Accomplice makes another agent in the same network lend this agent the raw sockets with
// which it forges the peers of its sockets. The other agent may send packets that this one
// may not.
func (a *Agent) Accomplice(other *Agent) {
	a.t.Helper()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		s := other.Socket(family, unix.SOCK_RAW, unix.IPPROTO_RAW).Give(a)
		a.call("Lend", Loan{family, s.fd}, &Result{})
	}
}

// Loan is a raw socket of a family.
type Loan struct{ Family, FD int }

// Lend is one half of Agent.Accomplice.
func (m *Remote) Lend(l Loan, _ *Result) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.forgers == nil {
		m.forgers = map[int]int{}
	}
	m.forgers[l.Family] = l.FD
	return nil
}

// forger returns a raw socket.
func (m *Remote) forger(family int) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if fd, ok := m.forgers[family]; ok {
		return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	return unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
}

// walker is a TCP socket that is bound to a port, with raw sockets that forge its peers.
type walker struct {
	own     netip.AddrPort
	fd, raw int
	repeats uint32 // for OpRepeat
}

func (m *Remote) newWalker(own netip.AddrPort, mptcp bool) (*walker, error) {
	w := &walker{own: own, raw: -1}
	proto := 0
	if mptcp {
		proto = unix.IPPROTO_MPTCP
	}
	var err error
	if w.fd, err = unix.Socket(w.family(), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto); err != nil {
		return nil, err
	}
	err = unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.SetsockoptInt(w.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err == nil {
		err = unix.Bind(w.fd, sockaddr(w.family(), w.own))
	}
	if err == nil {
		w.raw, err = m.forger(w.family())
	}
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

func (w *walker) family() int { return Family(w.own.Addr()) }

func (w *walker) close() {
	unix.Close(w.fd)
	if w.raw >= 0 {
		unix.Close(w.raw)
	}
}

// connect begins to connect.
func (w *walker) connect(to netip.AddrPort) error {
	if err := unix.Connect(w.fd, sockaddr(w.family(), to)); err != unix.EINPROGRESS && err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	return nil
}

// connected waits until the socket is connected.
func (w *walker) connected(patience time.Duration) bool {
	return w.poll(unix.POLLOUT, patience)&(unix.POLLOUT|unix.POLLERR|unix.POLLHUP) == unix.POLLOUT
}

func (w *walker) poll(events int16, patience time.Duration) int16 {
	fds := []unix.PollFd{{Fd: int32(w.fd), Events: events}}
	deadline := time.Now().Add(patience)
	for {
		n, err := unix.Poll(fds, int(max(0, time.Until(deadline)).Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if n == 0 || err != nil {
			return 0
		}
		return fds[0].Revents
	}
}

func (w *walker) disconnect() error { return disconnect(w.fd) }

func disconnect(fd int) error {
	unspec := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspec)), unsafe.Sizeof(unspec))
	return errnoError(e)
}

// delivers sends some data and says whether the peer has acknowledged it.
func (w *walker) delivers() bool {
	if _, err := unix.Write(w.fd, []byte("EHLO\r\n")); err != nil {
		return false
	}
	for deadline := time.Now().Add(answered); time.Now().Before(deadline); time.Sleep(100 * time.Microsecond) {
		if n, err := unix.IoctlGetInt(w.fd, unix.SIOCOUTQ); err != nil || n == 0 {
			return err == nil && w.poll(0, 0) == 0
		}
	}
	return false
}

// until waits for a condition that no event announces.
func (w *walker) until(patience time.Duration, ok func(*unix.TCPInfo) bool) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Microsecond) {
		info, err := unix.GetsockoptTCPInfo(w.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil || ok(info) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the socket: %w: %+v", unix.ETIMEDOUT, *info)
		}
	}
}

// hide makes sure that a SYN does not get out while the filter is attached. The source
// route leads to the server and nowhere else, so without the filter the SYN gets there.
func (w *walker) hide(h Hide, mail netip.Addr) error {
	switch {
	case h == HideLo:
		return unix.BindToDevice(w.fd, "lo")
	case h == HideRoute && mail.Is4():
		route := append([]byte{131, 7, 4}, append(mail.AsSlice(), 1)...) // RFC 791
		return unix.SetsockoptString(w.fd, unix.IPPROTO_IP, unix.IP_OPTIONS, string(route))
	case h == HideRoute:
		route := []byte{0, 4, 4, 1, 1, 0, 0, 0} // RFC 8754
		route = append(append(route, mail.AsSlice()...), mail.AsSlice()...)
		return unix.SetsockoptString(w.fd, unix.IPPROTO_IPV6, unix.IPV6_RTHDR, string(route))
	}
	return nil
}

// show undoes hide.
func (w *walker) show(h Hide) error {
	switch {
	case h == HideLo:
		return unix.BindToDevice(w.fd, "")
	case h == HideRoute && w.own.Addr().Is4():
		return unix.SetsockoptString(w.fd, unix.IPPROTO_IP, unix.IP_OPTIONS, "")
	case h == HideRoute:
		return unix.SetsockoptString(w.fd, unix.IPPROTO_IPV6, unix.IPV6_RTHDR, "")
	}
	return nil
}

// aim sets the sequence number of the next SYN.
func (w *walker) aim(how Aim, seq uint32) error {
	if how == AimRepair {
		return w.repairQueues(map[int]uint32{repairSendQueue: seq}, nil)
	}
	here, err := w.whereabouts()
	if err != nil {
		return err
	}
	const scale, most = 14, 65535 << 14 // RFC 7323
	// Two connections take small steps, each by three and the window.
	const least = 2 * 3
	way := uint64(seq - here)
	for way < least {
		way += 1 << 32
	}
	for way-least > most {
		step := min(way-least-3, most) &^ (1<<scale - 1)
		if here, err = w.step(here, uint32(step)); err != nil {
			return err
		}
		way -= step + 3
	}
	for _, step := range []uint64{(way - least) &^ (1<<scale - 1), (way - least) & (1<<scale - 1)} {
		if here, err = w.step(here, uint32(step)); err != nil {
			return err
		}
	}
	if here != seq {
		return fmt.Errorf("at %d, not %d", here, seq)
	}
	return nil
}

// step advances the sequence number by a window and three, and returns it.
func (w *walker) step(here, window uint32) (uint32, error) {
	const scale = 14
	// Nobody has this address, so nobody else answers, until the kernel finds that out.
	b := w.own.Addr().AsSlice()
	b[len(b)-1] = 250
	addr, _ := netip.AddrFromSlice(b)
	peer := netip.AddrPortFrom(addr, 7)
	if err := w.connect(peer); err != nil {
		return 0, err
	}
	answer := segment{from: peer, seq: 1, ack: here + 1, flags: tcpSYN | tcpACK, options: []byte{3, 3, scale, 1}}
	if window < 1<<scale {
		answer.window = uint16(window)
	}
	if err := w.forge(answer); err != nil {
		return 0, err
	}
	err := w.until(patience, func(i *unix.TCPInfo) bool { return i.State == unix.BPF_TCP_ESTABLISHED })
	if err != nil {
		return 0, err
	}
	if window >= 1<<scale {
		answer.flags, answer.seq, answer.window, answer.options = tcpACK, 2, uint16(window>>scale), nil
		if err := w.forge(answer); err != nil {
			return 0, err
		}
		if err := w.until(patience, func(i *unix.TCPInfo) bool { return i.Snd_wnd == window }); err != nil {
			return 0, err
		}
	}
	return here + window + 3, w.disconnect()
}

// whereabouts returns the sequence number of the next SYN: that of a SYN to the container
// itself, where nobody listens, plus three.
func (w *walker) whereabouts() (uint32, error) {
	seen, err := w.sniff()
	if err != nil {
		return 0, err
	}
	defer unix.Close(seen)
	if err := w.disconnect(); err != nil {
		return 0, err
	}
	nobody := netip.AddrPortFrom(w.own.Addr(), 7)
	err = unix.Connect(w.fd, sockaddr(w.family(), nobody))
	if err != unix.EINPROGRESS && err != unix.ECONNREFUSED {
		return 0, fmt.Errorf("connect to itself: %w", err)
	}
	syn, awaitErr := w.awaitBetween(seen, w.own, nobody, tcpSYN)
	if awaitErr != nil {
		return 0, awaitErr
	}
	// A refused connect() also disconnects.
	if err == unix.EINPROGRESS {
		w.poll(0, patience)
		if err := w.disconnect(); err != nil {
			return 0, err
		}
	}
	return binary.BigEndian.Uint32(syn[4:]) + 3, nil
}

// sniff opens a raw socket, which gets a copy of each segment to the container.
func (w *walker) sniff() (int, error) {
	fd, err := unix.Socket(w.family(), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, err
	}
	tv := unix.NsecToTimeval(int64(patience))
	return fd, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

// await returns the TCP header of a segment to the socket.
func (w *walker) await(seen int, from netip.AddrPort, flags uint8) ([]byte, error) {
	return w.awaitBetween(seen, from, w.own, flags)
}

func (w *walker) awaitBetween(seen int, from, to netip.AddrPort, flags uint8) ([]byte, error) {
	buf := make([]byte, 1<<16)
	for {
		n, err := unix.Read(seen, buf)
		if err != nil {
			return nil, fmt.Errorf("await flags %#x from %s: %w", flags, from, err)
		}
		b := buf[:n]
		if from.Addr().Is4() {
			b = b[b[0]&15*4:]
		}
		if len(b) >= 20 && binary.BigEndian.Uint16(b) == from.Port() && binary.BigEndian.Uint16(b[2:]) == to.Port() && b[13] == flags {
			return b, nil
		}
	}
}

// segment is a TCP segment to the socket.
type segment struct {
	from     netip.AddrPort
	seq, ack uint32
	flags    uint8
	window   uint16
	options  []byte
}

// forge makes the socket receive a segment.
func (w *walker) forge(s segment) error {
	h := append(TCP(s.from.Port(), w.own.Port(), s.seq, s.flags), s.options...)
	binary.BigEndian.PutUint32(h[8:], s.ack)
	binary.BigEndian.PutUint16(h[14:], s.window)
	h[12] = byte(len(h)/4) << 4
	packet := Header{Src: s.from.Addr(), Dst: w.own.Addr(), Proto: unix.IPPROTO_TCP}.Finished(h)
	if err := unix.Sendto(w.raw, packet, 0, sockaddr(w.family(), netip.AddrPortFrom(w.own.Addr(), 0))); err != nil {
		return fmt.Errorf("forge flags %#x: %w", s.flags, err)
	}
	return nil
}

// repair makes the socket connected: it next sends seq and expects ack.
func (w *walker) repair(seq, ack uint32, to netip.AddrPort) error {
	return w.repairQueues(map[int]uint32{repairSendQueue: seq, repairRecvQueue: ack}, func() error {
		if err := w.connect(to); err != nil {
			return err
		}
		const window = 65535
		var b []byte // struct tcp_repair_window
		for _, v := range []uint32{ack, window, window, window, ack} {
			b = binary.NativeEndian.AppendUint32(b, v)
		}
		return unix.SetsockoptString(w.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_WINDOW, string(b))
	})
}

func (w *walker) repairQueues(queues map[int]uint32, meanwhile func() error) error {
	set := func(option, value int) error {
		if err := unix.SetsockoptInt(w.fd, unix.IPPROTO_TCP, option, value); err != nil {
			return fmt.Errorf("setsockopt %d: %w", option, err)
		}
		return nil
	}
	err := set(unix.TCP_REPAIR, 1)
	for queue, seq := range queues {
		if err == nil {
			err = set(unix.TCP_REPAIR_QUEUE, queue)
		}
		if err == nil {
			err = set(unix.TCP_QUEUE_SEQ, int(int32(seq)))
		}
	}
	if err == nil && meanwhile != nil {
		err = meanwhile()
	}
	if err != nil {
		return err
	}
	return w.endRepair()
}

// endRepair lets others be bound to the port again, too, which TCP_REPAIR undoes.
func (w *walker) endRepair() error {
	if err := unix.SetsockoptInt(w.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, repairOffSilent); err != nil {
		return fmt.Errorf("end TCP_REPAIR: %w", err)
	}
	return unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
}
