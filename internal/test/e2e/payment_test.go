package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

const burst = 5

// in returns the scene for a subtest, which removes what it adds.
func (s *scene) in(t *testing.T) *scene {
	sub := *s
	sub.t = t
	return &sub
}

// cookies sets whether the server answers each SYN with a SYN cookie and keeps nothing.
func (s *scene) cookies(always bool) {
	s.t.Helper()
	s.Server.Sysctl(s.t, "ipv4/tcp_syncookies", map[bool]string{false: "1", true: "2"}[always])
}

// accepted returns how many connections of a container the mail server has accepted.
func (s *scene) accepted(c *container, mail netip.Addr) int {
	s.t.Helper()
	return len(s.Mail[25].Accepted(s.t, c.addr(mail)))
}

// expectPaid checks that no more connections than the burst were accepted, and that each is
// counted.
func (s *scene) expectPaid(c *container, mail netip.Addr, seen *lab.Capture) {
	s.t.Helper()
	seen.Settle(s.t)
	accepted, counted := s.accepted(c, mail), s.row(c).SMTP
	if accepted > burst {
		s.t.Errorf("%d connections were accepted, want at most %d", accepted, burst)
	}
	if counted.Allowed < uint64(accepted) {
		s.t.Errorf("%d connections were accepted, but counted %+v", accepted, counted.SMTP)
	}
}

// fourTuples are attempts to make many connections from one that was paid for, with the same
// addresses, ports and sequence number.
func fourTuples(mail netip.Addr) (all []lab.Replay) {
	hides := []lab.Hide{lab.HideRoute}
	if mail.Is4() {
		hides = append(hides, lab.HideLo)
	}
	for _, aim := range []lab.Aim{lab.AimRepair, lab.AimWalk} {
		for _, hide := range hides {
			all = append(all, lab.Replay{Rounds: 1, Aim: aim, Hide: hide, Answer: lab.AnswerServer})
		}
		for _, hide := range append(hides, lab.HideNot) {
			all = append(all, lab.Replay{Rounds: 8, Aim: aim, Hide: hide, Answer: lab.AnswerSYNACK})
		}
		all = append(all, lab.Replay{Rounds: 8, Aim: aim, Hide: lab.HideRoute, Answer: lab.AnswerSYN})
	}
	return append(all, lab.Replay{Rounds: 8, Aim: lab.AimRepair, Hide: lab.HideNot, Answer: lab.AnswerRepair})
}

// A connection that was paid for does not give another one.
func TestOnePaymentOneConnection(t *testing.T) {
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			whole := newScene(t)
			lab.HurrySYNs(t, whole.policed)
			seen := whole.Capture(t)
			run := func(s *scene, c *container, r lab.Replay) {
				t.Helper()
				r.Mail, r.Source, r.Ports = at(mail, 25), c.addr(mail), []uint16{2001}
				if r.Answer == lab.AnswerServer {
					r.Ports = []uint16{2001, 2002, 2003, 2004, 2005}
				}
				s.cookies(r.Answer != lab.AnswerServer)
				c.Replay(r)
			}
			for i, r := range fourTuples(mail) {
				name := fmt.Sprintf("aimed by %s, SYN %s, answered by %s", r.Aim, r.Hide, r.Answer)
				t.Run(name, func(t *testing.T) {
					s := whole.in(t)
					free := s.container(fmt.Sprint("free", i))
					run(s, free, r)
					seen.Settle(t)
					if n := s.accepted(free, mail); n <= burst {
						t.Errorf("without the filter %d connections were accepted, want more than %d", n, burst)
					}
					// The filter alone is enough too.
					hostSide := map[bool]string{true: "on", false: "off"}[mail.Is4()]
					s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(burst), "--host-side", hostSide)
					paying := s.help(s.container(fmt.Sprint("paying", i)))
					run(s, paying, r)
					s.expectPaid(paying, mail, seen)
				})
			}
		})
	}
}

// steps are those of a socket in slot 0, which is bound to a port.
func (c *container) steps(mail netip.Addr, port uint16, mptcp bool, ops ...lab.Op) (steps []lab.Step) {
	for _, op := range ops {
		steps = append(steps, lab.Step{Op: op, Own: at(c.addr(mail), port), To: at(mail, 25), MPTCP: mptcp})
	}
	return steps
}

