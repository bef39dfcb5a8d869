package dockertest

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

const (
	ok      = syscall.Errno(0)
	refused = unix.ECONNREFUSED
	denied  = unix.EPERM
)

const policed = cgroups + "/docker"

// TestDocker goes through the life of a host: the filter before the engine, containers, and
// the end of the filter.
func TestDocker(t *testing.T) {
	n := lab.New(t)
	if status := expectStatus(t, n, 3); len(status.Uncovered) > 0 {
		t.Fatalf("this machine runs other Docker containers, which status would tell of: %+v", status.Uncovered)
	}
	n.Egressbpf(t, "attach")
	expectStatus(t, n, 0)
	lab.ExpectPrograms(t, cgroups, 1)
	e := startEngine(t, n)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *engine)
	}{
		{"first instruction", testFirstInstruction},
		{"metadata", testMetadata},
		{"buckets", testBuckets},
		{"host network", testHostNetwork},
		{"meddling", testMeddling},
		{"churn", testChurn},
		{"exec", testExec},
		{"nested", testNested},
		{"restart", testRestart},
		{"limit", testLimit},
		{"other parent", testOtherParent},
		{"removal", testRemoval},
		{"firewall", testFirewall},
		{"detach", testDetach},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, e) })
	}
	if left := e.docker(t, "ps", "-aq"); left != "" {
		t.Errorf("containers are left: %s", left)
	}
	entries, err := os.ReadDir(policed)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if entry.IsDir() {
			t.Errorf("cgroup %s is left", entry.Name())
		}
	}
}

func expectStatus(t *testing.T, n *lab.Network, want int) lab.FilterStatus {
	t.Helper()
	status, code := n.Status(t)
	if code != want {
		t.Errorf("status: exit code %d, want %d: %+v", code, want, status)
	}
	return status
}

// row returns the counters of a container, by its id.
func row(t *testing.T, n *lab.Network, id string) stats.Container {
	t.Helper()
	for _, c := range n.Stats(t).Containers {
		if c.ID == id {
			if c.Cgroup != "/docker/"+id {
				t.Errorf("container %s has cgroup %s", id, c.Cgroup)
			}
			return c
		}
	}
	t.Fatalf("stats have no row for container %s", id)
	return stats.Container{}
}

// syns returns the number of connections to a port that the SYNs among the packets belong to.
func syns(packets []lab.Packet, port uint16) int {
	seen := map[[2]any]bool{}
	for _, p := range packets {
		if p.SYN(port) {
			seen[[2]any{p.Src, p.Seq}] = true
		}
	}
	return len(seen)
}

