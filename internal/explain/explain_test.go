package explain

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// cgroupID is that of a container that does not exist.
const cgroupID = 1 << 60

// rehearse returns a Rehearsal for a container with this entry.
func rehearse(t *testing.T, p policy.Policy, c maps.Container) *loader.Rehearsal {
	t.Helper()
	check(t, p.Validate())
	state, err := maps.CreateState()
	check(t, err)
	defer state.Close()
	check(t, state.ByName()[bpf.EgressMapContainers].Put(uint64(cgroupID), c))
	check(t, state.SetTunnels(map[uint16]bool{4789: true, 8472: false}))
	r, err := loader.RehearsePolicy(p, state, cgroupID)
	check(t, err)
	t.Cleanup(func() { check(t, r.Close()) })
	return r
}

func ask(t *testing.T, r *loader.Rehearsal, dst string, c *container.Container) *Answer {
	t.Helper()
	d, err := policy.ParseDestination(dst)
	check(t, err)
	a, err := answer(r, d, c)
	check(t, err)
	return a
}

func rules(t *testing.T, list ...string) (rules []policy.Rule) {
	t.Helper()
	for _, s := range list {
		r, err := policy.ParseRule(s)
		check(t, err)
		rules = append(rules, r)
	}
	return rules
}

// bucket returns one from which tokens of a limit were taken.
func bucket(t *testing.T, l policy.Limit, taken float64) bpf.EgressBucket {
	t.Helper()
	now, err := maps.Now()
	check(t, err)
	limit := maps.LimitOf(l)
	return bpf.EgressBucket{FullAt: now + uint64(taken*float64(limit.Interval)), Count: limit.Count, Interval: limit.Interval, Burst: limit.Burst}
}

func brief(a *Answer) string {
	text := string(a.Verdict)
	if a.Reason != "" {
		text += " " + a.Reason
	}
	if a.Rule != "" {
		text += " by " + a.Rule
	}
	if a.Early {
		text += ", early"
	}
	return text
}

// expect is what is wanted of destinations.
type expect map[string]string

func (e expect) check(t *testing.T, r *loader.Rehearsal, c *container.Container) {
	t.Helper()
	for dst, want := range e {
		if a := ask(t, r, dst, c); brief(a) != want {
			t.Errorf("%s: got %q, want %q (%+v)", dst, brief(a), want, a)
		}
	}
}

// TestPresets asks for each address that each preset blocks, and what an exception for a
// container, an allow entry and audit mode do to it.
func TestPresets(t *testing.T) {
	for _, name := range policy.PresetNames() {
		p := policy.Default()
		p.Presets = []string{name}
		preset, err := policy.Preset(name)
		check(t, err)
		blocking, open := rehearse(t, p, maps.Container{}), rehearse(t, p, maps.Container{Flags: maps.MayReachMetadata})
		p.Mode = policy.Audit
		audit := rehearse(t, p, maps.Container{})
		p.Mode = policy.Enforce
		p.Allow = preset
		allowed := rehearse(t, p, maps.Container{})
		for _, dst := range preset {
			rule := "preset " + name
			if name == policy.Metadata {
				rule = policy.Default().Match(dst.Prefix.Addr(), 6, dst.Port).Presets[0].String()
			}
			expect{dst.String(): "refused blocked by " + rule + ", early"}.check(t, blocking, nil)
			expect{dst.String(): "passes by " + earlier}.check(t, open, nil)
			expect{dst.String(): "passes blocked by " + rule}.check(t, audit, nil)
			expect{dst.String(): "passes by allow " + dst.String()}.check(t, allowed, nil)
			if a := ask(t, audit, dst.String(), nil); !a.WouldBlock || a.Blocked {
				t.Errorf("%s in audit mode: %+v", dst, a)
			}
		}
		expect{"198.51.100.1:80": "passes", "[2001:db8:1::1]:80": "passes"}.check(t, blocking, nil)
	}
}