// parallel returns the steps for so many sockets: each step is done with all sockets in turn.
func (c *container) parallel(mail netip.Addr, sockets int, ops ...lab.Op) (steps []lab.Step) {
	for _, op := range ops {
		for slot := range sockets {
			step := c.steps(mail, 2001+uint16(slot), false, op)[0]
			step.Slot = slot
			steps = append(steps, step)
		}
	}
	return steps
}

// connected waits up to a second for a connection that must come.
var connected = slices.Repeat([]lab.Op{lab.OpWait}, 34)

// A socket that connects again pays again, whatever its kind, and so does each of many sockets.
func TestEachConnectionOfASocketPays(t *testing.T) {
	const connections = 2 * burst
	again := []lab.Op{lab.OpConnect, lab.OpWait, lab.OpSend, lab.OpDisconnect}
	anew := []lab.Op{lab.OpOpen, lab.OpConnect, lab.OpWait, lab.OpSend, lab.OpLinger, lab.OpClose}
	// sequence makes the connections with these steps. So many of them, the first, must come.
	sequence := func(ops []lab.Op, must int) []lab.Op {
		all := []lab.Op{lab.OpOpen}
		for i := range connections {
			for _, op := range ops {
				switch {
				case op != lab.OpWait:
					all = append(all, op)
				case i < must:
					all = append(all, connected...)
				default:
					all = append(all, lab.OpWait, lab.OpWait, lab.OpWait, lab.OpWait)
				}
			}
		}
		return all
	}
	fast := func(ops []lab.Op) []lab.Op {
		ops = slices.Clone(ops)
		for i := range ops {
			if ops[i] == lab.OpConnect {
				ops[i] = lab.OpFastOpen
			}
		}
		return ops
	}
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		for _, test := range []struct {
			name  string
			mptcp bool
			ops   []lab.Op
		}{
			{"TCP, one socket", false, again},
			{"TCP, many sockets", false, anew},
			{"MPTCP, one socket", true, again},
			{"MPTCP, many sockets", true, anew},
			{"fast open, one socket", false, fast(again)},
			{"fast open, many sockets", false, fast(anew)},
			{"fast open of MPTCP, many sockets", true, fast(anew)},
		} {
			t.Run(test.name+" to "+mail.String(), func(t *testing.T) {
				s := newScene(t)
				// A SYN may be lost if it is sent while the port's last connection is reset.
				lab.HurrySYNs(t, s.policed)
				s.openFast()
				seen := s.Capture(t)
				free := s.container("free")
				free.Sequence(free.steps(mail, 2001, test.mptcp, sequence(test.ops, connections)...))
				seen.Settle(t)
				if n := s.accepted(free, mail); n != connections {
					t.Errorf("without the filter %d connections were accepted, want %d", n, connections)
				}
				s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(burst))
				s.a.Sequence(s.a.steps(mail, 2001, test.mptcp, sequence(test.ops, burst)...))
				s.expectPaid(s.a, mail, seen)
				least := burst
				if slices.Contains(test.ops, lab.OpFastOpen) {
					// A SYN that was lost with its data has paid, and its repeat pays again.
					least = 1
				}
				if n := s.accepted(s.a, mail); n < least {
					t.Errorf("%d connections were accepted, want %d or more", n, least)
				}
			})
		}
	}
}

// openFast lets the server accept connections from their SYN on (TCP fast open), from every
// client.
func (s *scene) openFast() {
	s.t.Helper()
	const client, server, cookieNotRequired, dataWithoutCookie = 1, 2, 0x200, 4
	s.Server.Sysctl(s.t, "ipv4/tcp_fastopen", fmt.Sprint(server|cookieNotRequired))
	for _, c := range []*container{s.a, s.b} {
		c.Sysctl(s.t, "ipv4/tcp_fastopen", fmt.Sprint(client|dataWithoutCookie))
	}
}

// The kernel itself resets connections for which it finds no socket, without passing the
// filter. A socket that was bound to another device at that moment does not hear of it and
// repeats its first segment, from which a server with SYN cookies accepts another
// connection.
func TestResetBehindTheSocket(t *testing.T) {
	const rounds = 2
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			s := newScene(t)
			s.cookies(true)
			seen := s.Capture(t)
			run := func(c *container) {
				ops := append(append([]lab.Op{lab.OpOpen, lab.OpConnect}, connected...), lab.OpLearn, lab.OpDeaf, lab.OpSend)
				for range rounds {
					ops = append(ops, lab.OpLo, lab.OpACK, lab.OpUnlo, lab.OpRepeat)
				}
				c.Sequence(c.parallel(mail, burst, ops...))
				seen.Settle(t)
			}
			run(s.b)
			if n := s.accepted(s.b, mail); n < 2*burst {
				t.Errorf("without the filter %d connections were accepted, want at least %d", n, 2*burst)
			}
			s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(burst))
			run(s.a)
			s.expectPaid(s.a, mail, seen)
		})
	}
}

