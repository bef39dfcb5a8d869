package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// vantage is the network of an agent, as far as packets show it.
type vantage struct {
	name string
	*lab.Netns
	own  netip.Addr
	link lab.Link
	// behind says whether the host receives packets that are sent here from a bridge.
	behind bool
}

func (s *scene) vantages() (container, host vantage) {
	s.t.Helper()
	mac := func(text string) net.HardwareAddr {
		addr, err := net.ParseMAC(text)
		if err != nil {
			s.t.Fatal(err)
		}
		return addr
	}
	device := func(ns *lab.Netns, name string) (addr net.HardwareAddr) {
		ns.Do(func() {
			if found, err := net.InterfaceByName(name); err == nil {
				addr = found.HardwareAddr
			}
		})
		return addr
	}
	container = vantage{"container's network", s.a.Netns, s.a.IPv4, lab.Link{
		Device: "eth0", Source: device(s.a.Netns, "eth0"), Gateway: mac("02:00:00:00:90:01"),
	}, true}
	host = vantage{"host's network", s.Host, netip.MustParseAddr("10.91.0.1"), lab.Link{
		Device: "server", Source: device(s.Host, "server"), Gateway: device(s.Server, "eth0"),
	}, false}
	return container, host
}

// mover is a socket that sends to the metadata service.
type mover struct {
	name string
	*lab.Socket
	port  uint16 // that it sends to, as no other does
	proto uint8
	fire  func(*lab.Socket) lab.Result
}

const packetSocket = "packet"

// movers opens a socket of each kind.
func movers(t *testing.T, a *lab.Agent, in vantage) []mover {
	t.Helper()
	meta := lab.Metadata4
	write := func(payload []byte, to netip.AddrPort) func(*lab.Socket) lab.Result {
		return func(s *lab.Socket) lab.Result { return s.Send(payload, to) }
	}
	connected := func(typ int, port uint16) *lab.Socket {
		t.Helper()
		s := a.Socket(unix.AF_INET, typ, 0)
		if r := s.Connect(at(meta, port)); r.Errno != ok {
			t.Fatal(r.Errno)
		}
		return s
	}
	hello := []byte("hello")
	forged := func(port uint16) []byte {
		return lab.Header{Src: in.own, Dst: meta, Proto: unix.IPPROTO_UDP}.Finished(lab.UDP(1024, port, 8))
	}
	packet := a.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if r := packet.BindLink(in.link.Device); r.Errno != ok {
		t.Fatal(r.Errno)
	}
	// Do not wait for a SYN that is dropped.
	tcp := a.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	return []mover{
		{"connected TCP", connected(unix.SOCK_STREAM, 80), 80, unix.IPPROTO_TCP, write(hello, netip.AddrPort{})},
		{"TCP", tcp, 465, unix.IPPROTO_TCP, func(s *lab.Socket) lab.Result { return s.Connect(at(meta, 465)) }},
		{"connected UDP", connected(unix.SOCK_DGRAM, 81), 81, unix.IPPROTO_UDP, func(s *lab.Socket) lab.Result {
			r := s.Send(hello, netip.AddrPort{})
			if r.Errno == refused { // by the server, the time before
				r = s.Send(hello, netip.AddrPort{})
			}
			return r
		}},
		{"UDP", a.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0), 82, unix.IPPROTO_UDP, write(hello, at(meta, 82))},
		{"raw", a.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW), 83, unix.IPPROTO_UDP, write(forged(83), at(meta, 0))},
		{packetSocket, packet, 84, unix.IPPROTO_UDP, write(in.link.Frame(forged(84)), netip.AddrPort{})},
	}
}

// fires says whether packets of a mover arrive.
func (m mover) fires(t *testing.T, seen *lab.Capture) bool {
	t.Helper()
	seen.Settle(t)
	seen.Forget()
	m.fire(m.Socket)
	return lab.Count(seen.Settle(t), func(p lab.Packet) bool { return p.Dst.Port() == m.port && p.Proto == m.proto }) > 0
}

// agentIn makes a cgroup, and starts an agent in it and in a network.
func (s *scene) agentIn(ns *lab.Netns, cgroup string) *lab.Agent {
	s.t.Helper()
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		s.t.Fatal(err)
	}
	return ns.Agent(s.t, cgroup)
}

func (s *scene) active(defence string) bool {
	s.t.Helper()
	status, _ := s.Status(s.t)
	return slices.ContainsFunc(status.Defences, func(d loader.Defence) bool { return d.Name == defence && d.Active })
}