func TestDestinations(t *testing.T) {
	p := policy.Default()
	p.Block = rules(t, "10.0.0.0/8", "198.51.100.7:443", "198.51.100.8/udp", "2001:db8:1::/48", "169.254.169.254:22/tcp", "192.0.2.1", "192.0.2.2:40000/tcp")
	p.Allow = rules(t, "10.0.0.53:53/udp", "10.2.0.0/16", "2001:db8:1::53")
	p.SMTP.Exempt = []netip.Prefix{netip.MustParsePrefix("203.0.113.25/32")}
	p.SMTP.Ports = []uint16{25, 465, 587, 40000}
	destinations := expect{
		// A network, and exceptions to it.
		"10.1.2.3":             "refused blocked by block 10.0.0.0/8, early",
		"10.1.2.3/icmp":        "refused blocked by block 10.0.0.0/8",
		"10.1.2.3/32/47":       "refused blocked by block 10.0.0.0/8",
		"10.1.2.3:9/sctp":      "refused blocked by block 10.0.0.0/8",
		"10.2.2.3:80":          "passes by allow 10.2.0.0/16",
		"10.0.0.53:53/udp":     "passes by allow 10.0.0.53:53/udp",
		"10.0.0.53:53/tcp":     "refused blocked by block 10.0.0.0/8, early",
		"2001:db8:1::1":        "refused blocked by block 2001:db8:1::/48, early",
		"[2001:db8:1::53]:1":   "passes by allow 2001:db8:1::53",
		"2001:db8:1::1/icmpv6": "refused blocked by block 2001:db8:1::/48",
		// Ports and protocols.
		"198.51.100.7":           "passes",
		"198.51.100.7:443":       "refused blocked by block 198.51.100.7:443, early",
		"198.51.100.7:443/udp":   "refused blocked by block 198.51.100.7:443, early",
		"198.51.100.7:443/dccp":  "refused blocked by block 198.51.100.7:443",
		"198.51.100.7/icmp":      "passes",
		"198.51.100.8":           "passes",
		"198.51.100.8/udp":       "refused blocked by block 198.51.100.8/udp, early",
		"198.51.100.8:1/udp":     "refused blocked by block 198.51.100.8/udp, early",
		"198.51.100.8:1/udplite": "passes",
		"168.63.129.16:80":       "refused blocked by preset azure, early",
		"168.63.129.16:53/udp":   "passes",
		// Spellings.
		"::ffff:10.1.2.3":               "refused blocked by block 10.0.0.0/8, early",
		"64:ff9b::10.1.2.3":             "refused blocked by block 10.0.0.0/8, early",
		"64:ff9b::10.2.2.3":             "passes by allow 10.2.0.0/16",
		"64:ff9b:1::169.254.169.254":    "refused blocked by preset metadata, early",
		"[64:ff9b:1:a9fe:a9:fe00::]:80": "refused blocked by preset metadata, early",
		"2002:a01:203::1/udp":           "refused blocked by block 10.0.0.0/8, early",
		"::10.1.2.3":                    "refused blocked by block 10.0.0.0/8, early",
		"::ffff:198.51.100.1":           "passes",
		// Loopback.
		"127.0.0.1:25":       "passes",
		"[::1]:25":           "passes",
		"127.0.0.1/32/47":    "refused blocked by tunnel of the host",
		"127.0.0.1:4789/udp": "refused blocked by tunnel of the host",
		"127.0.0.1:8472/udp": "passes",
		"198.51.100.1/32/47": "passes",
		// Mail.
		"203.0.113.25:25":             "passes by smtp.exempt 203.0.113.25",
		"[64:ff9b::203.0.113.25]:587": "passes by smtp.exempt 203.0.113.25",
		"198.51.100.1:25/udp":         "passes",
		"10.1.2.3:25":                 "refused blocked by block 10.0.0.0/8, early",
		"198.51.100.1:26":             "passes",
	}
	r := rehearse(t, p, maps.Container{})
	destinations.check(t, r, nil)
	expect{"169.254.169.254:22": "refused blocked by block 169.254.169.254:22/tcp, early"}.check(t, r, nil)

	// What a container may reach is what presets block, not what block lists.
	r = rehearse(t, p, maps.Container{Flags: maps.MayReachMetadata})
	expect{
		"169.254.169.254:80":         "passes by " + earlier,
		"64:ff9b:1::169.254.169.254": "passes by " + earlier,
		"169.254.169.254:22":         "refused blocked by block 169.254.169.254:22/tcp, early",
		"10.1.2.3":                   "refused blocked by block 10.0.0.0/8, early",
	}.check(t, r, nil)

	// Notes name what holds for other ports.
	if a := ask(t, r, "198.51.100.7", nil); !strings.Contains(strings.Join(a.Notes, " "), "198.51.100.7:443") {
		t.Errorf("notes %q", a.Notes)
	}
}

