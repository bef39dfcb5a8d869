// Package e2e tests the real command with real packets. Containers, which are made of network
// namespaces and cgroups, send packets, and the tests check what arrives at a server beyond the
// host.
package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

func TestMain(m *testing.M) {
	lab.Main(m, nil, fmt.Sprintf("/egressbpf-e2e-%d", os.Getpid()))
}

// scene is a network with a cgroup to be policed and containers below it.
type scene struct {
	*lab.Network
	t       *testing.T
	policed string
	a, b    *container
}

type container struct {
	*lab.Container
	*lab.Agent
	cgroup string
}

func newScene(t *testing.T) *scene {
	t.Helper()
	s := &scene{Network: lab.New(t), t: t, policed: lab.Cgroup(t)}
	s.a, s.b = s.container("a"), s.container("b")
	return s
}

// container adds a container with an agent in it.
func (s *scene) container(name string) *container {
	s.t.Helper()
	c := &container{Container: s.Container(s.t), cgroup: filepath.Join(s.policed, name)}
	c.Agent = s.agent(c, c.cgroup)
	return c
}

// help lets a process that is not policed forge the peers of the container's sockets. The
// container itself may not forge packets of mail servers.
func (s *scene) help(c *container) *container {
	s.t.Helper()
	c.Accomplice(s.agent(c, filepath.Join(filepath.Dir(s.policed), "accomplice")))
	return c
}

// agent starts one more agent in a container, in a cgroup that it makes.
func (s *scene) agent(c *container, cgroup string) *lab.Agent {
	s.t.Helper()
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		s.t.Fatal(err)
	}
	return c.Container.Agent(s.t, cgroup)
}

// attach attaches the filter and waits for the command to end. The filter is detached after the
// test.
func (s *scene) attach(flags ...string) {
	s.t.Helper()
	s.t.Cleanup(func() { s.Egressbpf(s.t, "detach") })
	s.Egressbpf(s.t, append([]string{"attach", "--cgroup", s.policed}, flags...)...)
	status, _ := s.Status(s.t)
	for _, h := range status.Hooks {
		if !h.Attached {
			s.t.Fatalf("after attach, hook %s is not: %s", h.Name, h.Reason)
		}
	}
}

// row returns the counters of a container.
func (s *scene) row(c *container) stats.Container {
	s.t.Helper()
	for _, row := range s.Stats(s.t).Containers {
		if row.ID == filepath.Base(c.cgroup) {
			return row
		}
	}
	s.t.Fatalf("stats have no row for %s", c.cgroup)
	return stats.Container{}
}

// expectMail checks a container's mail counters. SYNs over the limit are repeated, so there
// may be more of them than wanted, unless none are wanted.
func (s *scene) expectMail(c *container, allowed, limited uint64) {
	s.t.Helper()
	got := s.row(c).SMTP
	if got.Allowed != allowed || got.RateLimited < limited || limited == 0 && got.RateLimited > 0 || got.NoBucket > 0 {
		s.t.Errorf("%s: mail %+v, want %d allowed, %d limited (or more, if any), none without a bucket",
			filepath.Base(c.cgroup), got.SMTP, allowed, limited)
	}
}

// connections returns the number of connections to a port that the SYNs among the packets
// belong to, from one address if that is valid.
func connections(packets []lab.Packet, port uint16, from netip.Addr) int {
	type key struct {
		src, dst netip.AddrPort
		seq      uint32
	}
	seen := map[key]bool{}
	for _, p := range packets {
		if p.SYN(port) && (!from.IsValid() || p.Src.Addr() == from) {
			seen[key{p.Src, p.Dst, p.Seq}] = true
		}
	}
	return len(seen)
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// promptly checks that a refusal came at once.
func promptly(t *testing.T, what string, elapsed time.Duration) {
	t.Helper()
	if elapsed > time.Second {
		t.Errorf("%s: refused after %v, want at once", what, elapsed)
	}
}