// expectBurst checks that five of a number of mail connections have arrived, and nothing else.
func expectBurst(t *testing.T, packets []lab.Packet, attempts int) {
	t.Helper()
	if n := syns(packets, 25); n != 5 {
		t.Errorf("%d of %d mail connections arrived, want 5", n, attempts)
	}
	if n := lab.Count(packets, func(p lab.Packet) bool { return p.Dst.Addr() != lab.Mail4 }); n > 0 {
		t.Errorf("arrived: %v", packets)
	}
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

func testFirstInstruction(t *testing.T, e *engine) {
	seen := e.Capture(t)
	// First wget, for both addresses, then wait for the end of stdin.
	script := `for host in 169.254.169.254 [fd00:ec2::254]; do
		busybox wget -O - http://$host/latest/meta-data/ 2>&1
	done; echo; echo done; read`
	cmd := e.command("run", "-i", "--name", "first", image, "/bin/busybox", "sh", "-c", script)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	e.removeAfter(t, "first")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	defer stdin.Close()
	said := readUntil(t, stdout, "done")
	if n := strings.Count(said, "Connection refused"); n != 2 {
		t.Errorf("%d of 2 requests were refused: %s", n, said)
	}
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	if c := row(t, e.Network, e.id(t, "first")); c.Blocked.Connects != 2 || c.Blocked.Packets != 0 {
		t.Errorf("counted %+v, want 2 connects", c.Blocked)
	}
}

func testMetadata(t *testing.T, e *engine) {
	c := e.run(t, "metadata")
	seen := e.Capture(t)
	expectMetadataRefused(t, c.Agent)
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	if row := row(t, e.Network, c.id); row.Blocked.Connects != 3 || row.Blocked.Packets != 2 || row.Blocked.Bytes == 0 {
		t.Errorf("counted %+v, want 3 connects, 2 packets", row.Blocked)
	}
	// Everything else works as before.
	for _, to := range []netip.Addr{lab.Other4, lab.Other6} {
		if sent, received := c.Transfer(at(to, 80), 1<<20); received != sent.String() {
			t.Errorf("transfer to %s: sent %s, received %s", to, sent, received)
		}
	}
	for _, network := range []string{"udp", "tcp"} {
		if addr, err := c.Resolve(lab.Resolver, network); err != nil || addr != lab.ResolvedTo {
			t.Errorf("DNS over %s: %v, %v", network, addr, err)
		}
	}
}

// expectMetadataRefused tries three connects and two raw packets.
func expectMetadataRefused(t *testing.T, a *lab.Agent) {
	t.Helper()
	for _, to := range []netip.Addr{lab.Metadata4, lab.Metadata6, lab.Mapped(lab.Metadata4)} {
		if r := a.Connect(at(to, 80)); r.Errno != refused {
			t.Errorf("TCP to %s: %v, want ECONNREFUSED", to, r.Errno)
		}
	}
	for to, proto := range map[netip.Addr]int{lab.Metadata4: unix.IPPROTO_ICMP, lab.Metadata6: unix.IPPROTO_ICMPV6} {
		s := a.Socket(lab.Family(to), unix.SOCK_RAW, proto)
		if r := s.Send(lab.Echo(to.Is6()), at(to, 0)); r.Errno != denied {
			t.Errorf("echo to %s: %v, want EPERM", to, r.Errno)
		}
		s.Close()
	}
}

func testBuckets(t *testing.T, e *engine) {
	a, b := e.run(t, "one"), e.run(t, "two")
	seen := e.Capture(t)
	ports := map[*container]uint16{a: 25, b: 465}
	var both sync.WaitGroup
	for c, port := range ports {
		both.Go(func() { c.ConnectAtOnce(at(lab.Mail4, port), 60) })
	}
	both.Wait()
	packets := seen.Settle(t)
	for c, port := range ports {
		if n := syns(packets, port); n != 5 {
			t.Errorf("%d of 60 connections to port %d arrived, want 5", n, port)
		}
		if got := row(t, e.Network, c.id).SMTP; got.Allowed != 5 || got.RateLimited < 55 || got.NoBucket != 0 {
			t.Errorf("counted %+v, want 5 allowed and 55 limited", got.SMTP)
		}
	}
}

func testHostNetwork(t *testing.T, e *engine) {
	c := e.run(t, "host", "--network=host")
	seen := e.Capture(t)
	expectMetadataRefused(t, c.Agent)
	c.ConnectAtOnce(at(lab.Mail4, 25), 60)
	expectBurst(t, seen.Settle(t), 60)
	if got := row(t, e.Network, c.id); got.SMTP.Allowed != 5 || got.Blocked.Connects != 3 || got.Blocked.Packets != 2 {
		t.Errorf("counted %+v", got)
	}
}

// testMeddling lets containers try to change the filter, with Docker's default capabilities
// and with more.
func testMeddling(t *testing.T, e *engine) {
	status, _ := e.Status(t)
	egress := status.Hooks[0]
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(egress.Program))
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		t.Fatal(err)
	}
	ids, _ := info.MapIDs()
	if len(ids) == 0 {
		t.Fatal("the program has no maps")
	}
	of := lab.Meddling{Link: egress.Link, Program: egress.Program, Map: uint32(ids[0])}
	for _, with := range [][]string{nil, {"--cap-add=NET_ADMIN", "--cap-add=NET_RAW", "--security-opt=seccomp=unconfined"}} {
		c := e.run(t, fmt.Sprint("meddler-", len(with)), with...)
		if done := c.Meddle(of); len(done) > 0 {
			t.Errorf("with %v, a container could %s", with, strings.Join(done, ", "))
		}
		if c.Overrule(lab.OwnCgroup) == nil {
			t.Errorf("with %v, a container could attach a program of its own", with)
		}
		expectMetadataRefused(t, c.Agent)
	}
	expectStatus(t, e.Network, 0)
}

func testExec(t *testing.T, e *engine) {
	c := e.run(t, "exec")
	seen := e.Capture(t)
	e.exec(t, "exec").ConnectAtOnce(at(lab.Mail4, 25), 60)
	c.ConnectAtOnce(at(lab.Mail4, 25), 60)
	another := e.exec(t, "exec")
	another.ConnectAtOnce(at(lab.Mail6, 25), 60)
	if n := syns(seen.Settle(t), 25); n != 5 {
		t.Errorf("%d of 180 connections arrived, want 5", n)
	}
	if got := row(t, e.Network, c.id).SMTP; got.Allowed != 5 || got.RateLimited < 175 {
		t.Errorf("counted %+v, want 5 allowed and 175 limited", got.SMTP)
	}
	expectMetadataRefused(t, another)
}

func testRestart(t *testing.T, e *engine) {
	id := e.sleeper(t, "restart")
	before := row(t, e.Network, id)
	e.docker(t, "restart", "-t", "0", "restart")
	if after := row(t, e.Network, id); after.CgroupID == before.CgroupID {
		t.Error("the same cgroup after a restart")
	}
	seen := e.Capture(t)
	expectMetadataRefused(t, e.exec(t, "restart"))
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	if got := row(t, e.Network, id); got.Blocked.Connects != 3 || got.Blocked.Packets != 2 {
		t.Errorf("counted %+v", got.Blocked)
	}
	expectStatus(t, e.Network, 0)
}