// A bucket empties with each packet that the copy of it judges.
func TestMail(t *testing.T) {
	p := policy.Default()
	p.SMTP.Rate = policy.Rate{Count: 1, Period: 24 * 3600e9}
	byHand := policy.Limit{Rate: policy.Rate{Count: 2, Period: 24 * 3600e9}, Burst: 2}
	byRule := policy.Limit{Rate: policy.Rate{Count: 3, Period: 24 * 3600e9}, Burst: 3}
	p.Containers = []policy.ContainerRule{
		{Name: "other", Metadata: policy.Allowed},
		{Name: "mailer-*", SMTP: &byRule, Metadata: policy.Allowed},
	}
	mailer := &container.Container{Source: "test", Names: []string{"mailer-1"}, Identity: container.Identity{ID: "mailer", Name: "mailer-1"}}
	for _, test := range []struct {
		name   string
		entry  maps.Container
		tokens []float64
		rule   string
		from   string
	}{
		{"policy", maps.Container{}, []float64{5, 4, 3, 2, 1, 0, 0}, "smtp", FromPolicy},
		{"by hand", maps.Container{Flags: maps.LimitSetByHand, Limit: maps.LimitOf(byHand)}, []float64{2, 1, 0}, "limit set", FromHand},
		{"rule", maps.Container{Limit: maps.LimitOf(byRule)}, []float64{3, 2, 1, 0}, "rule 2 of containers", FromRule},
		{"earlier rule", maps.Container{Limit: maps.LimitOf(byHand)}, []float64{2, 1, 0}, earlier, FromRule},
		{"partly used", maps.Container{Bucket: bucket(t, p.SMTP.Limit(), 3.5)}, []float64{1.5, .5, .5}, "smtp", FromPolicy},
		{"empty", maps.Container{Bucket: bucket(t, p.SMTP.Limit(), 5)}, []float64{0, 0}, "smtp", FromPolicy},
		{"used under another limit", maps.Container{Bucket: bucket(t, byRule, 1.9), Flags: maps.LimitSetByHand, Limit: maps.LimitOf(policy.Limit{Rate: byRule.Rate, Burst: 4})}, []float64{2.1, 1.1, .1}, "limit set", FromHand},
		{"closed", maps.Container{Bucket: bpf.EgressBucket{Closed: 1}}, []float64{0}, "smtp", FromPolicy},
	} {
		r := rehearse(t, p, test.entry)
		for i, tokens := range test.tokens {
			a := ask(t, r, "198.51.100.1:25", mailer)
			want := "passes by " + test.rule
			if tokens < 1 {
				want = "refused rate_limited by " + test.rule
			}
			if brief(a) != want || a.SMTP == nil || a.SMTP.From != test.from || a.SMTP.Tokens == nil || *a.SMTP.Tokens < tokens-.01 || *a.SMTP.Tokens > tokens+.01 || !a.SMTP.TakesToken {
				t.Errorf("%s, %d: got %q, %+v, want %q and %v tokens", test.name, i, brief(a), a.SMTP, want, tokens)
			}
			if waits := a.SMTP.Wait > 0; waits != (tokens < 1 && test.entry.Bucket.Closed == 0) {
				t.Errorf("%s, %d: waits %v s", test.name, i, a.SMTP.Wait)
			}
		}
	}

	// A rule that was not applied is named.
	a := ask(t, rehearse(t, p, maps.Container{}), "169.254.169.254", mailer)
	if brief(a) != "refused blocked by preset metadata, early" || !strings.Contains(strings.Join(a.Notes, " "), "rule 2 of containers matches") {
		t.Errorf("got %q, %q", brief(a), a.Notes)
	}
	a = ask(t, rehearse(t, p, maps.Container{Flags: maps.MayReachMetadata, Limit: maps.LimitOf(byRule)}), "169.254.169.254", mailer)
	if brief(a) != "passes by rule 2 of containers" || len(a.Notes) > 0 {
		t.Errorf("got %q, %q", brief(a), a.Notes)
	}

	// What happens over the limit.
	empty := maps.Container{Bucket: bucket(t, p.SMTP.Limit(), 5)}
	p.SMTP.OverLimit = policy.Reject
	expect{"198.51.100.1:25": "refused rate_limited by smtp, early"}.check(t, rehearse(t, p, empty), nil)
	p.Mode = policy.Audit
	expect{"198.51.100.1:25": "passes rate_limited by smtp"}.check(t, rehearse(t, p, empty), nil)
	p.SMTP.Rate = policy.Rate{}
	expect{"198.51.100.1:25": "passes by smtp"}.check(t, rehearse(t, p, maps.Container{}), nil)
}

