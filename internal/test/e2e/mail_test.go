package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// scarce is a rate at which no token comes back during a test.
const scarce = "1/day"

func TestContainersHaveSeparateBuckets(t *testing.T) {
	s := newScene(t)
	s.attach()
	seen := s.Capture(t)
	// At the default rate a token comes back after twelve seconds.
	begin := time.Now()
	s.a.ConnectAtOnce(at(lab.Mail4, 25), 60)
	if n := connections(seen.Settle(t), 25, s.a.IPv4); n != 5 {
		t.Errorf("%d of 60 connections of the first container arrived after %v, want 5", n, time.Since(begin))
	}
	s.expectMail(s.a, 5, 55)
	s.expectMail(s.b, 0, 0)
	s.b.ConnectAtOnce(at(lab.Mail4, 25), 60)
	if n := connections(seen.Settle(t), 25, s.b.IPv4); n != 5 {
		t.Errorf("%d of 60 connections of the second container arrived, want 5", n)
	}
	s.expectMail(s.b, 5, 55)
	s.expectMail(s.a, 5, 55)
	// A process that is in no container has a bucket too.
	s.agent(s.a, s.policed).ConnectAtOnce(at(lab.Mail4, 465), 60)
	if n := connections(seen.Settle(t), 465, netip.Addr{}); n != 5 {
		t.Errorf("%d of 60 connections from the policed cgroup itself arrived, want 5", n)
	}
	if total := s.Stats(t).Total.SMTP; total.Allowed != 15 || total.RateLimited < 165 {
		t.Errorf("total: %+v, want 15 allowed and at least 165 limited", total)
	}
}

func TestBucketIsSharedByPortsFamiliesAndNestedCgroups(t *testing.T) {
	s := newScene(t)
	s.attach("--smtp-rate", scarce)
	seen := s.Capture(t)
	scope := "docker-" + strings.Repeat("0123456789abcdef", 4) + ".scope"
	var all sync.WaitGroup
	senders := []struct {
		agent *lab.Agent
		to    netip.AddrPort
	}{
		{s.a.Agent, at(lab.Mail4, 25)},
		{s.agent(s.a, filepath.Join(s.a.cgroup, "leaf")), at(lab.Mail6, 25)},
		{s.agent(s.a, filepath.Join(s.a.cgroup, "deep", "er", "leaf")), at(lab.Mapped(lab.Mail4), 465)},
		{s.agent(s.a, filepath.Join(s.a.cgroup, scope)), at(lab.Mail4, 587)},
	}
	for _, from := range senders {
		all.Go(func() { from.agent.ConnectAtOnce(from.to, 15) })
	}
	all.Wait()
	packets, n := seen.Settle(t), 0
	for _, port := range []uint16{25, 465, 587} {
		n += connections(packets, port, netip.Addr{})
	}
	if n != 5 {
		t.Errorf("%d of 60 connections arrived, want 5", n)
	}
	s.expectMail(s.a, 5, 55)
	// An attempt that is refused before there is a packet counts for the same container.
	for _, from := range senders {
		if r := from.agent.Connect(at(lab.Metadata4, 80)); r.Errno != refused {
			t.Errorf("metadata: %v, want ECONNREFUSED", r.Errno)
		}
	}
	if n := s.row(s.a).Blocked.Connects; n != uint64(len(senders)) {
		t.Errorf("%d of %d refusals are counted", n, len(senders))
	}
}

