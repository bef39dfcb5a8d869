package stats_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// host has a filter and a reader of its stats.
type host struct {
	*stats.Reader
	t      *testing.T
	filter *loader.Filter
	root   cgroup.Root
	base   string
	state  *maps.State
}

// newHost attaches the default policy to the named cgroups below the base.
func newHost(t *testing.T, names ...string) *host {
	t.Helper()
	h := &host{t: t, root: testenv.Root(t), base: testenv.Cgroup(t), filter: testenv.Filter(t)}
	h.attach(policy.Default(), names...)
	var err error
	h.Reader, err = stats.Open(h.filter, h.root)
	check(t, err)
	t.Cleanup(func() { check(t, h.Reader.Close()) })
	h.state, err = h.filter.State()
	check(t, err)
	t.Cleanup(func() { check(t, h.state.Close()) })
	return h
}

func (h *host) attach(p policy.Policy, names ...string) {
	h.t.Helper()
	var paths []string
	for _, name := range names {
		paths = append(paths, h.path(name))
	}
	check(h.t, h.filter.Attach(h.t.Context(), paths, p))
}

func (h *host) path(name string) string { return filepath.Join(h.base, name) }

// rel is the path of a cgroup as stats show it.
func (h *host) rel(name string) string { return strings.TrimPrefix(h.path(name), string(h.root)) }

// mkdir makes a cgroup and returns its id.
func (h *host) mkdir(name string) uint64 {
	h.t.Helper()
	check(h.t, os.MkdirAll(h.path(name), 0o755))
	id, err := h.root.ID(h.rel(name))
	check(h.t, err)
	return id
}

// put writes what the programs would have.
func (h *host) put(id uint64, c maps.Container) {
	h.t.Helper()
	check(h.t, h.state.ByName()[bpf.EgressMapContainers].Put(id, c))
}

func (h *host) read() *stats.Stats {
	h.t.Helper()
	s, err := h.Read()
	check(h.t, err)
	return s
}

// rows returns the paths of all rows, below the base where they are there.
func (h *host) rows() (names []string) {
	h.t.Helper()
	for _, c := range h.read().Containers {
		names = append(names, strings.TrimPrefix(c.Cgroup, h.rel("")+"/"))
	}
	return names
}

func (h *host) row(id uint64) stats.Container {
	h.t.Helper()
	s := h.read()
	i := slices.IndexFunc(s.Containers, func(c stats.Container) bool { return c.CgroupID == id })
	if i < 0 {
		h.t.Fatalf("there is no row for cgroup %d: %+v", id, s.Containers)
	}
	return s.Containers[i]
}

var (
	hexA = strings.Repeat("a1", 32)
	hexB = strings.Repeat("b2", 32)
)

func counters(n uint64) (c maps.Counters) {
	for r := range c.Dropped {
		n += 10
		c.Dropped[r] = bpf.EgressDrops{Packets: n + 1, Bytes: n + 2, Connects: n + 3}
	}
	c.SmtpAllowed = n + 9
	c.HostSide = bpf.EgressTraffic{Packets: 9, Bytes: 900}
	c.HostDropped[bpf.EgressReasonREASON_MALFORMED] = bpf.EgressTraffic{Packets: 1, Bytes: 100}
	c.HostDropped[bpf.EgressReasonREASON_BLOCKED] = bpf.EgressTraffic{Packets: 2, Bytes: 200}
	c.HostDropped[bpf.EgressReasonREASON_RATE_LIMITED] = bpf.EgressTraffic{Packets: 3, Bytes: 300}
	return c
}

func now(t *testing.T) uint64 {
	t.Helper()
	var ts unix.Timespec
	check(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts))
	return uint64(ts.Nano())
}