// A container without room for a bucket opens no mail connection, and no exception holds for
// it.
func TestNoBucket(t *testing.T) {
	state, err := maps.CreateState()
	check(t, err)
	defer state.Close()
	check(t, state.Bury(cgroupID))
	r, err := loader.RehearsePolicy(policy.Default(), state, cgroupID)
	check(t, err)
	defer r.Close()
	expect{
		"198.51.100.1:25":    "refused no_bucket",
		"198.51.100.1:80":    "passes",
		"169.254.169.254:80": "refused blocked by preset metadata, early",
	}.check(t, r, nil)
}

// Explanation and program agree, whatever the policy, the container and the destination.
func TestRandom(t *testing.T) {
	const seed = 20261130
	random := rand.New(rand.NewPCG(seed, seed))
	one := func(list ...string) string { return list[random.IntN(len(list))] }
	addr := func() string {
		return one("169.254.169.254", "169.254.170.2", "168.63.129.16", "10.0.0.1", "10.1.0.1", "192.0.2.1", "192.0.2.2", "127.0.0.1", "203.0.113.9",
			"fd00:ec2::254", "fe80::a9fe:a9fe", "2001:db8::1", "2001:db8:1::1", "::1", "64:ff9b::a00:1", "64:ff9b::a9fe:a9fe",
			"64:ff9b:1:a9fe:a9:fe00::", "64:ff9b:1:a00:0:100::", "64:ff9b:1::a01:1", "2002:a00:1::", "::10.0.0.1")
	}
	port := func() uint16 { return []uint16{0, 0, 25, 53, 80, 587, 40000}[random.IntN(7)] }
	list := func() (rules []policy.Rule) {
		for range random.IntN(5) {
			a := netip.MustParseAddr(addr())
			r := policy.Rule{
				Prefix: netip.PrefixFrom(a, a.BitLen()-8*[]int{0, 0, 0, 1, 2, 4}[random.IntN(6)]).Masked(),
				Port:   port(), Proto: []uint8{0, 0, 6, 17, 1, 47}[random.IntN(6)],
			}
			if r.Validate() == nil {
				rules = append(rules, r)
			}
		}
		return rules
	}
	for range 40 {
		p := policy.Default()
		p.Presets = []string{one(policy.PresetNames()...)}
		p.Block, p.Allow, p.AllowDNS = list(), list(), random.IntN(3) == 0
		for _, r := range list() {
			p.SMTP.Exempt = append(p.SMTP.Exempt, r.Prefix)
		}
		p.SMTP.Ports = [][]uint16{{25, 465, 587}, {25}, {80, 40000}}[random.IntN(3)]
		p.SMTP.Burst = uint32(1 + random.IntN(3))
		p.SMTP.Rate.Period = 24 * 3600e9
		if random.IntN(4) == 0 {
			p.SMTP.Rate = policy.Rate{}
		}
		p.Mode = policy.Mode(one("enforce", "audit"))
		p.SMTP.OverLimit = policy.OverLimit(one("drop", "reject"))
		var c maps.Container
		if random.IntN(2) == 0 {
			c.Flags = maps.MayReachMetadata
		}
		if random.IntN(3) == 0 {
			c.Limit = maps.LimitOf(policy.Limit{Rate: policy.Rate{Count: 7, Period: 24 * 3600e9}, Burst: uint32(1 + random.IntN(4))})
		}
		r := rehearse(t, p, c)
		for range 200 {
			dst := policy.Rule{Prefix: netip.PrefixFrom(netip.MustParseAddr(addr()), 128), Port: port(), Proto: []uint8{0, 6, 6, 17, 1, 47, 132, 136, 253}[random.IntN(9)]}
			if dst.Prefix.Addr().Is4() {
				dst.Prefix = netip.PrefixFrom(dst.Prefix.Addr(), 32)
			}
			if dst.Validate() != nil {
				continue
			}
			if a, err := answer(r, dst, nil); err != nil || a.Verdict == Unknown {
				t.Fatalf("%s: %+v, %v, of policy %+v and container %+v", dst, a, err, p, c)
			}
		}
	}
}

