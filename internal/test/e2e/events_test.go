package e2e

import (
	"bufio"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// monitor is a running `egressbpf monitor`.
type monitor struct {
	cmd *exec.Cmd

	mu      sync.Mutex
	records []events.Record
}

// monitor starts one and waits until it reads.
func (s *scene) monitor() *monitor {
	s.t.Helper()
	m := &monitor{cmd: exec.Command(lab.Binary(s.t), "monitor", "--output", "json", "--docker-host", "unix:///nowhere")}
	stdout, err := m.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	stderr := &strings.Builder{}
	m.cmd.Stderr = stderr
	s.Host.Do(func() { err = m.cmd.Start() })
	if err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			var r events.Record
			if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
				s.t.Errorf("%v: %s", err, lines.Bytes())
			}
			m.mu.Lock()
			m.records = append(m.records, r)
			m.mu.Unlock()
		}
	}()
	s.t.Cleanup(func() {
		m.signal(s.t, unix.SIGTERM)
		<-ended
		if err := m.cmd.Wait(); err != nil {
			s.t.Errorf("monitor: %v\n%s", err, stderr)
		}
	})
	soon(s.t, "monitor starts", func() bool { return len(m.all()) > 0 })
	return m
}

func (m *monitor) signal(t *testing.T, sig unix.Signal) {
	t.Helper()
	if err := m.cmd.Process.Signal(sig); err != nil {
		t.Error(err)
	}
}

func (m *monitor) all() []events.Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.records)
}

// told returns how many refusals of a container the records stand for, with those that were lost
// and may be of any container.
func (m *monitor) told(c *container) (n uint64) {
	for _, r := range m.all() {
		switch {
		case r.Type == events.Lost, r.Type == events.Suppressed && r.Container.ID == filepath.Base(c.cgroup):
			n += r.Count
		case r.Type == events.Refusal && r.Container != nil && r.Container.ID == filepath.Base(c.cgroup):
			n++
		}
	}
	return n
}

// refusedOf returns how much was refused of a container, by the counters.
func refusedOf(row stats.Container) uint64 {
	return row.Blocked.Packets + row.Blocked.Connects + row.Malformed.Packets + row.SMTP.RateLimited + row.SMTP.NoBucket +
		row.Families.Denied + row.HostSide.Packets
}

// expectTold waits until a monitor has told of all that was refused of a container.
func (s *scene) expectTold(m *monitor, c *container) {
	s.t.Helper()
	defer func() {
		if s.t.Failed() {
			s.t.Logf("%d are told, %d counted", m.told(c), refusedOf(s.row(c)))
		}
	}()
	soon(s.t, "monitor tells what the counters say", func() bool {
		before := refusedOf(s.row(c))
		return before == m.told(c) && before == refusedOf(s.row(c))
	})
}

// metric returns how much was refused of a container, by the metrics.
func (s *scene) metric(c *container) (n uint64) {
	s.t.Helper()
	counter := regexp.MustCompile(`(?m)^egressbpf_container_(?:dropped_packets|refused_connects|refused_sockets|host_dropped_packets)_total\{[^}]*id="` +
		filepath.Base(c.cgroup) + `"[^}]*\} (\d+)$`)
	for _, match := range counter.FindAllStringSubmatch(s.Egressbpf(s.t, "stats", "--output", "prometheus"), -1) {
		value, err := strconv.ParseUint(match[1], 10, 64)
		if err != nil {
			s.t.Fatal(err)
		}
		n += value
	}
	return n
}

// TestMonitor compares what monitor tells with the counters and with what arrives.
func TestMonitor(t *testing.T) {
	s := newScene(t)
	s.attach()
	seen := s.Capture(t)
	m := s.monitor()
	for _, a := range attempts() {
		a.do(s.a)
	}
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	s.expectTold(m, s.a)
	hooks := map[string]bool{}
	for _, r := range m.all()[1:] {
		if r.Type != events.Refusal {
			continue
		}
		hooks[r.Hook] = true
		if r.Destination == nil || r.Blocked == nil || !*r.Blocked || r.Reason == "" {
			t.Errorf("incomplete: %+v", r)
		}
		if asks := r.Hook == events.HookConnect || r.Hook == events.HookSendmsg; asks != (r.Process != nil) {
			t.Errorf("at hook %s, the process is %+v", r.Hook, r.Process)
		}
		if to := r.Destination.Address; r.Reason == events.ReasonBlocked && (to == lab.Metadata4 || to == lab.Metadata6) && r.Rule == "" {
			t.Errorf("no rule: %+v", r)
		}
	}
	for _, hook := range []string{events.HookConnect, events.HookSendmsg, events.HookPacket} {
		if !hooks[hook] {
			t.Errorf("nothing was told of hook %s", hook)
		}
	}

	if counted, metric := refusedOf(s.row(s.a)), s.metric(s.a); counted != metric || counted == 0 {
		t.Errorf("%d refusals are counted, %d by the metrics", counted, metric)
	}

	s.b.ConnectAtOnce(at(lab.Mail4, 25), 60)
	if n := connections(seen.Settle(t), 25, s.b.IPv4); n != 5 {
		t.Errorf("%d connections arrived, want 5", n)
	}
	s.expectTold(m, s.b)
	for _, r := range m.all() {
		if r.Reason != events.ReasonRateLimited {
			continue
		}
		if r.Process == nil || r.Process.PID == 0 || r.Rule != "smtp" || r.Destination.Port != 25 || r.Source == nil || r.Source.Address != s.b.IPv4 || r.Bytes == 0 {
			t.Errorf("over the limit: %+v, process %+v, rule %q", r, r.Process, r.Rule)
		}
	}
}