func TestEachForgedSYNPays(t *testing.T) {
	for _, test := range []struct {
		name string
		mail netip.Addr
	}{{"IPv4", lab.Mail4}, {"IPv6", lab.Mail6}} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			seen := s.Capture(t)
			const flood = 60
			send := func(c *container) (sent int) {
				header := lab.Header{Src: c.addr(test.mail), Dst: test.mail, Proto: unix.IPPROTO_TCP}
				for range flood / 4 {
					// The same sequence number, as in a retransmission, with any flags
					// besides SYN.
					for _, flags := range []uint8{0x02, 0x0a, 0xc2, 0x2a} {
						switch r := c.Raw(header.Packet(lab.TCP(1024, 25, 1, flags)), test.mail); r.Errno {
						case ok:
							sent++
						case denied:
						default:
							t.Fatal(r.Errno)
						}
					}
				}
				return sent
			}
			syn := func(p lab.Packet) bool { return p.SYN(25) }
			if sent, arrived := send(s.a), lab.Count(seen.Settle(t), syn); sent != flood || arrived != flood {
				t.Errorf("without the filter: sent %d, arrived %d, want %d", sent, arrived, flood)
			}
			s.attach("--smtp-rate", scarce)
			seen.Settle(t)
			seen.Forget()
			if sent, arrived := send(s.b), lab.Count(seen.Settle(t), syn); sent != 5 || arrived != 5 {
				t.Errorf("sent %d, arrived %d, want 5", sent, arrived)
			}
			if got := s.row(s.b).SMTP; got.Allowed != 5 || got.RateLimited != flood-5 {
				t.Errorf("counted %+v, want 5 allowed, %d limited", got.SMTP, flood-5)
			}
		})
	}
}

// A TCP socket can be kept from hearing answers, and then repeats its SYN for free. No raw
// socket may finish the handshake for it and so turn each repeat into a connection.
func TestRawSocketsAnswerForNoConnection(t *testing.T) {
	const ack, rst = 0x10, 0x04
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			s := newScene(t)
			seen := s.Capture(t)
			send := func(port uint16, want syscall.Errno) {
				t.Helper()
				header := lab.Header{Src: s.a.addr(mail), Dst: mail, Proto: unix.IPPROTO_TCP}
				for _, flags := range []uint8{ack, ack | 0x08, rst, 0} {
					packet := header.Packet(append(lab.TCP(1024, port, 1, flags), "EHLO"...))
					if r := s.a.Raw(packet, mail); r.Errno != want {
						t.Errorf("flags %#x to port %d: %v, want %v", flags, port, r.Errno, want)
					}
				}
			}
			arrived := func(port uint16) int {
				return lab.Count(seen.Settle(t), func(p lab.Packet) bool { return p.Dst == at(mail, port) })
			}
			send(25, ok)
			if n := arrived(25); n != 4 {
				t.Fatalf("without the filter %d of 4 arrived", n)
			}
			s.attach()
			seen.Forget()
			send(25, denied)
			send(26, ok)
			if mail, other := arrived(25), arrived(26); mail != 0 || other != 4 {
				t.Errorf("%d packets arrived at port 25, want 0; %d of 4 at another", mail, other)
			}
			s.expectMail(s.a, 0, 4)
			// The connections of TCP sockets are not affected.
			if r := s.a.Connect(at(mail, 25)); r.Errno != ok {
				t.Error(r.Errno)
			}
			s.expectMail(s.a, 1, 4)
		})
	}
}

func TestRepeatedSYNOfAnAdmittedConnectionIsFree(t *testing.T) {
	s := newScene(t)
	s.attach("--smtp-rate", scarce, "--smtp-burst", "3")
	s.Server.NFT(t, "table inet deaf { chain input { type filter hook input priority 0; tcp dport 25 drop; }; }")
	seen := s.Capture(t)
	var waits []func() lab.Result
	mails := []netip.Addr{lab.Mail4, lab.Mail6, lab.Mapped(lab.Relay4)}
	for _, mail := range mails {
		sock := s.a.Socket(lab.Family(mail), unix.SOCK_STREAM, 0)
		waits = append(waits, sock.ConnectMeanwhile(at(mail, 25)))
	}
	await := func(n int) {
		for _, mail := range mails {
			seen.Await(t, n, "SYNs", func(p lab.Packet) bool { return p.SYN(25) && p.Dst.Addr() == mail.Unmap() })
		}
	}
	await(2)
	// Payments are kept when the policy is replaced.
	s.attach("--smtp-rate", scarce, "--smtp-burst", "3", "--preset", "aws")
	await(3)
	s.Server.NFT(t, "delete table inet deaf")
	for i, wait := range waits {
		if r := wait(); r.Errno != ok {
			t.Errorf("%s: %v", mails[i], r.Errno)
		}
	}
	if n := connections(seen.Settle(t), 25, netip.Addr{}); n != 3 {
		t.Errorf("SYNs of %d connections arrived, want 3", n)
	}
	s.expectMail(s.a, 3, 0)
}