const golden = `{
  "mode": "enforce",
  "cgroups": [
    "BASE/docker",
    "BASE/slice"
  ],
  "containers": [
    {
      "id": "cgroup-18446744073709551615",
      "name": "",
      "cgroup_id": 18446744073709551615,
      "cgroup": "",
      "blocked": {
        "packets": 121,
        "bytes": 122,
        "connects": 123
      },
      "malformed": {
        "packets": 111,
        "bytes": 112
      },
      "socket_families": {
        "denied": 0
      },
      "host_side": {
        "packets": 9,
        "bytes": 900
      },
      "host_side_reasons": {
        "malformed": {
          "packets": 1,
          "bytes": 100
        },
        "blocked": {
          "packets": 2,
          "bytes": 200
        },
        "rate_limited": {
          "packets": 3,
          "bytes": 300
        }
      },
      "smtp": {
        "allowed": 149,
        "rate_limited": 264,
        "no_bucket": 284,
        "tokens": 0,
        "rate": "2/day",
        "burst": 4
      }
    },
    {
      "id": "HEXA",
      "name": "",
      "cgroup_id": 1001,
      "cgroup": "REL/docker/HEXA",
      "blocked": {
        "packets": 21,
        "bytes": 22,
        "connects": 23
      },
      "malformed": {
        "packets": 11,
        "bytes": 12
      },
      "socket_families": {
        "denied": 0
      },
      "host_side": {
        "packets": 9,
        "bytes": 900
      },
      "host_side_reasons": {
        "malformed": {
          "packets": 1,
          "bytes": 100
        },
        "blocked": {
          "packets": 2,
          "bytes": 200
        },
        "rate_limited": {
          "packets": 3,
          "bytes": 300
        }
      },
      "smtp": {
        "allowed": 49,
        "rate_limited": 64,
        "no_bucket": 84,
        "tokens": 1.5,
        "rate": "2/day",
        "burst": 4
      }
    },
    {
      "id": "HEXB",
      "name": "",
      "cgroup_id": 1002,
      "cgroup": "REL/slice/docker-HEXB.scope",
      "blocked": {
        "packets": 0,
        "bytes": 0,
        "connects": 0
      },
      "malformed": {
        "packets": 0,
        "bytes": 0
      },
      "socket_families": {
        "denied": 0
      },
      "host_side": {
        "packets": 0,
        "bytes": 0
      },
      "host_side_reasons": {
        "malformed": {
          "packets": 0,
          "bytes": 0
        },
        "blocked": {
          "packets": 0,
          "bytes": 0
        },
        "rate_limited": {
          "packets": 0,
          "bytes": 0
        }
      },
      "smtp": {
        "allowed": 0,
        "rate_limited": 0,
        "no_bucket": 0,
        "tokens": 5,
        "rate": "5/minute",
        "burst": 5
      }
    },
    {
      "id": "web & co",
      "name": "",
      "cgroup_id": 1003,
      "cgroup": "REL/slice/web & co",
      "blocked": {
        "packets": 0,
        "bytes": 0,
        "connects": 0
      },
      "malformed": {
        "packets": 0,
        "bytes": 0
      },
      "socket_families": {
        "denied": 0
      },
      "host_side": {
        "packets": 0,
        "bytes": 0
      },
      "host_side_reasons": {
        "malformed": {
          "packets": 0,
          "bytes": 0
        },
        "blocked": {
          "packets": 0,
          "bytes": 0
        },
        "rate_limited": {
          "packets": 0,
          "bytes": 0
        }
      },
      "smtp": {
        "allowed": 0,
        "rate_limited": 0,
        "no_bucket": 0,
        "tokens": null,
        "rate": "unlimited",
        "burst": 5
      }
    }
  ],
  "total": {
    "blocked": {
      "packets": 221,
      "bytes": 222,
      "connects": 223
    },
    "malformed": {
      "packets": 211,
      "bytes": 212
    },
    "socket_families": {
      "denied": 0
    },
    "host_side": {
      "packets": 9,
      "bytes": 900
    },
    "host_side_reasons": {
      "malformed": {
        "packets": 1,
        "bytes": 100
      },
      "blocked": {
        "packets": 2,
        "bytes": 200
      },
      "rate_limited": {
        "packets": 3,
        "bytes": 300
      }
    },
    "smtp": {
      "allowed": 249,
      "rate_limited": 464,
      "no_bucket": 484
    }
  }
}
`

func TestJSON(t *testing.T) {
	h := newHost(t, "docker", "slice")
	const gone = 1<<64 - 1
	ids := []uint64{h.mkdir("docker/" + hexA), h.mkdir("slice/docker-" + hexB + ".scope"), h.mkdir("slice/web & co")}
	limit := policy.Limit{Rate: policy.Rate{Count: 2, Period: 24 * time.Hour}, Burst: 4}
	missing := func(d time.Duration) (c maps.Container) {
		c.Limit = maps.LimitOf(limit)
		c.Bucket = bpf.EgressBucket{Count: c.Limit.Count, Interval: c.Limit.Interval, FullAt: now(t) + uint64(d)}
		return c
	}
	busy := missing(30 * time.Hour) // which is 2½ tokens
	busy.Counters = counters(0)
	h.put(ids[0], busy)
	empty := missing(300 * time.Hour)
	empty.Counters = counters(100)
	h.put(gone, empty)
	check(t, h.state.SetLimit(ids[2], policy.Limit{Burst: 5}))
	totals := make([]maps.Sums, ebpf.MustPossibleCPU())
	totals[0].Counters = counters(200)
	check(t, h.state.ByName()[bpf.EgressMapTotals].Put(uint32(0), totals))

	var got bytes.Buffer
	enc := json.NewEncoder(&got)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	check(t, enc.Encode(h.read()))
	replace := []string{"BASE", h.base, "REL", h.rel(""), "HEXA", hexA, "HEXB", hexB}
	for i, id := range ids {
		replace = append(replace, fmt.Sprint(": ", 1001+i), fmt.Sprint(": ", id))
	}
	if want := strings.NewReplacer(replace...).Replace(golden); got.String() != want {
		t.Errorf("got %s\nwant %s", &got, want)
	}
}