// TestMonitorOfTheHostSide tells of packets past the filter. Whose they are is known on some
// kernels alone.
func TestMonitorOfTheHostSide(t *testing.T) {
	s := newScene(t)
	s.attachHost()
	m := s.monitor()
	s.forge(s.a, segment(at(s.a.IPv4, 1024), at(lab.Metadata4, 80), 1, 0, tcpSYN))
	soon(t, "a refusal of the host side", func() bool {
		return slices.ContainsFunc(m.all(), func(r events.Record) bool {
			return r.Hook == events.HookHost && r.Reason == events.ReasonBlocked && r.Interface == "br0" &&
				r.Destination != nil && r.Destination.Address == lab.Metadata4 && r.Destination.Port == 80 && r.Rule != ""
		})
	})
}

// TestStoppedMonitor stops one for longer than the programs wait for it. It disturbs nobody, and
// says what it has missed.
func TestStoppedMonitor(t *testing.T) {
	s := newScene(t)
	s.attach()
	stopped, other := s.monitor(), s.monitor()
	connect := func(n int) {
		for range n {
			s.a.Connect(at(lab.Metadata4, 80))
		}
	}
	connect(2)
	s.expectTold(stopped, s.a)
	stopped.signal(t, unix.SIGSTOP)
	connect(2)
	s.expectTold(other, s.a)
	// The programs find out when they tell of something.
	soon(t, "the programs pass the stopped one over", func() bool {
		connect(1)
		return s.readers() == 1
	})
	connect(2)
	stopped.signal(t, unix.SIGCONT)
	s.expectTold(other, s.a)
	s.expectTold(stopped, s.a)
	if !slices.ContainsFunc(stopped.all(), func(r events.Record) bool { return r.Type == events.Lost && r.Stage == events.StageReader }) {
		t.Error("the stopped one has lost nothing")
	}
	connect(2)
	s.expectTold(stopped, s.a)
}

// TestKilledMonitors kills more monitors than there can be. Each is forgotten after a while.
func TestKilledMonitors(t *testing.T) {
	s := newScene(t)
	s.attach()
	command := func() *exec.Cmd {
		return exec.Command(lab.Binary(t), "monitor", "--output", "json", "--limit", "1", "--docker-host", "unix:///nowhere")
	}
	var all []*exec.Cmd
	for range maps.MaxReaders {
		cmd := command()
		stdout, err := cmd.StdoutPipe()
		if err == nil {
			s.Host.Do(func() { err = cmd.Start() })
		}
		if err != nil {
			t.Fatal(err)
		}
		if !bufio.NewScanner(stdout).Scan() {
			t.Fatal("monitor has no seat")
		}
		all = append(all, cmd)
	}
	if exit := s.Run(t, command()); exit.Code != 1 || !strings.Contains(exit.Stderr, maps.ErrNoSeat.Error()) {
		t.Errorf("one more: %+v", exit)
	}
	for _, cmd := range all {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait() // killed
	}
	soon(t, "the programs pass them over", func() bool {
		s.a.Connect(at(lab.Metadata4, 80))
		return s.readers() == 0
	})
	soon(t, "a seat is free", func() bool { return s.Run(t, exec.Command("timeout", "1", lab.Binary(t), "monitor")).Code == 124 })
}

// readers returns how many readers get events.
func (s *scene) readers() (n int) {
	s.t.Helper()
	m, err := ebpf.LoadPinnedMap("/sys/fs/bpf/egressbpf/"+bpf.EgressMapReaders, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer m.Close()
	var a bpf.EgressAudience
	if err := m.Lookup(uint32(0), &a); err != nil {
		s.t.Fatal(err)
	}
	for _, waits := range a.Waiting {
		n += int(waits)
	}
	return n
}