// A socket belongs to the cgroup in which it was made, whoever has it now: see
// docs/threat-model.md, "Sockets that move".
func TestSocketsPassedOn(t *testing.T) {
	for _, fromContainer := range []bool{true, false} {
		for _, inHost := range []bool{true, false} {
			direction := map[bool]string{true: "out of a container", false: "into a container"}[fromContainer]
			t.Run(fmt.Sprintf("%s, host network %v", direction, inHost), func(t *testing.T) {
				s := newScene(t)
				in, host := s.vantages()
				if inHost {
					in = host
				}
				inside := s.agentIn(in.Netns, filepath.Join(s.policed, "c"))
				outside := s.agentIn(in.Netns, filepath.Join(lab.Cgroup(t), "accomplice"))
				from, to := outside, inside
				if fromContainer {
					from, to = inside, outside
				}
				sockets := movers(t, from, in)
				seen := s.Capture(t)
				for i := range sockets {
					sockets[i].Socket = sockets[i].Give(to)
					if !sockets[i].fires(t, seen) {
						t.Errorf("without the filter, %s: nothing arrived", sockets[i].name)
					}
				}
				// Sockets that are not connected start anew.
				sockets[1].Disconnect()
				s.attach()
				hostSide := s.active("host_side")
				for _, m := range sockets {
					stopped := in.behind && hostSide || fromContainer && m.name != packetSocket
					if arrived := m.fires(t, seen); arrived == stopped {
						t.Errorf("%s: arrived: %v, want it stopped: %v", m.name, arrived, stopped)
					}
				}
				c := &container{cgroup: filepath.Join(s.policed, "c")}
				got := s.row(c).Blocked
				if fromContainer && got.Packets < 3 || !fromContainer && got != (stats.Blocked{}) {
					t.Errorf("counted for the container: %+v", got)
				}
				if fromContainer {
					// The caller is in no container of the policed cgroup.
					if got := s.row(&container{cgroup: s.policed}).Blocked; got.Connects != 2 {
						t.Errorf("counted for the policed cgroup: %+v, want 2 connects", got)
					}
					// Mail counts for the container too.
					mail := inside.Socket(unix.AF_INET, unix.SOCK_STREAM, 0).Give(outside)
					if r := mail.Connect(at(lab.Mail4, 25)); r.Errno != ok {
						t.Error(r.Errno)
					}
					s.expectMail(c, 1, 0)
				}
				for _, m := range sockets {
					m.Close()
				}
			})
		}
	}
}

// When a process moves, its sockets keep their cgroup; new sockets belong to its new cgroup.
func TestProcessesMove(t *testing.T) {
	s := newScene(t)
	_, host := s.vantages()
	outside := lab.Cgroup(t)
	c := &container{cgroup: filepath.Join(s.policed, "c")}
	if err := os.Mkdir(c.cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	a := s.agentIn(s.Host, filepath.Join(outside, "p"))
	seen := s.Capture(t)
	expect := func(when string, sockets []mover, arrive bool) {
		t.Helper()
		for _, m := range sockets {
			if got := m.fires(t, seen); got != (arrive || m.name == packetSocket) {
				t.Errorf("%s, %s: arrived: %v, want %v", when, m.name, got, arrive)
			}
		}
	}
	before := movers(t, a, host)
	expect("without the filter", before, true)
	before[1].Disconnect()
	s.attach()

	a.Enter(c.cgroup)
	expect("moved in with its sockets", before, true) // documented: they are not the container's
	for i := range before {
		before[i].Close()
	}
	if got := s.row(c).Blocked; got != (stats.Blocked{}) {
		t.Errorf("counted for the container: %+v", got)
	}
	if r := a.Connect(at(lab.Metadata4, 80)); r.Errno != refused {
		t.Errorf("a new socket: %v, want ECONNREFUSED", r.Errno)
	}
	udp := a.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	raw := a.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	mail := a.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)

	a.Enter(filepath.Join(outside, "p"))
	counted := s.row(c).Blocked.Packets
	forged := lab.Header{Src: host.own, Dst: lab.Metadata4, Proto: unix.IPPROTO_UDP}.Finished(lab.UDP(1024, 83, 8))
	expect("moved out with its sockets", []mover{
		{"raw", raw, 83, unix.IPPROTO_UDP, func(s *lab.Socket) lab.Result { return s.Send(forged, at(lab.Metadata4, 0)) }},
		{"UDP", udp, 82, unix.IPPROTO_UDP, func(s *lab.Socket) lab.Result { return s.Send([]byte("hello"), at(lab.Metadata4, 82)) }},
	}, false)
	if got := s.row(c).Blocked.Packets; got <= counted {
		t.Errorf("counted for the container: %d packets, before %d", got, counted)
	}
	if r := mail.Connect(at(lab.Mail4, 25)); r.Errno != ok {
		t.Error(r.Errno)
	}
	s.expectMail(c, 1, 0)
	if r := a.Connect(at(lab.Metadata4, 80)); r.Errno != ok {
		t.Errorf("a new socket of who has left: %v", r.Errno)
	}
}