func TestRows(t *testing.T) {
	h := newHost(t, "b", "a")
	if got := h.rows(); len(got) != 0 {
		t.Errorf("without containers: got rows %q", got)
	}
	h.mkdir("b/idle")
	h.mkdir("b/nested/in/it")
	h.mkdir("a/idle")
	h.mkdir("not-policed/idle")
	h.put(h.mkdir("a"), maps.Container{}) // sockets that belong to no container
	busy := h.mkdir("b/busy")
	h.put(busy, maps.Container{Counters: counters(0)})
	const gone = 1 << 60
	h.put(gone+1, maps.Container{})
	h.put(gone, maps.Container{})
	if got, want := h.rows(), []string{"", "", "a", "a/idle", "b/busy", "b/idle", "b/nested"}; !slices.Equal(got, want) {
		t.Errorf("got rows %q, want %q", got, want)
	}
	if s := h.read(); s.Containers[0].CgroupID != gone || s.Containers[1].CgroupID != gone+1 {
		t.Errorf("removed containers are not in order: %+v", s.Containers[:2])
	}

	// Its cgroup is gone, but not yet its last socket.
	var last int
	t.Run("socket", func(t *testing.T) {
		testenv.Enter(t, h.path("b/busy"))
		var err error
		last, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		check(t, err)
	})
	t.Cleanup(func() { unix.Close(last) })
	check(t, os.Remove(h.path("b/busy")))
	if s := h.read(); slices.ContainsFunc(s.Containers, func(c stats.Container) bool { return c.CgroupID == busy }) {
		t.Errorf("got a row for a container that was removed: %+v", s)
	}

	// So is a whole policed cgroup.
	check(t, os.Remove(h.path("a/idle")))
	testenv.Eventually(t, "remove a", func() bool { return !errors.Is(unix.Rmdir(h.path("a")), unix.EBUSY) })
	for _, name := range h.rows() {
		if strings.HasPrefix(name, "a") {
			t.Errorf("got a row for %s, which is gone", name)
		}
	}
}

// Whatever a killed attach has left, there are stats.
func TestInterruptedAttach(t *testing.T) {
	pins := testenv.PinPath(t)
	root := testenv.Root(t)
	filter := loader.New(pins, root)
	path := testenv.Cgroup(t)
	gone := testenv.Child(t, path, "gone")
	id, err := root.ID(strings.TrimPrefix(gone, string(root)))
	check(t, err)
	check(t, filter.Attach(t.Context(), []string{path + "/a"}, policy.Default()))
	check(t, os.Mkdir(fmt.Sprint(pins, "/cgroup-", id), 0o700))
	check(t, os.Remove(gone))
	reader, err := stats.Open(filter, root)
	check(t, err)
	defer reader.Close()
	if s, err := reader.Read(); err != nil || s.Mode != policy.Enforce {
		t.Errorf("got %+v, %v", s, err)
	}
	check(t, filter.Detach(t.Context(), nil))
}