// If the policy does not tell what the program does, Explain does not pretend to know.
func TestDisagreement(t *testing.T) {
	r := rehearse(t, policy.Default(), maps.Container{})
	r.Policy.Presets = nil
	a := ask(t, r, "169.254.169.254:80", nil)
	if a.Verdict != Unknown || a.Reason != "blocked" || !strings.Contains(strings.Join(a.Notes, " "), "do not agree: by the policy, it passes") {
		t.Errorf("got %+v", a)
	}
	r.Policy.Presets, r.Policy.Mode = []string{policy.Metadata}, policy.Audit
	if a := ask(t, r, "169.254.169.254:80", nil); a.Verdict != Unknown {
		t.Errorf("got %+v", a)
	}
}

// fds returns the file descriptors of BPF objects that this process has.
func fds(t *testing.T) (found []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/self/fdinfo/*")
	check(t, err)
	for _, path := range all {
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		check(t, err)
		if bytes.Contains(text, []byte("prog_id:")) || bytes.Contains(text, []byte("map_id:")) || bytes.Contains(text, []byte("link_id:")) {
			found = append(found, filepath.Base(path))
		}
	}
	return found
}

// kept is everything that the filter keeps.
func kept(t *testing.T, f *loader.Filter) string {
	t.Helper()
	state, err := f.State()
	check(t, err)
	defer state.Close()
	text := f.Fingerprint()
	for _, name := range maps.StateNames() {
		m := state.ByName()[name]
		if name == bpf.EgressMapTickets || m == nil {
			continue // sockets have these
		}
		if name == bpf.EgressMapTotals {
			sum, err := state.Totals()
			check(t, err)
			text += fmt.Sprintln(name, sum)
			continue
		}
		var key, value []byte
		var entries []string
		for all := m.Iterate(); all.Next(&key, &value); {
			entries = append(entries, fmt.Sprintf("%x=%x", key, value))
		}
		slices.Sort(entries)
		text += fmt.Sprintln(name, entries)
	}
	return text
}

// TestNothingCounted asks about containers of a filter that is in force, and looks for traces.
func TestNothingCounted(t *testing.T) {
	root, f, base := testenv.Root(t), testenv.Filter(t), testenv.Cgroup(t)
	if _, err := Explain(f, policy.Rule{Prefix: netip.MustParsePrefix("192.0.2.9/32")}, nil); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("nothing attached: got %v", err)
	}
	p := policy.Default()
	check(t, f.Attach(t.Context(), []string{base}, p))
	path := testenv.Child(t, base, "web")
	rel, err := root.Rel(path)
	check(t, err)
	id, err := root.ID(rel)
	check(t, err)
	web := &container.Container{Identity: container.Identity{ID: "web", CgroupID: id, Cgroup: rel}}
	state, err := f.State()
	check(t, err)
	defer state.Close()

	// With and without an entry, and with tokens that come back meanwhile.
	for _, entry := range []*maps.Container{nil, {Bucket: bucket(t, p.SMTP.Limit(), 2.5), Flags: maps.MayReachMetadata}} {
		if entry != nil {
			check(t, state.ByName()[bpf.EgressMapContainers].Put(id, *entry))
		}
		before, open := kept(t, f), fds(t)
		for _, c := range []*container.Container{nil, web} {
			for _, dst := range []string{"169.254.169.254:80", "198.51.100.1:25", "198.51.100.1:25", "127.0.0.1:4789/udp", "198.51.100.1"} {
				d, err := policy.ParseDestination(dst)
				check(t, err)
				a, err := Explain(f, d, c)
				check(t, err)
				if a.Verdict == Unknown || !a.Policed || len(a.Notes) > 0 {
					t.Errorf("%s: got %+v", dst, a)
				}
				if c == nil {
					continue
				}
				want := "passes by smtp"
				if dst == "169.254.169.254:80" && entry == nil {
					want = "refused blocked by preset metadata, early"
				} else if dst == "169.254.169.254:80" {
					want = "passes by " + earlier
				} else if a.SMTP == nil {
					continue
				}
				if brief(a) != want || !reflect.DeepEqual(a.Container, &web.Identity) {
					t.Errorf("%s of web: got %q, want %q: %+v", dst, brief(a), want, a)
				}
				if a.SMTP != nil && entry != nil && (*a.SMTP.Tokens < 2.4 || *a.SMTP.Tokens > 4.9) {
					t.Errorf("%s of web: got %v tokens", dst, *a.SMTP.Tokens)
				}
			}
		}
		if after := kept(t, f); after != before {
			t.Errorf("changed from\n%s\nto\n%s", before, after)
		}
		if after := fds(t); !slices.Equal(after, open) {
			t.Errorf("BPF objects %v are open, were %v", after, open)
		}
	}

	// A container outside.
	other := &container.Container{Identity: container.Identity{ID: "other", Cgroup: "/elsewhere"}}
	if _, err := Explain(f, policy.Rule{Prefix: netip.MustParsePrefix("192.0.2.9/32")}, other); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("outside: got %v", err)
	}
	status, err := f.Status()
	check(t, err)
	for dst, refused := range map[string]bool{"198.51.100.1:80": false, "169.254.169.254:80": true, "198.51.100.1:25": true} {
		d, err := policy.ParseDestination(dst)
		check(t, err)
		a, err := Unpoliced(f, d, other)
		check(t, err)
		want := Passes
		if refused && status.HasDefence(loader.HostSide) {
			want = Unknown
		}
		if a.Verdict != want || a.Policed || a.Blocked || a.Early {
			t.Errorf("unpoliced, %s: got %+v, want %s", dst, a, want)
		}
	}
}