// Threads can have a cgroup of their own below a container. They are in the container.
func TestThreadedCgroups(t *testing.T) {
	s := newScene(t)
	c := s.container("c")
	threads := filepath.Join(c.cgroup, "threads")
	nested := filepath.Join(threads, "nested")
	for _, dir := range []string{threads, nested} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.type"), []byte("threaded"), 0); err != nil {
			t.Fatal(err)
		}
	}
	// They start in the cgroup above: no process can start in a threaded cgroup.
	agents := []*lab.Agent{c.Agent, s.agent(c, c.cgroup), s.agent(c, c.cgroup)}
	agents[1].Enter(threads)
	agents[2].Enter(nested)
	if r := agents[2].Connect(at(lab.Metadata4, 80)); r.Errno != ok {
		t.Errorf("without the filter: %v", r.Errno)
	}
	s.attach("--smtp-rate", scarce)
	seen := s.Capture(t)
	for _, a := range agents {
		if r := a.Connect(at(lab.Metadata4, 80)); r.Errno != refused {
			t.Errorf("metadata: %v, want ECONNREFUSED", r.Errno)
		}
		a.ConnectAtOnce(at(lab.Mail4, 25), 20)
	}
	if n := connections(seen.Settle(t), 25, c.IPv4); n != 5 {
		t.Errorf("%d of 60 connections arrived, want 5", n)
	}
	s.expectMail(c, 5, 55)
	if n := s.row(c).Blocked.Connects; n != uint64(len(agents)) {
		t.Errorf("%d of %d refusals are counted for the container", n, len(agents))
	}
}

// A container that is removed is policed and counted until its last socket is gone.
func TestSocketsOutliveTheirCgroup(t *testing.T) {
	s := newScene(t)
	s.attach("--smtp-rate", scarce, "--smtp-burst", "1")
	c := s.container("c")
	udp := c.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	raw := c.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	var mails []*lab.Socket
	for range 5 {
		mails = append(mails, c.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0))
	}
	id := s.row(c).CgroupID
	find := func() (row stats.Container, found bool) {
		rows := s.Stats(t).Containers
		if i := slices.IndexFunc(rows, func(row stats.Container) bool { return row.CgroupID == id }); i >= 0 {
			return rows[i], true
		}
		return row, false
	}

	c.Enter(lab.Cgroup(t))
	if err := unix.Rmdir(c.cgroup); err != nil {
		t.Fatal(err)
	}
	seen := s.Capture(t)
	if r := udp.Send([]byte("hello"), at(lab.Metadata4, 80)); r.Errno != denied && r.Errno != refused {
		t.Errorf("UDP: %v, want it refused", r.Errno)
	}
	forged := lab.Header{Src: c.IPv4, Dst: lab.Metadata4, Proto: unix.IPPROTO_UDP}.Finished(lab.UDP(1024, 83, 8))
	if r := raw.Send(forged, at(lab.Metadata4, 0)); r.Errno != denied {
		t.Errorf("raw: %v, want EPERM", r.Errno)
	}
	for _, mail := range mails {
		mail.Connect(at(lab.Mail4, 25))
	}
	packets := seen.Settle(t)
	// The tokens are for a restart of the container.
	if n := connections(packets, 25, c.IPv4); n > 0 {
		t.Errorf("%d mail connections arrived, want none", n)
	}
	if n := lab.Count(packets, func(p lab.Packet) bool { return p.Dst.Addr() == lab.Metadata4 }); n > 0 {
		t.Errorf("arrived: %v", packets)
	}
	if row, found := find(); found {
		t.Errorf("a container that was removed has a row: %+v", row)
	}
	// One by one: the cgroup is known as a container's until the last is closed.
	udp.Close()
	for _, mail := range mails {
		mail.Close()
	}
	if r := raw.Send(forged, at(lab.Metadata4, 0)); r.Errno != denied {
		t.Errorf("raw, the last socket: %v, want EPERM", r.Errno)
	}
	raw.Close()
	if total := s.Stats(t).Total; total.SMTP.NoBucket < 5 || total.SMTP.Allowed > 0 || total.Blocked.Packets < 2 {
		t.Errorf("total: %+v, want all that was stopped", total)
	}
}

// A packet socket that was open before goes on sending. The host judges its packets, and attach
// warns about it.
func TestPacketSocketMadeBeforeAttach(t *testing.T) {
	s := newScene(t)
	in, _ := s.vantages()
	m := movers(t, s.a.Agent, in)[5]
	seen := s.Capture(t)
	if !m.fires(t, seen) {
		t.Fatal("without the filter nothing arrived")
	}
	for _, hostSide := range []string{"off", "on"} {
		t.Cleanup(func() { s.Egressbpf(t, "detach") })
		exit := s.Run(t, exec.Command(lab.Binary(t), "attach", "--cgroup", s.policed, "--host-side", hostSide))
		if exit.Code != 0 {
			t.Fatal(exit.Stderr)
		}
		if arrived, stopped := m.fires(t, seen), hostSide == "on" && s.active("host_side"); arrived == stopped {
			t.Errorf("host side %s: arrived: %v, want it stopped: %v", hostSide, arrived, stopped)
		}
		families := s.active("socket_families")
		warned := strings.Contains(exit.Stderr, "container a still has sockets open that it could not open now (packet)") &&
			strings.Contains(exit.Stderr, "restart it")
		if warned != families || strings.Contains(exit.Stderr, "container b") {
			t.Errorf("with socket_families active: %v, attach said: %s", families, exit.Stderr)
		}
	}
}