// Sockets that were connected before the filter was attached, to a server that has
// forgotten them, make no connections without paying.
func TestSocketsConnectedBeforeAttachPay(t *testing.T) {
	const sockets = 2 * burst
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			s := newScene(t)
			s.cookies(true)
			seen := s.Capture(t)
			ops := append(append([]lab.Op{lab.OpOpen, lab.OpConnect}, connected...), lab.OpLearn, lab.OpDisconnect, lab.OpRepair)
			for _, filter := range []bool{false, true} {
				c := map[bool]*container{false: s.b, true: s.a}[filter]
				c.Sequence(c.parallel(mail, sockets, ops...))
				seen.Settle(t)
				before := s.accepted(c, mail)
				if filter {
					s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(burst))
				}
				c.Sequence(c.parallel(mail, sockets, lab.OpSend))
				seen.Settle(t)
				n := s.accepted(c, mail) - before
				if !filter && n != sockets || filter && n > burst {
					t.Errorf("with the filter %v: %d connections were accepted of %d", filter, n, sockets)
				}
			}
		})
	}
}

// A container's sockets outlive its cgroup, in another container. They have no tokens in
// addition to those of the container, which is started again.
func TestOldSocketsHaveNoTokensOfTheirOwn(t *testing.T) {
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			s := newScene(t)
			s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(burst))
			seen := s.Capture(t)
			web := &container{s.a.Container, nil, filepath.Join(s.policed, "web")}
			var old []*lab.Socket
			for range 3 {
				web.Agent = s.agent(s.a, web.cgroup)
				for range burst {
					sock := web.Socket(lab.Family(mail), unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
					old = append(old, sock.Give(s.b.Agent))
				}
				web.End()
				testenv.Eventually(t, "remove "+web.cgroup, func() bool { return os.Remove(web.cgroup) == nil })
			}
			web.Agent = s.agent(s.a, web.cgroup)
			for _, sock := range old {
				sock.Connect(at(mail, 25))
			}
			web.ConnectAtOnce(at(mail, 25), 2*burst)
			seen.Settle(t)
			if n := s.accepted(web, mail); n > burst {
				t.Errorf("%d connections were accepted, want at most %d", n, burst)
			}
			if allowed := s.Stats(t).Total.SMTP.Allowed; allowed > burst {
				t.Errorf("%d connections are counted, want at most %d", allowed, burst)
			}
		})
	}
}

// Without a token no packet of a TCP socket reaches a mail port, not even one that belongs to a
// connection in the socket's view.
func TestUnpaidSegments(t *testing.T) {
	established := []lab.Op{lab.OpOpen, lab.OpConnect, lab.OpSYNACK}
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			s := newScene(t)
			seen := s.Capture(t)
			for _, test := range []struct {
				name string
				ops  []lab.Op
			}{
				{"a forged SYN-ACK", append(established, lab.OpSend, lab.OpSend, lab.OpWait)},
				{"its end", append(established, lab.OpShutdown, lab.OpWait)},
				{"its reset", append(established, lab.OpSend, lab.OpLinger, lab.OpClose)},
				{"disconnected", append(established, lab.OpDisconnect)},
				{"a simultaneous open", []lab.Op{lab.OpOpen, lab.OpConnect, lab.OpSYN, lab.OpACK, lab.OpSend, lab.OpWait}},
				{"an acknowledgement", append(established, lab.OpACK, lab.OpSYN, lab.OpWait)},
				{"TCP_REPAIR", []lab.Op{lab.OpOpen, lab.OpRepair, lab.OpSend, lab.OpShutdown, lab.OpWait}},
				{"fast open", []lab.Op{lab.OpOpen, lab.OpFastOpen, lab.OpSYNACK, lab.OpSend, lab.OpWait}},
			} {
				t.Run(test.name, func(t *testing.T) {
					s := s.in(t)
					arrived := func(c *container) int {
						steps := c.steps(mail, 2001, false, test.ops...)
						for i := range steps {
							steps[i].Seq, steps[i].Ack = 1000, 2000
						}
						c.Sequence(steps)
						defer seen.Forget()
						return lab.Count(seen.Settle(t), func(p lab.Packet) bool {
							// A reset opens nothing.
							return p.Src == at(c.addr(mail), 2001) && p.Dst.Port() == 25 && !p.SYN(25) && p.Flags&0x04 == 0
						})
					}
					free := s.container("free " + test.name)
					if arrived(free) == 0 && !strings.Contains(test.name, "reset") && test.name != "disconnected" {
						t.Error("without the filter nothing arrived")
					}
					s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(burst))
					c := s.help(s.container("poor " + test.name))
					c.ConnectAtOnce(at(mail, 25), 2*burst)
					seen.Settle(t)
					seen.Forget()
					if n := arrived(c); n > 0 {
						t.Errorf("%d segments arrived", n)
					}
					s.expectMail(c, burst, 1)
				})
			}
		})
	}
}