func TestRefusedConnectionsArePaced(t *testing.T) {
	s := newScene(t)
	s.attach("--smtp-rate", "1/second", "--smtp-burst", "1")
	seen := s.Capture(t)
	begin := time.Now()
	if r := s.a.Connect(at(lab.Mail4, 25)); r.Errno != ok {
		t.Fatal(r.Errno)
	}
	// No connection fails: the kernel repeats the SYN until it gets through.
	if r := s.a.Connect(at(lab.Mail4, 25)); r.Errno != ok {
		t.Errorf("second connection: %v after %v", r.Errno, r.Elapsed)
	}
	if took := time.Since(begin); took < time.Second {
		t.Errorf("two connections in %v at one a second", took)
	}
	if n := connections(seen.Settle(t), 25, s.a.IPv4); n != 2 {
		t.Errorf("%d connections arrived, want 2", n)
	}
	s.expectMail(s.a, 2, 1)
}

func TestOverLimitReject(t *testing.T) {
	s := newScene(t)
	s.attach("--over-limit", "reject", "--smtp-rate", scarce, "--smtp-burst", "2")
	seen := s.Capture(t)
	for _, to := range []netip.Addr{lab.Mail4, lab.Mail6} {
		if r := s.a.Connect(at(to, 25)); r.Errno != ok {
			t.Errorf("%s within the limit: %v", to, r.Errno)
		}
	}
	over := []netip.Addr{lab.Mail4, lab.Mail6, lab.Mapped(lab.Mail4)}
	for _, to := range over {
		r := s.a.Connect(at(to, 25))
		if r.Errno != refused {
			t.Errorf("%s over the limit: %v, want ECONNREFUSED", to, r.Errno)
		}
		promptly(t, to.String(), r.Elapsed)
	}
	header := lab.Header{Src: s.a.IPv4, Dst: lab.Mail4, Proto: unix.IPPROTO_TCP}
	if r := s.a.Raw(header.Packet(lab.TCP(1024, 25, 1, 0x02)), lab.Mail4); r.Errno != denied {
		t.Errorf("forged SYN over the limit: %v, want EPERM", r.Errno)
	}
	if n := connections(seen.Settle(t), 25, netip.Addr{}); n != 2 {
		t.Errorf("%d connections arrived, want 2", n)
	}
	if got := s.row(s.a).SMTP; got.Allowed != 2 || got.RateLimited != 4 {
		t.Errorf("counted %+v, want 2 allowed, 4 limited", got.SMTP)
	}
	// A socket that connects again pays again.
	c := s.container("c")
	again := c.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	for i, want := range []syscall.Errno{ok, ok, refused} {
		if r := again.Connect(at(lab.Mail4, 25)); r.Errno != want {
			t.Errorf("connection %d of one socket: %v, want %v", i, r.Errno, want)
		}
		again.Disconnect()
	}
	// Early refusal takes no token: of many connections at once, exactly the burst gets
	// through.
	s.b.ConnectAtOnce(at(lab.Mail4, 25), 60)
	if n := connections(seen.Settle(t), 25, s.b.IPv4); n != 2 {
		t.Errorf("%d of 60 connections arrived, want 2", n)
	}
}

func TestAuditCountsEachMailConnectionOnce(t *testing.T) {
	for _, overLimit := range []string{"drop", "reject"} {
		t.Run(overLimit, func(t *testing.T) {
			s := newScene(t)
			s.attach("--mode", "audit", "--over-limit", overLimit, "--smtp-rate", scarce, "--smtp-burst", "1")
			seen := s.Capture(t)
			for range 10 {
				if r := s.a.Connect(at(lab.Mail4, 25)); r.Errno != ok {
					t.Error(r.Errno)
				}
			}
			if n := connections(seen.Settle(t), 25, netip.Addr{}); n != 10 {
				t.Errorf("%d of 10 connections arrived", n)
			}
			if got := s.row(s.a).SMTP; got.Allowed != 1 || got.RateLimited != 9 {
				t.Errorf("counted %+v, want 1 allowed, 9 limited", got.SMTP)
			}
		})
	}
}

