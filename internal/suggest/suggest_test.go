package suggest

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
)

var (
	now  = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	week = 7 * 24 * time.Hour
)

// observe returns what was observed of a host that was booted four weeks ago.
func observe() *Observation {
	o := &Observation{
		Config: policy.Config{Cgroups: []string{"/sys/fs/cgroup"}, Policy: policy.Default()},
		Since:  now.Add(-9 * 24 * time.Hour), Now: now, Clock: uint64(4 * week),
	}
	o.Config.Mode = policy.Audit
	return o
}

func id(n uint64) string { return fmt.Sprintf("%064x", n) }

// run adds a container that runs in the cgroup n.
func (o *Observation) run(n uint64, name string, counted stats.Container) {
	c := container.Container{Identity: container.Identity{ID: id(n), Name: name, CgroupID: n, Cgroup: "/docker/" + id(n)}}
	if name != "" {
		c.Names = []string{name}
	}
	limit := o.Config.SMTP.Limit()
	counted.SMTP.Rate, counted.SMTP.Burst = limit.Rate, limit.Burst
	o.Add(c, counted, time.Time{})
}

func mailCount(allowed, limited uint64) (c stats.Container) {
	c.SMTP.Allowed, c.SMTP.RateLimited = allowed, limited
	return c
}

// saw adds what the kernel has seen of the container in cgroup n, between two ages.
func (o *Observation) saw(n uint64, why bpf.EgressReason, to string, proto uint8, count uint64, first, last time.Duration) {
	clock := func(age time.Duration) uint64 { return o.Clock - uint64(age) }
	o.Seen = append(o.Seen, maps.Seen{
		Container: n, Destination: netip.MustParseAddrPort(to), Protocol: proto, Reason: why, Count: count, First: clock(first), Last: clock(last),
	})
}

const (
	blocked = bpf.EgressReasonREASON_BLOCKED
	limited = bpf.EgressReasonREASON_RATE_LIMITED
	family  = bpf.EgressReasonREASON_FAMILY
	tcp     = 6
	udp     = 17
)

func refusal(n uint64, name, reason, to string, at time.Time) events.Record {
	yes, no := true, false
	dst := netip.MustParseAddrPort(to)
	return events.Record{
		Type: events.Refusal, Time: at, Hook: events.HookPacket, Reason: reason, Protocol: "tcp", WouldBlock: &yes, Blocked: &no,
		Container:   &events.Container{ID: id(n), Name: name, CgroupID: n, Cgroup: "/docker/" + id(n)},
		Destination: &events.Endpoint{Address: dst.Addr(), Port: dst.Port()},
	}
}

// parsed returns the config of a suggestion as attach reads it.
func parsed(t *testing.T, s Suggestion) policy.Config {
	t.Helper()
	text := s.Config.YAML(s.Comments)
	got, err := policy.ParseConfig("config.yaml", text)
	if err != nil || !reflect.DeepEqual(got, s.Config) {
		t.Fatalf("got %+v, %v, want %+v\n%s", got, err, s.Config, text)
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "#") && len([]rune(line)) > width+40 {
			t.Errorf("a long line: %s", line)
		}
	}
	return got
}

// refused returns those of the kept that a policy would refuse, mail apart.
func refused(p policy.Policy, kept []Kept) (bad []Kept) {
	for _, k := range kept {
		rule := policy.RuleFor(p.Containers, k.Container)
		m := p.Match(k.Destination.Addr(), k.Protocol, k.Destination.Port())
		ok := true
		switch {
		case !k.Destination.IsValid():
			mask := p.Families.Mask()
			if rule.Families != "" {
				mask |= rule.Families.Mask()
			}
			ok = mask>>k.Family&1 != 0
		case k.Mail:
			ok = len(m.Exempt) > 0 || rule.SMTP != nil
		case m.Blocked():
			ok = len(m.Block) == 0 && rule.Metadata == policy.Allowed
		}
		if !ok {
			bad = append(bad, k)
		}
	}
	return bad
}

var update = flag.Bool("update", false, "write what is wanted")