// A server in a container does not answer clients that connect from a mail port: its answer
// would be a packet to a mail port.
func TestAnswersToMailPorts(t *testing.T) {
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			s := newScene(t)
			seen := s.Capture(t)
			arrived := func(c *container, outside *lab.Agent) int {
				own := at(c.addr(mail), 2001)
				listener := c.Socket(lab.Family(mail), unix.SOCK_STREAM, 0)
				defer listener.Close()
				if r := listener.Bind(own); r.Errno != ok {
					t.Fatal(r.Errno)
				}
				listener.Listen()
				// Also connections that it only resets.
				for i, flags := range []uint8{0x10, 0x10, 0x11, 0x02} {
					h := lab.Header{Src: mail, Dst: own.Addr(), Proto: unix.IPPROTO_TCP}
					if r := outside.Raw(h.Finished(lab.TCP(25, own.Port(), uint32(i), flags)), own.Addr()); r.Errno != ok {
						t.Fatal(r.Errno)
					}
				}
				return lab.Count(seen.Settle(t), func(p lab.Packet) bool { return p.Src == own && p.Flags == 0x12 })
			}
			if arrived(s.b, s.b.Agent) == 0 {
				t.Error("without the filter no SYN-ACK arrived")
			}
			s.attach()
			outside := s.agent(s.a, filepath.Join(filepath.Dir(s.policed), "outside"))
			if n := arrived(s.a, outside); n > 0 {
				t.Errorf("%d SYN-ACKs arrived", n)
			}
			// A container may not pose as a mail server either.
			forged := lab.Header{Src: mail, Dst: s.a.addr(mail), Proto: unix.IPPROTO_TCP}.Finished(lab.TCP(25, 2001, 1, 0x10))
			for _, c := range []*container{s.a, s.b} {
				if r := c.Raw(forged, s.a.addr(mail)); r.Errno != denied {
					t.Errorf("forged by %s: %v, want EPERM", c.cgroup, r.Errno)
				}
			}
			s.expectMail(s.a, 0, 1)
		})
	}
}

// Connections with forged sources pay too.
func TestTransparentSockets(t *testing.T) {
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			s := newScene(t)
			seen := s.Capture(t)
			foreign, level, option := netip.MustParseAddr("192.0.2.7"), unix.IPPROTO_IP, unix.IP_TRANSPARENT
			if mail.Is6() {
				foreign, level, option = netip.MustParseAddr("2001:db8:1::7"), unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT
			}
			arrived := func(c *container) int {
				for range 2 * burst {
					sock := c.Socket(lab.Family(mail), unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
					sock.Set(level, option, 1, nil)
					if r := sock.Bind(at(foreign, 0)); r.Errno != ok {
						t.Fatal(r.Errno)
					}
					sock.Connect(at(mail, 25))
				}
				defer seen.Forget()
				return connections(seen.Settle(t), 25, foreign)
			}
			if n := arrived(s.b); n != 2*burst {
				t.Errorf("without the filter %d connections arrived, want %d", n, 2*burst)
			}
			s.b.End()
			s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(burst))
			if n := arrived(s.a); n != burst {
				t.Errorf("%d connections arrived, want %d", n, burst)
			}
		})
	}
}

