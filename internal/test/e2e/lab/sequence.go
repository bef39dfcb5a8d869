package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Step is one thing that an agent does with the socket in a slot. A sequence goes on
// whatever the result of a step is.
type Step struct {
	Op    Op
	Slot  int
	Own   netip.AddrPort // of OpOpen: what the socket is bound to
	To    netip.AddrPort
	MPTCP bool
	Data  []byte
	// What a connection began with, if it is not what was learnt.
	Seq, Ack uint32
}

// Op is what a step does.
type Op string

const (
	OpOpen       Op = "open" // a TCP socket in place of the one that is there
	OpClose      Op = "close"
	OpLinger     Op = "linger" // close() will send RST
	OpConnect    Op = "connect"
	OpFastOpen   Op = "fast open"
	OpDisconnect Op = "disconnect"
	OpWait       Op = "wait"   // until it is connected, or for a few repeats of a SYN
	OpRepeat     Op = "repeat" // wait until something has been repeated since OpUnlo
	OpSend       Op = "send"
	OpShutdown   Op = "shut down"

	OpRoute   Op = "route" // a source route: what is sent is malformed
	OpUnroute Op = "unroute"
	OpLo      Op = "lo" // bound to that device
	OpUnlo    Op = "unlo"
	OpDeaf    Op = "deaf" // receives nothing
	OpHear    Op = "hear"

	// OpLearn keeps the sequence numbers that a connection from these addresses and
	// ports began with; the steps below use them.
	OpLearn  Op = "learn"
	OpAim    Op = "aim"    // the next connection begins with the same
	OpRepair Op = "repair" // connected without a handshake
	// What the agent forges as the peer, for the socket.
	OpSYN    Op = "peer's SYN"
	OpSYNACK Op = "peer's SYN-ACK"
	OpACK    Op = "peer's ACK"
	OpRST    Op = "peer's RST"

	OpRaw Op = "raw" // Data, a packet
	OpUDP Op = "UDP"
)

// Sequence does steps one after the other, and returns how often there was a connection to
// learn from.
func (a *Agent) Sequence(steps []Step) (learnt int) {
	a.t.Helper()
	a.call("Sequence", steps, &learnt)
	return learnt
}

// GiveSlot passes the socket in a slot to a slot of another agent.
func (a *Agent) GiveSlot(slot int, to *Agent, its int) {
	a.t.Helper()
	var from, taken Occupant
	a.call("Vacate", slot, &from)
	if from.FD < 0 {
		return
	}
	s := (&Socket{agent: a, fd: from.FD, family: Family(from.Own.Addr())}).Give(to)
	to.call("Occupy", Occupant{its, s.fd, from.Own}, &taken)
}

// Occupant is the socket in a slot; FD is below 0 if there is none.
type Occupant struct {
	Slot, FD int
	Own      netip.AddrPort
}

// The rest runs in the agent.

// start is what a connection began with.
type start struct{ seq, ack uint32 }

// Vacate takes a socket out of its slot.
func (m *Remote) Vacate(slot int, o *Occupant) error {
	o.FD = -1
	if w := m.slots[slot]; w != nil {
		delete(m.slots, slot)
		unix.Close(w.raw)
		*o = Occupant{slot, w.fd, w.own}
	}
	return nil
}

// Occupy puts a socket in a slot.
func (m *Remote) Occupy(o Occupant, _ *Occupant) (err error) {
	w := &walker{own: o.Own, fd: o.FD}
	if w.raw, err = m.forger(w.family()); err != nil {
		return err
	}
	m.occupy(o.Slot, w)
	return nil
}

func (m *Remote) occupy(slot int, w *walker) {
	if m.slots == nil {
		m.slots, m.starts = map[int]*walker{}, map[netip.AddrPort]start{}
	}
	if old := m.slots[slot]; old != nil {
		old.close()
	}
	m.slots[slot] = w
}