// everything is a host on which everything happens.
func everything() *Observation {
	o := observe()
	o.Config.Block = []policy.Rule{must(policy.ParseRule("10.0.0.0/8"))}
	o.Config.Containers = []policy.ContainerRule{
		{Name: "web", Metadata: policy.Allowed},
		{Label: "team=ops", Families: "vsock"},
	}
	o.run(1, "mailer-1", mailCount(900, 340))
	o.run(2, "mailer-2", mailCount(800, 300))
	o.run(3, "api", mailCount(20, 4))
	o.run(4, "backup", mailCount(3, 0))
	o.run(5, "", stats.Container{})
	o.run(6, "shop-web-1", stats.Container{})
	o.run(7, "web", mailCount(40, 10))
	hour, day := time.Hour, 24*time.Hour
	// Most mail goes to one relay.
	o.saw(1, limited, "192.168.7.25:587", tcp, 300, 8*day, hour)
	o.saw(1, limited, "198.51.100.25:25", tcp, 40, 3*day, 3*day-20*time.Second)
	o.saw(2, limited, "192.168.7.25:587", tcp, 290, 8*day, hour)
	o.saw(2, limited, "203.0.113.9:25", tcp, 2, 3*day, 2*day)
	o.saw(3, limited, "192.168.7.25:587", tcp, 4, day, hour)
	o.saw(7, limited, "198.51.100.25:25", tcp, 10, day, day-30*time.Minute)
	// Metadata, names and the time.
	o.saw(4, blocked, "169.254.169.254:80", tcp, 17, 8*day, hour)
	o.saw(4, blocked, "[::ffff:169.254.169.254]:53", udp, 200, 8*day, hour)
	o.saw(3, blocked, "169.254.169.254:53", udp, 60, 8*day, hour)
	o.saw(6, blocked, "169.254.169.254:123", udp, 9, 8*day, hour)
	o.saw(5, blocked, "[fd00:ec2::254]:80", tcp, 2, day, hour)
	o.saw(3, blocked, "169.254.169.254:0", 1, 1, day, day)
	o.saw(3, blocked, "10.1.2.3:5432", tcp, 12, day, hour)
	o.saw(99, limited, "198.51.100.25:25", tcp, 3, day, hour)
	o.Seen = append(o.Seen, maps.Seen{Container: 6, Reason: family, Family: 17, Count: 3, First: o.Clock - 9, Last: o.Clock})
	return o
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestEverything compares the whole output, comments included.
func TestEverything(t *testing.T) {
	const path = "testdata/everything.yaml"
	s := everything().Suggest()
	got := s.Config.YAML(s.Comments)
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(path, got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || string(want) != string(got) {
		t.Errorf("%v; got:\n%s", err, got)
	}
	if bad := refused(parsed(t, s).Policy, s.Kept); len(bad) > 0 {
		t.Errorf("these would be refused: %+v", bad)
	}
	for range 20 {
		again := everything()
		rand.Shuffle(len(again.Seen), func(i, j int) { again.Seen[i], again.Seen[j] = again.Seen[j], again.Seen[i] })
		if s := again.Suggest(); string(s.Config.YAML(s.Comments)) != string(want) {
			t.Fatalf("another time:\n%s", s.Config.YAML(s.Comments))
		}
	}
}

// A pattern is for containers that are started alike, need the same, and are all that it
// matches.
func TestNames(t *testing.T) {
	for _, tt := range []struct {
		about   string
		asking  []string
		others  []string
		want    []string
		rules   []policy.ContainerRule
		wantAll policy.ContainerRule
	}{
		{about: "one replica", asking: []string{"web-1"}, want: []string{"web-1"}},
		{about: "replicas", asking: []string{"web-1", "web-2"}, want: []string{"web-*"}},
		{about: "of Compose", asking: []string{"shop-web-1", "shop-web-2"}, others: []string{"shop-db-1"}, want: []string{"shop-web-*"}},
		{about: "of the first Compose", asking: []string{"shop_web_1", "shop_web_2"}, want: []string{"shop_web_*"}},
		{about: "not all", asking: []string{"web-1", "web-2"}, others: []string{"web-3"}, want: []string{"web-1", "web-2"}},
		{about: "another one", asking: []string{"web-1", "web-2"}, others: []string{"web-admin"}, want: []string{"web-1", "web-2"}},
		{about: "random", asking: []string{"job-7f3a9c2e"}, want: []string{"job-*"}},
		{about: "random, and others", asking: []string{"job-7f3a9c2e"}, others: []string{"job-0badcafe9"}, want: []string{"job-7f3a9c2e"}},
		{about: "words", asking: []string{"job-deadbeef", "job-facade"}, want: []string{"job-deadbeef", "job-facade"}},
		{about: "a UUID", asking: []string{"ci-123e4567-e89b-12d3-a456-426614174000"}, want: []string{"ci-*"}},
		{about: "only a number", asking: []string{"1-1", "1-2"}, want: []string{"1-1", "1-2"}},
		{about: "a version", asking: []string{"pg16", "pg17"}, want: []string{"pg16", "pg17"}},
		{about: "no name that a rule can have", asking: []string{"a*", `x"y`, "n\nmode: audit", "", "\xff", "a/b", "-x", strings.Repeat("ü", 200)}},
		{about: "what a rule gives is kept", asking: []string{"web"}, want: []string{"web"},
			rules: []policy.ContainerRule{{Name: "w*", Families: "vsock"}}, wantAll: policy.ContainerRule{Families: "vsock"}},
		{about: "a rule is replaced", asking: []string{"web"}, want: []string{"web"},
			rules: []policy.ContainerRule{{Name: "web", Metadata: policy.Denied, Families: "vsock"}}, wantAll: policy.ContainerRule{Families: "vsock"}},
		{about: "another rule for each", asking: []string{"web-1", "web-2"}, want: []string{"web-1", "web-2"},
			rules: []policy.ContainerRule{{Name: "web-2", SMTP: &policy.Limit{Rate: policy.Rate{Count: 9, Period: time.Hour}, Burst: 9}}}},
	} {
		o := observe()
		o.Config.Containers = tt.rules
		for i, name := range slices.Concat(tt.asking, tt.others) {
			n := uint64(i + 1)
			o.run(n, name, stats.Container{})
			if i < len(tt.asking) {
				o.saw(n, blocked, "169.254.169.254:80", tcp, 3, week, time.Hour)
			}
		}
		s := o.Suggest()
		config := parsed(t, s)
		var got []string
		for _, r := range config.Containers[:s.Added] {
			got = append(got, r.Name)
			if r.Metadata != policy.Allowed || r.Families != tt.wantAll.Families {
				t.Errorf("%s: got %+v", tt.about, r)
			}
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.about, got, tt.want)
		}
		if bad := refused(config.Policy, s.Kept); len(bad) > 0 {
			t.Errorf("%s: these would be refused: %+v", tt.about, bad)
		}
		if unnamed := len(tt.asking) > 0 && len(tt.want) == 0; unnamed && s.Left != len(tt.asking) {
			t.Errorf("%s: %d are left", tt.about, s.Left)
		}
	}
}

// No rule by name is suggested for a container of a pod: whoever makes a pod in any namespace could
// take the name.
func TestPodsAreNotNamed(t *testing.T) {
	o := observe()
	o.Add(container.Container{
		Identity: container.Identity{ID: id(1), Name: "kube-system/cni-1/agent", CgroupID: 1, Cgroup: "/kubepods/pod1/" + id(1)},
		Names:    []string{"agent"}, Pod: container.Pod{Namespace: "kube-system", Name: "cni-1", UID: "1", Container: "agent"},
	}, stats.Container{}, time.Time{})
	o.saw(1, blocked, "169.254.169.254:80", tcp, 3, week, time.Hour)
	s := o.Suggest()
	if config := parsed(t, s); s.Added != 0 || len(config.Containers) != 0 || s.Left != 1 {
		t.Errorf("got %d rules %+v, %d are left", s.Added, config.Containers, s.Left)
	}
	if text := string(s.Config.YAML(s.Comments)); !strings.Contains(text, "kube-system/cni-1/agent") || !strings.Contains(text, "rule with its namespace") {
		t.Errorf("got\n%s", text)
	}
}

// What an address embeds is allowed once, whatever the spelling.
func TestSpellings(t *testing.T) {
	o := observe()
	o.run(1, "web", stats.Container{})
	for _, to := range []string{"169.254.169.254:53", "[64:ff9b::a9fe:a9fe]:53", "[2002:a9fe:a9fe::1]:53", "[2002:a9fe:a9fe::2]:53", "[fe80::a9fe:a9fe%eth0]:53"} {
		o.saw(1, blocked, to, udp, 3, week, time.Hour)
	}
	s := o.Suggest()
	config := parsed(t, s)
	if want := "[169.254.169.254:53/tcp 169.254.169.254:53/udp [fe80::a9fe:a9fe]:53/tcp [fe80::a9fe:a9fe]:53/udp]"; fmt.Sprint(config.Allow) != want || len(config.Containers) > 0 {
		t.Errorf("got %v, want %s; %v", config.Allow, want, config.Containers)
	}
	if bad := refused(config.Policy, s.Kept); len(bad) > 0 || len(s.Kept) != 5 {
		t.Errorf("these would be refused: %+v", bad)
	}
}

// Records name containers that are gone, and what the kernel has seen is not counted twice.
func TestRecords(t *testing.T) {
	o := observe()
	o.run(1, "", mailCount(10, 6)) // Docker does not answer
	at := now.Add(-8 * 24 * time.Hour)
	for range 6 {
		o.record(refusal(1, "mailer", events.ReasonRateLimited, "198.51.100.1:25", at))
	}
	o.saw(1, limited, "198.51.100.1:25", tcp, 6, 8*24*time.Hour, 8*24*time.Hour)
	o.record(refusal(2, "gone", events.ReasonBlocked, "169.254.169.254:80", at))
	o.saw(2, blocked, "169.254.169.254:80", tcp, 4, week, time.Hour)
	// The same number before the last boot was another cgroup.
	o.record(refusal(3, "older", events.ReasonBlocked, "169.254.169.254:80", now.Add(-5*week)))
	o.saw(3, family, "0.0.0.0:0", 0, 1, week, week)
	// The kernel still has its counters, and nobody else knows it.
	o.Add(container.Container{Identity: container.Identity{ID: "cgroup-4", CgroupID: 4}}, mailCount(0, 2), time.Time{})
	o.record(refusal(4, "kept", events.ReasonRateLimited, "198.51.100.2:25", at))
	o.record(refusal(4, "kept", events.ReasonRateLimited, "198.51.100.2:25", at))
	onHost := refusal(1, "", events.ReasonBlocked, "169.254.169.254:80", at)
	onHost.Hook = events.HookHost
	o.record(onHost)
	o.record(events.Record{Type: events.Refusal, Time: at})
	o.record(events.Record{Type: events.Lost, Time: at, Count: 5})
	o.record(events.Record{Type: "later version's", Time: at})
	s := o.Suggest()
	config := parsed(t, s)
	limit := policy.Limit{Rate: policy.Rate{Count: 15, Period: time.Minute}, Burst: 12}
	few := policy.Limit{Rate: policy.Rate{Count: 10, Period: time.Minute}, Burst: 10}
	want := []policy.ContainerRule{{Name: "gone", Metadata: policy.Allowed}, {Name: "kept", SMTP: &few}, {Name: "mailer", SMTP: &limit}, {Name: "older", Metadata: policy.Allowed}}
	if !reflect.DeepEqual(config.Containers, want) {
		t.Errorf("got %+v\n%s", config.Containers, config.YAML(s.Comments))
	}
	head := strings.Join(s.Comments[""], "\n")
	for _, text := range []string{"1 refusal on the host", "1 refusal in records that lack", "5 refusals lost", "cgroup-3: opened sockets"} {
		if !strings.Contains(head, text) {
			t.Errorf("%q is missing in:\n%s", text, head)
		}
	}
	if text := fmt.Sprint(s.Comments["containers[0]"]); !strings.Contains(text, "4 times") {
		t.Error(text)
	}
}

// What a flood's records only count, the kernel has seen as well.
func TestSuppressed(t *testing.T) {
	sent := func(records int, suppressed uint64) string {
		o := observe()
		o.run(1, "newsletter", mailCount(5, 85))
		at := now.Add(-time.Hour)
		for range records {
			o.record(refusal(1, "newsletter", events.ReasonRateLimited, "198.51.100.20:25", at))
		}
		if suppressed > 0 {
			since := at
			o.record(events.Record{Type: events.Suppressed, Time: at.Add(time.Second), Since: &since, Count: suppressed,
				Container: &events.Container{ID: id(1), Name: "newsletter", CgroupID: 1, Cgroup: "/docker/" + id(1)}})
		}
		o.saw(1, limited, "198.51.100.20:25", tcp, 85, time.Hour, time.Hour-time.Second)
		s := o.Suggest()
		if text := strings.Join(s.Comments[""], " "); strings.Contains(text, "Left refused") {
			t.Error(text)
		}
		return fmt.Sprint(*parsed(t, s).Containers[0].SMTP, s.Comments["containers[0]"][0])
	}
	if want, got := sent(0, 0), sent(53, 32); got != want {
		t.Errorf("got %s, want as without records: %s", got, want)
	}
	o := observe()
	o.run(1, "newsletter", mailCount(5, 85))
	before := o.Since.Add(-time.Hour)
	o.record(refusal(1, "newsletter", events.ReasonRateLimited, "198.51.100.20:25", before))
	o.record(events.Record{Type: events.Suppressed, Time: before, Count: 1000,
		Container: &events.Container{ID: id(1), Name: "newsletter", CgroupID: 1, Cgroup: "/docker/" + id(1)}})
	if limit := parsed(t, o.Suggest()).Containers[0].SMTP; limit.Burst < 1000 {
		t.Errorf("records from before the counters began are not counted: %+v", limit)
	}
}

// A job that sends all of its mail once a day needs a limit for that minute, though the average is
// far below.
func TestBursts(t *testing.T) {
	o := observe()
	var times []time.Time
	for day := range 7 {
		for i := range 200 {
			times = append(times, now.Add(-week+time.Duration(day)*24*time.Hour+time.Duration(i)*20*time.Millisecond))
		}
	}
	o.run(1, "newsletter", mailCount(35, uint64(len(times))))
	o.Seen = append(o.Seen, o.sightings(1, netip.MustParseAddrPort("198.51.100.20:25"), times))
	want := policy.Limit{Rate: policy.Rate{Count: 300, Period: time.Minute}, Burst: 250}
	if got := parsed(t, o.Suggest()).Containers[0].SMTP; *got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// The records of another host are of other containers, with the same numbers and paths of cgroups.
func TestHosts(t *testing.T) {
	o := observe()
	o.Node = "host1"
	o.run(1, "mailer", mailCount(5, 10))
	o.saw(1, limited, "198.51.100.9:25", tcp, 10, time.Hour, time.Hour)
	o.saw(2, blocked, "169.254.169.254:80", tcp, 2, time.Hour, time.Hour) // is gone
	at := now.Add(-2 * time.Hour)
	for _, node := range []string{"host1", "host2", "host3"} {
		job, web := refusal(1, "job", events.ReasonRateLimited, "198.51.100.1:25", at), refusal(2, "web", events.ReasonRateLimited, "198.51.100.2:25", at)
		job.Node, job.Container.ID, job.Container.Cgroup = node, "job", "/ci/job"
		web.Node, web.Container.ID = node, id(7)
		for range 20 {
			o.record(job)
			if node != "host1" {
				o.record(web)
			}
		}
	}
	s := o.Suggest()
	config := parsed(t, s)
	limit := policy.Limit{Rate: policy.Rate{Count: 40, Period: time.Minute}, Burst: 25}
	if len(config.Containers) != 3 || config.Containers[0].Name != "job" || *config.Containers[0].SMTP != limit ||
		config.Containers[2].Name != "web" || config.Containers[2].Metadata != "" {
		t.Errorf("got %s", config.YAML(s.Comments))
	}
	if text := strings.Join(s.Comments[""], " "); !strings.Contains(text, "cgroup-2: asked for the metadata service") {
		t.Error(text)
	}
}

// An attach, as when the service starts again, keeps what was counted and seen.
func TestAttachedAgain(t *testing.T) {
	o := observe()
	o.Since = now.Add(-time.Hour)
	o.run(1, "backup", stats.Container{})
	o.saw(1, blocked, "169.254.169.254:80", tcp, 2, 8*24*time.Hour, time.Hour)
	s := o.Suggest()
	if text := strings.Join(s.Comments[""], " "); s.Short || !strings.Contains(text, "since 2026-11-28 11:00 UTC, for 1h0m. What was counted before, since 2026-11-20 12:00 UTC, is in here too.") {
		t.Errorf("short: %t: %s", s.Short, text)
	}
}

// Without destinations the counters still tell of mail.
func TestCounters(t *testing.T) {
	o := observe()
	o.Config.Mode = policy.Enforce
	c := mailCount(500, 5000)
	c.Blocked.Connects, c.Families.Denied = 7, 2
	o.run(1, "web", c)
	s := o.Suggest()
	config := parsed(t, s)
	// 5000 in nine days, four times as unevenly, and 5.
	want := policy.Limit{Rate: policy.Rate{Count: 10, Period: time.Minute}, Burst: 10}
	if len(config.Containers) != 1 || *config.Containers[0].SMTP != want || config.Containers[0].Metadata != "" {
		t.Errorf("got %+v", config.Containers)
	}
	text := string(config.YAML(s.Comments))
	for _, want := range []string{"The mode in force is not audit", "web: asked for blocked destinations that are not recorded, 7 times", "web: opened sockets of families that are not recorded, 2 times"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}

	o = observe()
	o.run(1, "web", stats.Container{})
	if s := o.Suggest(); !s.Nothing || s.Short || s.Added > 0 || s.Config.Mode != policy.Enforce {
		t.Errorf("got %+v", s)
	}
	o = observe()
	o.Since = now.Add(-3 * time.Hour)
	if s := o.Suggest(); !s.Short || !strings.Contains(strings.Join(s.Comments[""], " "), "for 3h0m. That is less than a week") {
		t.Errorf("got %+v", s)
	}
}

func TestLimitFor(t *testing.T) {
	base := policy.Limit{Rate: policy.Rate{Count: 5, Period: time.Minute}, Burst: 5}
	for _, tt := range []struct {
		limit policy.Limit
		peak  uint64
		want  string
	}{
		{base, 1, "10/minute 10"},
		{base, 43, "60/minute 50"},
		{base, 100, "150/minute 120"},
		{policy.Limit{Rate: policy.Rate{Count: 1, Period: 24 * time.Hour}, Burst: 1}, 9, "15/minute 10"},
		{policy.Limit{Rate: policy.Rate{Count: 100, Period: time.Second}, Burst: 100}, 10, "8000/minute 120"},
		{base, 1_000_000, "25000/second 1000000"},
		{base, 3 * most, "1000000/second 1000000"},
	} {
		got := limitFor(tt.limit, tt.peak)
		if text := fmt.Sprint(got.Rate, " ", got.Burst); text != tt.want || got.Validate() != nil {
			t.Errorf("%v and %d: got %s, want %s", tt.limit, tt.peak, text, tt.want)
		}
	}
}

// bucket is a bucket of the filter, in floating point.
type bucket struct {
	limit  policy.Limit
	tokens float64
	at     time.Time
}

func (b *bucket) take(t time.Time) bool {
	if b.at.IsZero() {
		b.tokens = float64(b.limit.Burst)
	} else {
		b.tokens = min(float64(b.limit.Burst), b.tokens+float64(t.Sub(b.at))*float64(b.limit.Rate.Count)/float64(b.limit.Rate.Period))
	}
	b.at = t
	const rounding = 1e-6
	if b.tokens < 1-rounding {
		return false
	}
	b.tokens--
	return true
}

// sightings are what the kernel notes of mail over the limit, as note_seen() does.
func (o *Observation) sightings(n uint64, to netip.AddrPort, times []time.Time) maps.Seen {
	clock := func(t time.Time) uint64 { return o.Clock - uint64(o.Now.Sub(t)) }
	seen := maps.Seen{Container: n, Destination: to, Protocol: tcp, Reason: limited, Count: uint64(len(times)), First: clock(times[0]), Last: clock(times[len(times)-1])}
	var slot, in, before uint64
	for _, t := range times {
		if now := clock(t) / uint64(time.Minute); now != slot {
			if slot+1 != now {
				in = 0
			}
			slot, before, in = now, in, 0
		}
		in++
		seen.Most = max(seen.Most, in+before)
	}
	return seen
}

// Random hosts: what is kept passes by the policy that is suggested. That is, mail passes
// connection by connection, also what the limit in force had let through.
func TestReplay(t *testing.T) {
	pick := func(r *rand.Rand, from ...string) string { return from[r.IntN(len(from))] }
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		o := observe()
		if r.IntN(3) == 0 {
			o.Config.Block = []policy.Rule{must(policy.ParseRule(pick(r, "10.0.0.0/8", "169.254.0.0/16", "192.0.2.0/24:25")))}
		}
		if r.IntN(3) == 0 {
			o.Config.Containers = []policy.ContainerRule{
				{Name: pick(r, "web-*", "*-1", "job"), Metadata: policy.Allowed},
				{Name: pick(r, "*", "web-1"), Families: "packet", SMTP: &policy.Limit{Rate: policy.Rate{Count: 20, Period: time.Hour}, Burst: 3}},
			}
		}
		sent := map[string]map[netip.AddrPort][]time.Time{} // by the name of the container
		for n := range 1 + r.Uint64N(6) {
			name := pick(r, "web-1", "web-2", "web-3", "web-admin", "job-7f3a9c2e", "job", "x*", "")
			if sent[name] != nil {
				continue
			}
			all := map[netip.AddrPort][]time.Time{}
			sent[name] = all
			b := bucket{limit: o.Config.SMTP.Limit()}
			if rule := policy.RuleFor(o.Config.Containers, policy.Subject{Names: []string{name}}); rule.SMTP != nil && name != "" {
				b.limit = *rule.SMTP
			}
			start := now.Add(-time.Duration(r.Int64N(int64(week))))
			counted := mailCount(0, 0)
			var records []events.Record
			over := map[netip.AddrPort][]time.Time{}
			bySeen, byRecords := r.IntN(2) == 0, r.IntN(2) == 0
			for range r.IntN(200) {
				start = start.Add(time.Duration(r.ExpFloat64() * float64(time.Second) * float64([]int{0, 1, 20, 600}[r.IntN(4)])))
				to := netip.MustParseAddrPort(pick(r, "192.0.2.25:25", "192.0.2.26:587", "[2001:db8::1]:465", "198.51.100.3:25"))
				all[to] = append(all[to], start)
				if b.take(start) {
					counted.SMTP.Allowed++
					continue
				}
				counted.SMTP.RateLimited++
				over[to] = append(over[to], start)
				if byRecords || !bySeen {
					records = append(records, refusal(n+1, name, events.ReasonRateLimited, to.String(), start))
				}
			}
			for to, times := range over {
				if bySeen {
					o.Seen = append(o.Seen, o.sightings(n+1, to, times))
				}
			}
			for range r.IntN(10) {
				record := refusal(n+1, name, events.ReasonBlocked, pick(r, "169.254.169.254:80", "169.254.169.254:53", "169.254.169.254:123", "10.1.2.3:53", "[64:ff9b::a9fe:a9fe]:80",
					"[64:ff9b:1:a9fe:a9:fe00::]:53", "168.63.129.16:80", "198.51.100.3:80"), start)
				record.Protocol = pick(r, "tcp", "udp", "icmp", "sctp", "47")
				if record.Protocol == "icmp" || record.Protocol == "47" {
					record.Destination.Port = 0
				}
				if r.IntN(4) == 0 {
					record.Reason, record.Destination, record.Family = events.ReasonFamily, nil, pick(r, "packet", "vsock", "99", "xdp")
				}
				records = append(records, record)
			}
			o.run(n+1, name, counted)
			o.containers[len(o.containers)-1].limit = b.limit
			for _, record := range records {
				o.record(record)
			}
		}
		s := o.Suggest()
		config := parsed(t, s)
		if bad := refused(config.Policy, s.Kept); len(bad) > 0 {
			t.Fatalf("seed %d: these would be refused: %+v\n%s", seed, bad, config.YAML(s.Comments))
		}
		for name, to := range sent {
			rule := policy.RuleFor(config.Containers, policy.Subject{Names: []string{name}})
			if rule.SMTP == nil || name == "x*" || name == "" {
				continue
			}
			var all []time.Time
			for dst, times := range to {
				if len(config.Match(dst.Addr(), tcp, dst.Port()).Exempt) == 0 {
					all = append(all, times...)
				}
			}
			slices.SortFunc(all, time.Time.Compare)
			b := bucket{limit: *rule.SMTP}
			for i, at := range all {
				if !b.take(at) {
					t.Fatalf("seed %d: mail %d of %d of %s is over %+v\n%s", seed, i, len(all), name, b.limit, config.YAML(s.Comments))
				}
			}
		}
	}
}