// With CAP_NET_ADMIN a container can change packets behind the filter. If it gives each
// repeat of a SYN that was paid for another source port, each repeat is a new connection
// for the server. For the host these are more than the filter has let through, and they
// take tokens of the bridge.
func TestRepeatsWithOtherPorts(t *testing.T) {
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		for _, finish := range []string{"by TCP_REPAIR", "by the socket that paid"} {
			t.Run(fmt.Sprintf("%s, finished %s", mail, finish), func(t *testing.T) {
				s := newScene(t)
				lab.HurrySYNs(t, s.policed)
				seen, answers := s.Capture(t), s.CaptureAnswers(t)
				free := s.container("free")
				if n := s.repeatWithOtherPorts(free, mail, finish == "by TCP_REPAIR", answers); n <= 2*burst {
					t.Errorf("without the filter %d connections were accepted, want more than %d", n, 2*burst)
				}
				free.End()
				s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(burst), "--host-devices", "br0")
				seen.Forget()
				// The burst of the container and that of the bridge.
				if n := s.repeatWithOtherPorts(s.a, mail, finish == "by TCP_REPAIR", answers); n > 2*burst {
					t.Errorf("%d connections were accepted, want at most %d", n, 2*burst)
				}
				t.Logf("counted %+v", s.row(s.a).SMTP.SMTP)
			})
		}
	}
}

// repeatWithOtherPorts returns how many connections the server has accepted.
func (s *scene) repeatWithOtherPorts(c *container, mail netip.Addr, byRepair bool, answers *lab.Capture) int {
	s.t.Helper()
	const first, others, repeats = 3000, 40, 4
	own := func(port uint16) netip.AddrPort { return at(c.addr(mail), port) }
	var ports strings.Builder
	for i := range others {
		fmt.Fprintf(&ports, "%d : %d,", i, first+i)
	}
	chain := "table netdev t { chain out { type filter hook egress device eth0 priority 0; "
	// Only the SYNs get out: the kernel does not know the new ports and would refuse the
	// answers. Sockets must not hear of that either.
	c.NFT(s.t, "table inet t { chain in { type filter hook input priority 0; tcp sport 25 tcp flags & rst == rst drop; }; }")
	c.NFT(s.t, chain+"tcp dport 25 tcp flags & syn == 0 drop;"+
		fmt.Sprintf("tcp dport 25 tcp flags & (syn|ack) == syn tcp sport set numgen inc mod %d map { %s }; }; }", others, ports.String()))
	c.Sysctl(s.t, "ipv4/tcp_timestamps", "0")
	var steps []lab.Step
	for slot := range burst {
		steps = append(steps,
			lab.Step{Op: lab.OpOpen, Slot: slot, Own: own(2001 + uint16(slot))},
			lab.Step{Op: lab.OpConnect, Slot: slot, To: at(mail, 25)})
	}
	for range 2 * repeats {
		steps = append(steps, lab.Step{Op: lab.OpWait})
	}
	c.Sequence(steps)

	// What an attacker could see with a raw socket.
	half := map[uint16]lab.Packet{}
	for _, p := range answers.Packets() {
		if p.Flags == 0x12 && p.Dst.Addr() == c.addr(mail) {
			half[p.Dst.Port()] = p
		}
	}
	steps = nil
	for slot := range burst {
		steps = append(steps, lab.Step{Op: lab.OpSYNACK, Slot: slot, To: at(mail, 25), Seq: 1000, Ack: 2000})
	}
	if !byRepair {
		c.Sequence(steps)
	}
	slot := 0
	for port, p := range half {
		if byRepair {
			c.NFT(s.t, "flush chain netdev t out")
			c.Sequence([]lab.Step{
				{Op: lab.OpOpen, Slot: burst, Own: own(port)},
				{Op: lab.OpRepair, Slot: burst, To: at(mail, 25), Seq: p.Ack - 1, Ack: p.Seq},
				{Op: lab.OpSend, Slot: burst},
				{Op: lab.OpWait, Slot: burst},
			})
			continue
		}
		// It does not matter which socket it was: the rule also sets the right sequence number.
		c.NFT(s.t, fmt.Sprintf("flush chain netdev t out; add rule netdev t out tcp dport 25 tcp flags & rst == 0 "+
			"@th,32,32 set %d @th,64,32 set %d tcp sport set %d", p.Ack, p.Seq+1, port))
		c.Sequence([]lab.Step{
			{Op: lab.OpSend, Slot: slot},
			{Op: lab.OpACK, Slot: slot, To: at(mail, 25), Seq: 1000, Ack: 2000}, // or it would send no more
		})
		slot = (slot + 1) % burst
	}
	return s.accepted(c, mail)
}