// Sequence is Agent.Sequence.
func (m *Remote) Sequence(steps []Step, learnt *int) error {
	for _, s := range steps {
		switch s.Op {
		case OpOpen:
			w, err := m.newWalker(s.Own, s.MPTCP)
			if err == nil {
				m.occupy(s.Slot, w)
			} else if err != unix.EADDRINUSE {
				return fmt.Errorf("open: %w", err)
			}
			continue
		case OpRaw:
			_ = rawIP([][]byte{s.Data}, nil)
			continue
		}
		w := m.slots[s.Slot]
		if w == nil {
			continue
		}
		known := m.starts[w.own]
		if s.Seq != 0 {
			known = start{s.Seq, s.Ack}
		}
		switch s.Op {
		case OpClose:
			w.close()
			delete(m.slots, s.Slot)
		case OpLearn:
			if now, ok := w.start(); ok {
				m.starts[w.own] = now
				*learnt++
			}
		case OpAim:
			if known != (start{}) {
				_ = w.aim(AimRepair, known.seq)
			}
		case OpRepair:
			if known != (start{}) {
				_ = w.repair(known.seq+1, known.ack+1, s.To)
			}
		case OpSYN:
			_ = w.forge(segment{from: s.To, seq: known.ack, flags: tcpSYN, window: 65535})
		case OpSYNACK:
			_ = w.forge(segment{from: s.To, seq: known.ack, ack: w.position(), flags: tcpSYN | tcpACK, window: 65535})
		case OpACK:
			_ = w.forge(segment{from: s.To, seq: known.ack + 1, ack: w.position(), flags: tcpACK, window: 65535})
		case OpRST:
			_ = w.forge(segment{from: s.To, seq: known.ack + 1, ack: w.position(), flags: tcpRST | tcpACK})
		default:
			w.do(s)
		}
	}
	return nil
}

// do does the operations that need only the socket.
func (w *walker) do(s Step) {
	switch s.Op {
	case OpLinger:
		_ = unix.SetsockoptLinger(w.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	case OpConnect:
		_ = w.connect(s.To)
	case OpFastOpen:
		_ = unix.Sendto(w.fd, []byte("EHLO\r\n"), unix.MSG_FASTOPEN|unix.MSG_NOSIGNAL, sockaddr(w.family(), s.To))
	case OpDisconnect:
		_ = w.disconnect()
	case OpWait:
		w.connected(30 * time.Millisecond)
	case OpRepeat:
		_ = w.until(time.Second, func(i *unix.TCPInfo) bool { return i.Total_retrans > w.repeats || i.Unacked == 0 })
	case OpSend:
		_ = unix.Send(w.fd, []byte("NOOP\r\n"), unix.MSG_NOSIGNAL)
	case OpShutdown:
		_ = unix.Shutdown(w.fd, unix.SHUT_WR)
	case OpRoute:
		_ = w.hide(HideRoute, s.To.Addr())
	case OpUnroute:
		_ = w.show(HideRoute)
	case OpLo:
		_ = w.hide(HideLo, s.To.Addr())
	case OpUnlo:
		if info, err := unix.GetsockoptTCPInfo(w.fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			w.repeats = info.Total_retrans
		}
		_ = w.show(HideLo)
	case OpDeaf:
		nothing := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
		_ = unix.SetsockoptSockFprog(w.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing[0]})
	case OpHear:
		_ = unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
	case OpUDP:
		if fd, err := unix.Socket(w.family(), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
			_ = unix.Sendto(fd, s.Data, 0, sockaddr(w.family(), s.To))
			unix.Close(fd)
		}
	}
}

// start returns what an established connection began with, if nothing was sent or received yet.
func (w *walker) start() (now start, ok bool) {
	info, err := unix.GetsockoptTCPInfo(w.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil || info.State != unix.BPF_TCP_ESTABLISHED || info.Bytes_acked > 1 || info.Notsent_bytes > 0 ||
		info.Bytes_received > 0 || info.Data_segs_out > 0 {
		return start{}, false
	}
	snd, rcv, err := w.queues()
	return start{snd - 1, rcv - 1}, err == nil
}

// position returns what a peer that has received everything acknowledges; 0 if that is not
// known.
func (w *walker) position() uint32 {
	snd, _, err := w.queues()
	if err != nil {
		return 0
	}
	return snd
}

// queues returns the next sequence numbers that the socket sends and expects.
func (w *walker) queues() (snd, rcv uint32, err error) {
	if err := unix.SetsockoptInt(w.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
		return 0, 0, err
	}
	for queue, seq := range map[int]*uint32{repairSendQueue: &snd, repairRecvQueue: &rcv} {
		setErr := unix.SetsockoptInt(w.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, queue)
		n, getErr := unix.GetsockoptInt(w.fd, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
		err, *seq = errors.Join(err, setErr, getErr), uint32(n)
	}
	return snd, rcv, errors.Join(err, w.endRepair())
}