// Mail to an exempt relay, and mail that does not leave the container, neither needs nor
// takes a token, with either value of --over-limit.
func TestMailThatIsNotCounted(t *testing.T) {
	for _, overLimit := range []string{"drop", "reject"} {
		t.Run(overLimit, func(t *testing.T) {
			s := newScene(t)
			s.attach("--over-limit", overLimit, "--smtp-rate", scarce, "--smtp-burst", "1",
				"--smtp-exempt", lab.Relay4.String()+"/32,"+lab.Relay6.String())
			s.a.Listen(t, 25)
			if r := s.a.Connect(at(lab.Mail4, 25)); r.Errno != ok {
				t.Fatal(r.Errno)
			}
			for name, addrs := range map[string][]netip.Addr{
				"to a relay":                 {lab.Relay4, lab.Relay6, lab.Mapped(lab.Relay4)},
				"to the loopback":            parse("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"),
				"to the unspecified address": parse("0.0.0.0", "::"),
				"to an own address":          {s.a.IPv4, s.a.IPv6, lab.Mapped(s.a.IPv4)},
			} {
				t.Run(name, func(t *testing.T) {
					before := s.row(s.a).SMTP
					for _, to := range addrs {
						sock := s.a.Socket(lab.Family(to), unix.SOCK_STREAM, 0)
						// Do not wait for a SYN that is dropped.
						sock.Set(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 500, nil)
						if r := sock.Connect(at(to, 25)); r.Errno != ok {
							t.Errorf("%s: %v", to, r.Errno)
						}
						sock.Close()
					}
					if after := s.row(s.a).SMTP; after.SMTP != before.SMTP {
						t.Errorf("counted %+v, before %+v", after.SMTP, before.SMTP)
					}
				})
			}
		})
	}
}

func parse(addrs ...string) (parsed []netip.Addr) {
	for _, a := range addrs {
		parsed = append(parsed, netip.MustParseAddr(a))
	}
	return parsed
}

// TestRestartKeepsTheBucket removes a container's cgroup and makes it again, as a restart
// does. The container keeps its tokens and its own limit. Another container starts with a
// full bucket.
func TestRestartKeepsTheBucket(t *testing.T) {
	for _, tt := range []struct{ name, container, other string }{
		{"child", "web", "web-2"},
		{"scope in a slice", "own.slice/" + scope(7), "own.slice/" + scope(8)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScene(t)
			path := filepath.Join(s.policed, tt.container)
			policed := filepath.Dir(path)
			if err := os.MkdirAll(policed, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Egressbpf(t, "detach") })
			s.Egressbpf(t, "attach", "--cgroup", policed, "--smtp-rate", scarce, "--smtp-burst", "3")
			seen := s.Capture(t)
			start := func(path string) *lab.Agent { return s.agent(s.a, path) }
			send := func(agent *lab.Agent) int {
				agent.ConnectAtOnce(at(lab.Mail4, 25), 10)
				defer seen.Forget()
				return connections(seen.Settle(t), 25, s.a.IPv4)
			}
			restart := func(path string, agent *lab.Agent) *lab.Agent {
				agent.End()
				testenv.Eventually(t, "remove "+path, func() bool { return os.Remove(path) == nil })
				return start(path)
			}
			agent := start(path)
			if n := send(agent); n != 3 {
				t.Errorf("%d connections, want 3", n)
			}
			agent = restart(path, agent)
			if n := send(agent); n != 0 {
				t.Errorf("%d connections after a restart, want 0", n)
			}
			s.Egressbpf(t, "limit", "set", path, "--rate", scarce, "--burst", "5")
			agent = restart(path, agent)
			if n := send(agent); n != 2 {
				t.Errorf("%d connections after another limit and a restart, want 2", n)
			}
			if got := s.Egressbpf(t, "limit", "get", path); !strings.Contains(got, "burst 5") {
				t.Errorf("limit after a restart: %s", got)
			}
			agent.End()
			if n := send(start(filepath.Join(s.policed, tt.other))); n != 3 {
				t.Errorf("%d connections of another container, want 3", n)
			}
		})
	}
}