// The limit is the policy's, unless there is one of its own.
func TestLimit(t *testing.T) {
	h := newHost(t, "a")
	id := h.mkdir("a/web")
	want := func(l policy.Limit, tokens float64) {
		t.Helper()
		row := h.row(id)
		if got := (policy.Limit{Rate: row.SMTP.Rate, Burst: row.SMTP.Burst}); got != l {
			t.Errorf("got limit %+v, want %+v", got, l)
		}
		switch {
		case row.SMTP.Tokens == nil && tokens >= 0, row.SMTP.Tokens != nil && *row.SMTP.Tokens != tokens:
			t.Errorf("got tokens %v, want %v", row.SMTP.Tokens, tokens)
		}
	}
	def := policy.Default().SMTP.Limit()
	want(def, 5)
	row := h.row(id)
	own := policy.Limit{Rate: policy.Rate{Count: 2, Period: time.Hour}, Burst: 9}
	check(t, h.SetLimit(t.Context(), &row, own))
	want(own, 9)
	unlimited := policy.Limit{Burst: 9}
	check(t, h.SetLimit(t.Context(), &row, unlimited))
	want(unlimited, -1)

	p := policy.Default()
	p.SMTP.Burst = 7
	h.attach(p)
	want(unlimited, -1)
	check(t, h.UnsetLimit(t.Context(), &row))
	want(p.SMTP.Limit(), 7)
	p.SMTP.Rate = policy.Rate{}
	h.attach(p)
	want(p.SMTP.Limit(), -1)
}

// Names select rows, and what is not found was looked for below the policed cgroups.
func TestSelect(t *testing.T) {
	h := newHost(t, "a", "b")
	h.mkdir("a/" + hexA)
	h.mkdir("b/docker-" + hexB + ".scope")
	h.mkdir("b/web")
	const gone = 1 << 60
	h.put(gone, maps.Container{})
	s := h.read()
	for i := range s.Containers {
		if s.Containers[i].ID == hexB {
			s.Containers[i].Name = "db"
		}
	}
	for name, want := range map[string]string{
		"a1": "a/" + hexA, "db": "b/docker-" + hexB + ".scope", h.rel("b/web"): "b/web", h.path("b/web") + "/": "b/web",
	} {
		if c, err := h.Select(s, name); err != nil || c.Cgroup != h.rel(want) {
			t.Errorf("%q: got %+v, %v, want %s", name, c, err, want)
		}
	}
	if c, err := h.Select(s, "cgroup-1152921504606846976"); err != nil || c.CgroupID != gone || c.Cgroup != "" {
		t.Errorf("got %+v, %v, want the container that is gone", c, err)
	}
	for _, name := range []string{"", ".", "/", string(h.root), h.path("a"), "nginx"} {
		c, err := h.Select(s, name)
		if !errors.Is(err, container.ErrNoContainer) || !strings.Contains(err.Error(), fmt.Sprintf("%q", name)) || !strings.Contains(err.Error(), h.path("a")) {
			t.Errorf("%q: got %+v, %v, want it to say where it looked", name, c, err)
		}
	}
}

func TestOpenWithoutFilter(t *testing.T) {
	if _, err := stats.Open(testenv.Filter(t), testenv.Root(t)); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("got %v, want %v", err, loader.ErrNotAttached)
	}
}

// A reader goes on after an attach, and shows nothing that is no more after a detach.
func TestReadAgain(t *testing.T) {
	h := newHost(t, "a")
	id := h.mkdir("a/web")
	h.put(id, maps.Container{Counters: counters(0)})
	p := policy.Default()
	p.Mode = policy.Audit
	h.attach(p)
	if s := h.read(); s.Mode != policy.Audit || h.row(id).Blocked.Packets != 21 {
		t.Errorf("got %+v, want the counters in mode audit", s)
	}
	check(t, h.filter.Detach(t.Context(), nil))
	if s, err := h.Read(); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("got %+v, %v, want %v", s, err, loader.ErrNotAttached)
	}
}

// The tally has each refusal once, at whichever hook it was.
func TestTally(t *testing.T) {
	h := newHost(t, "docker")
	web := h.mkdir("docker/web")
	h.mkdir("docker/idle")
	c := counters(1)
	c.FamiliesDenied = 5
	h.put(web, maps.Container{Counters: c})
	tally, err := h.Tally()
	check(t, err)
	row := h.row(web)
	all := func(b stats.Blocked) uint64 { return b.Packets + b.Connects }
	want := stats.Refused{
		all(row.Refused.Malformed) + row.HostReasons.Malformed.Packets,
		all(row.Refused.Blocked) + row.HostReasons.Blocked.Packets,
		all(row.Refused.RateLimited) + row.HostReasons.RateLimited.Packets,
		all(row.Refused.NoBucket),
		5,
	}
	if len(tally.Containers) != 1 || tally.Containers[web] != want || slices.Contains(want[:], 0) {
		t.Errorf("got %v, want %v for %d alone", tally.Containers, want, web)
	}
	if tally.Mode != policy.Enforce {
		t.Errorf("mode %q", tally.Mode)
	}
	if is, err := h.Identify(web); err != nil || is != row.Identity {
		t.Errorf("identified as %v, %v, want %v", is, err, row.Identity)
	}
}