func testLimit(t *testing.T, e *engine) {
	c := e.run(t, "limit")
	seen := e.Capture(t)
	// Of 60 more connections, the expected number gets through.
	expect := func(want int) {
		t.Helper()
		c.ConnectAtOnce(at(lab.Mail4, 25), 60)
		if n := syns(seen.Settle(t), 25); n != want {
			t.Errorf("%d connections arrived, want %d", n, want)
		}
		seen.Forget()
	}
	name := c.id[:12]
	e.Egressbpf(t, "limit", "set", name, "--rate", "1/day", "--burst", "3")
	if got := strings.TrimSpace(e.Egressbpf(t, "limit", "get", name)); got != "1/day, burst 3" {
		t.Errorf("limit get: %s", got)
	}
	expect(3)
	e.Egressbpf(t, "limit", "set", name, "--burst", "20")
	expect(17) // the 3 stay taken
	e.Egressbpf(t, "limit", "set", name, "--rate", "unlimited")
	expect(60)
	if got := row(t, e.Network, c.id).SMTP; got.Rate.String() != "unlimited" || got.Allowed < 80 {
		t.Errorf("stats: %+v, want at least 80 allowed without a limit", got)
	}
	e.Egressbpf(t, "limit", "unset", name)
	if got := row(t, e.Network, c.id).SMTP; got.Rate.String() != "5/minute" || got.Burst != 5 {
		t.Errorf("limit after unset: %s, burst %d", got.Rate, got.Burst)
	}
	if exit := lab.Run(t, exec.Command(lab.Binary(t), "limit", "set", "no-such", "--burst", "3")); exit.Code != 1 {
		t.Errorf("limit of a container that does not exist: exit code %d, want 1", exit.Code)
	}
}

// A container is recognised wherever its cgroup is.
func testOtherParent(t *testing.T, e *engine) {
	c := e.run(t, "other-parent", "--cgroup-parent", outside)
	expectMetadataRefused(t, c.Agent)
	rows := e.Stats(t).Containers
	i := slices.IndexFunc(rows, func(r stats.Container) bool { return r.Cgroup == outside+"/"+c.id })
	if i < 0 || rows[i].ID != c.id || rows[i].Blocked.Connects == 0 {
		t.Errorf("stats: %+v", rows)
	}
	expectStatus(t, e.Network, 0)
}

func testRemoval(t *testing.T, e *engine) {
	before := e.Stats(t).Total
	c := e.run(t, "removal")
	expectMetadataRefused(t, c.Agent)
	c.ConnectAtOnce(at(lab.Mail4, 25), 60)
	had := row(t, e.Network, c.id)
	e.Egressbpf(t, "limit", "set", c.id, "--burst", "7")
	e.docker(t, "rm", "-f", "removal")
	// The kernel may take a while to release a cgroup.
	testenv.Eventually(t, "row gone", func() bool {
		for _, row := range e.Stats(t).Containers {
			if row.CgroupID == had.CgroupID {
				return false
			}
		}
		return true
	})
	total := e.Stats(t).Total
	if total.Blocked.Connects != before.Blocked.Connects+had.Blocked.Connects ||
		total.Blocked.Bytes != before.Blocked.Bytes+had.Blocked.Bytes ||
		total.SMTP.Allowed != before.SMTP.Allowed+5 || total.SMTP.RateLimited != before.SMTP.RateLimited+had.SMTP.RateLimited {
		t.Errorf("total was %+v, is %+v, and the container that is gone had %+v", before, total, had)
	}
}

// The filter does not depend on the firewall.
func testFirewall(t *testing.T, e *engine) {
	c := e.run(t, "firewall")
	e.Host.NFT(t, "flush ruleset")
	seen := e.Capture(t)
	expectMetadataRefused(t, c.Agent)
	c.ConnectAtOnce(at(lab.Mail4, 25), 60)
	expectBurst(t, seen.Settle(t), 60)
}

func testDetach(t *testing.T, e *engine) {
	c := e.run(t, "detach")
	lab.ExpectPrograms(t, cgroups, 1) // no other filter is here
	e.Egressbpf(t, "detach")
	lab.ExpectPrograms(t, cgroups, 0)
	expectStatus(t, e.Network, 3)
	if _, err := os.Stat(loader.DefaultPinPath); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is left: %v", loader.DefaultPinPath, err)
	}
	seen := e.Capture(t)
	for _, to := range []netip.Addr{lab.Metadata4, lab.Metadata6, lab.Mapped(lab.Metadata4)} {
		seen.Forget()
		if r := c.Connect(at(to, 80)); r.Errno != ok {
			t.Errorf("after detach, TCP to %s: %v", to, r.Errno)
		}
		if len(seen.Settle(t)) == 0 {
			t.Errorf("after detach, nothing arrived at %s", to)
		}
	}
	e.Egressbpf(t, "detach")
}
