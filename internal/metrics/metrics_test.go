package metrics

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	bpfmaps "github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// engines know the containers of a map, by id.
type engines map[string]container.Container

func (e engines) Find(id string) (container.Container, bool) {
	c, ok := e[id]
	return c, ok
}

func (e engines) AddUncovered(context.Context, *loader.Filter, *loader.Status) error { return nil }

// row is what was counted for a container, each count another number.
func row(id string, cgroupID uint64) stats.Container {
	tokens := 1.5
	blocked := func(n uint64) stats.Blocked {
		return stats.Blocked{Traffic: stats.Traffic{Packets: n, Bytes: 10 * n}, Connects: 100 * n}
	}
	c := stats.Container{
		Identity: container.Identity{ID: id, CgroupID: cgroupID, Cgroup: "/docker/" + id},
		Families: stats.Denied{Denied: 5}, HostSide: stats.Traffic{Packets: 6, Bytes: 60},
		Refused: stats.Refusals{Malformed: blocked(1), Blocked: blocked(2), RateLimited: blocked(3), NoBucket: blocked(4)},
	}
	c.SMTP = stats.Bucket{SMTP: stats.SMTP{Allowed: 7, RateLimited: 8, NoBucket: 9}, Tokens: &tokens}
	return c
}

// full has every metric.
func full(containers ...stats.Container) *Reading {
	c := row("", 0)
	return &Reading{
		status: &loader.Status{
			Enforcing: true, Mode: policy.Enforce, Cgroups: []string{"/sys/fs/cgroup/docker"},
			Defences:  []loader.Defence{{Name: loader.SocketFamilies, Active: true}, {Name: loader.HostSide}},
			Uncovered: make([]loader.Uncovered, 2),
			Room:      &bpfmaps.Room{Containers: 3, Of: 100, Removed: 4, Without: 1, OfStateless: 200},
		},
		stats: &stats.Stats{
			Containers: containers,
			Total:      stats.Total{Families: c.Families, HostSide: c.HostSide, SMTP: c.SMTP.SMTP, Refused: c.Refused},
		},
		reload:        outcome{tried: true, successful: true, last: time.Unix(1700000000, 250e6)},
		missed:        &bpfmaps.Missed{Lost: 10, LeftOut: 12},
		lostByReaders: new(uint64),
	}
}

// show returns the text that Prometheus gets, without comments. One more container is left out.
func show(t testing.TB, r *Reading, known engines) string {
	t.Helper()
	lines := strings.Split(written(t, r, known), "\n")
	return strings.Join(slices.DeleteFunc(lines, func(line string) bool { return strings.HasPrefix(line, "#") }), "\n")
}

// written returns the text with its comments, after it has checked that a library reads the same.
func written(t testing.TB, r *Reading, known engines) string {
	t.Helper()
	r.label(1, known)
	var out bytes.Buffer
	check(t, r.Write(&out))
	var again bytes.Buffer
	for _, family := range parse(t, out.String()) {
		_, err := expfmt.MetricFamilyToText(&again, family)
		check(t, err)
	}
	if got, want := out.String(), again.String(); got != want {
		t.Errorf("got\n%s\na library writes\n%s", got, want)
	}
	return out.String()
}

// parse reads Prometheus's text format: the families in order of their names.
func parse(t testing.TB, text string) []*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	byName, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	var families []*dto.MetricFamily
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		family := byName[name]
		seen := map[string]bool{}
		for _, m := range family.Metric {
			if labels := fmt.Sprint(m.Label); seen[labels] {
				t.Errorf("%s %s is there twice", name, labels)
			} else {
				seen[labels] = true
			}
		}
		families = append(families, family)
	}
	return families
}

func TestNames(t *testing.T) {
	all := parse(t, written(t, full(row("web", 1)), nil))
	problems, err := promlint.NewWithMetricFamilies(all).Lint()
	check(t, err)
	for _, p := range problems {
		t.Errorf("promlint: %s: %s", p.Metric, p.Text)
	}
	if len(all) != len(families) {
		t.Errorf("there are %d metrics, a full reading has %d", len(families), len(all))
	}
}

func TestValues(t *testing.T) {
	web := row("web", 1)
	r := full(web)
	got := show(t, r, engines{"web": {Identity: container.Identity{Name: "front"}, Image: "nginx:1"}})
	for _, want := range []string{
		`egressbpf_read_successful 1`,
		`egressbpf_enforcing 1`,
		`egressbpf_mode{mode="audit"} 0`,
		`egressbpf_mode{mode="enforce"} 1`,
		`egressbpf_defence_active{defence="host_side"} 0`,
		`egressbpf_defence_active{defence="socket_families"} 1`,
		`egressbpf_policed_containers 2`, // one is left out
		`egressbpf_containers_left_out 1`,
		`egressbpf_uncovered_containers 2`,
		`egressbpf_map_entries{map="containers"} 3`,
		`egressbpf_map_capacity{map="containers"} 100`,
		`egressbpf_map_entries{map="stateless"} 5`,
		`egressbpf_map_capacity{map="stateless"} 200`,
		`egressbpf_policy_reload_successful 1`,
		`egressbpf_policy_reload_timestamp_seconds 1.70000000025e+09`,
		`egressbpf_events_lost_total{stage="kernel"} 10`,
		`egressbpf_events_lost_total{stage="reader"} 0`,
		`egressbpf_events_suppressed_total 12`,
		`egressbpf_dropped_packets_total{reason="blocked"} 2`,
		`egressbpf_dropped_packets_total{reason="malformed"} 1`,
		`egressbpf_dropped_packets_total{reason="no_bucket"} 4`,
		`egressbpf_dropped_packets_total{reason="rate_limited"} 3`,
		`egressbpf_dropped_bytes_total{reason="blocked"} 20`,
		`egressbpf_refused_connects_total{reason="blocked"} 200`,
		`egressbpf_refused_connects_total{reason="rate_limited"} 300`,
		`egressbpf_refused_sockets_total 5`,
		`egressbpf_host_dropped_packets_total 6`,
		`egressbpf_smtp_connections_total{verdict="allowed"} 7`,
		`egressbpf_smtp_connections_total{verdict="no_bucket"} 9`,
		`egressbpf_smtp_connections_total{verdict="rate_limited"} 8`,
		`egressbpf_container_info{container="front",id="web",image="nginx:1"} 1`,
		`egressbpf_container_dropped_packets_total{container="front",id="web",reason="blocked"} 2`,
		`egressbpf_container_smtp_connections_total{container="front",id="web",verdict="allowed"} 7`,
		`egressbpf_container_smtp_tokens{container="front",id="web"} 1.5`,
	} {
		if !slices.Contains(strings.Split(got, "\n"), want) {
			t.Errorf("%s is missing in\n%s", want, got)
		}
	}

	// No series stays of a container whose cgroup is gone.
	web.Cgroup = ""
	if got := show(t, full(web), nil); strings.Contains(got, "egressbpf_container_") || !strings.Contains(got, "egressbpf_policed_containers 1\n") {
		t.Errorf("of a container that is gone: %s", got)
	}
	// A limit that is not known.
	web = row("web", 1)
	web.SMTP.Tokens = nil
	if got := show(t, full(web), nil); strings.Contains(got, "tokens") {
		t.Errorf("without a limit: %s", got)
	}
	r = full()
	r.uncertain = true
	if got := show(t, r, nil); strings.Contains(got, "egressbpf_uncovered_containers") {
		t.Errorf("uncovered containers are not known: %s", got)
	}
}

// What cannot be read has no numbers.
// A pod's container has the labels that Kubernetes' own metrics have.
func TestPods(t *testing.T) {
	known := engines{
		"agent": {Identity: container.Identity{Name: "kube-system/cni-1/agent"}, Image: "agent:1", Pod: container.Pod{Namespace: "kube-system", Name: "cni-1", UID: "u", Container: "agent"}},
		"box":   {Identity: container.Identity{Name: "kube-system/cni-1/POD"}, Pod: container.Pod{Namespace: "kube-system", Name: "cni-1", UID: "u", Container: container.Sandbox}},
		"web":   {Identity: container.Identity{Name: "web"}},
	}
	got := show(t, full(row("agent", 1), row("box", 1), row("web", 1)), known)
	for _, want := range []string{
		`egressbpf_container_info{container="agent",id="agent",namespace="kube-system",pod="cni-1",image="agent:1"} 1`,
		`egressbpf_container_smtp_connections_total{container="POD",id="box",namespace="kube-system",pod="cni-1",verdict="allowed"} 7`,
		`egressbpf_container_smtp_connections_total{container="web",id="web",verdict="allowed"} 7`,
	} {
		if !strings.Contains(got, want+"\n") {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
}

func TestFailure(t *testing.T) {
	const failed = "egressbpf_read_successful 0\n"
	for _, tt := range []struct {
		what   string
		change func(*Reading)
		want   string
		not    string
	}{
		{"no status", func(r *Reading) { r.status, r.stats, r.err = nil, nil, errors.New("no") }, failed, "mode"},
		{"no counters", func(r *Reading) { r.stats, r.err = nil, errors.New("no") }, failed, "mode"},
		{"no state", func(r *Reading) { r.err = errors.New("no") }, failed, "dropped"},
		{"detached meanwhile", func(r *Reading) { r.stats, r.err = nil, loader.ErrNotAttached }, failed, "mode"},
		{"not attached", func(r *Reading) {
			*r.status = loader.Status{Cgroups: []string{}}
			r.stats, r.err = nil, fmt.Errorf("x: %w", loader.ErrNotAttached)
		}, `egressbpf_mode{mode="enforce"} 0` + "\n", "dropped"},
	} {
		r := full(row("web", 1))
		tt.change(r)
		got := show(t, r, nil)
		for _, want := range []string{tt.want, "egressbpf_enforcing 0\n", "egressbpf_build_info{", "egressbpf_policy_reload_successful 1\n"} {
			if !strings.Contains(got, want) {
				t.Errorf("%s: %s is missing in\n%s", tt.what, want, got)
			}
		}
		if strings.Contains(got, tt.not) {
			t.Errorf("%s: %s is in\n%s", tt.what, tt.not, got)
		}
	}

	r := full()
	var reload Reload
	r.reload = reload.outcome()
	if got := show(t, r, nil); strings.Contains(got, "reload") {
		t.Errorf("before the first attempt: %s", got)
	}
	reload.Done(errors.New("no"))
	r.reload = reload.outcome()
	if got := show(t, r, nil); !strings.Contains(got, "egressbpf_policy_reload_successful 0\n") || strings.Contains(got, "timestamp") {
		t.Errorf("after a failure: %s", got)
	}
}

// Names of containers are data, whatever is in them.
func TestHostileNames(t *testing.T) {
	names := []string{
		`quote"`, `back\slash`, "new\nline", "carriage\rreturn", "<script>alert(1)</script>", strings.Repeat("x", 255),
		"invalid\xff\xfe", "invalid\xfe\xff", "\x00\x1b[2J", "web\u202e", "# HELP x", `a="b"} 1`,
		"{}", "ünïcode", "\xed\xa0\x80", "+Inf", "le",
	}
	var rows []stats.Container
	known := engines{}
	for i, name := range names {
		c := row(name, uint64(i+1))
		rows = append(rows, c)
		known[c.ID] = container.Container{Identity: container.Identity{Name: name}, Image: name}
	}
	r := full(rows...)
	text := show(t, r, known)
	if !utf8.ValidString(text) {
		t.Error("the text is not valid UTF-8")
	}
	all := parse(t, text)
	got := all[slices.IndexFunc(all, func(f *dto.MetricFamily) bool { return f.GetName() == "egressbpf_container_info" })].GetMetric()
	// Two of them are the same when they are valid, and so are their cgroups.
	if len(got) != len(names)-1 {
		t.Fatalf("%d containers, want %d:\n%s", len(got), len(names)-1, text)
	}
	ids := map[string]bool{}
	for _, m := range got {
		for _, l := range m.GetLabel() {
			if l.GetName() == "id" {
				ids[l.GetValue()] = true
			}
			if l.GetName() == "image" && !slices.ContainsFunc(names, func(name string) bool { return strings.ToValidUTF8(name, "\uFFFD") == l.GetValue() }) {
				t.Errorf("image %q", l.GetValue())
			}
		}
	}
	for _, name := range names {
		if want := strings.ToValidUTF8(name, "\uFFFD"); !ids[want] && !strings.HasPrefix(name, "invalid") {
			t.Errorf("no series for %q", name)
		}
	}
	if n := strings.Count(text, "\n"); n > 60+20*len(names) {
		t.Errorf("%d lines: a name has made some", n)
	}
}

// Containers below several policed cgroups can share a name.
func TestSharedIDs(t *testing.T) {
	one, two, three, four := row("web", 1), row("web", 2), row("db", 3), row("web\xff", 4)
	two.Cgroup = "/other/web"
	three.Cgroup = "/docker/db"
	five := row("web\xfe", 5)
	four.Cgroup, five.Cgroup = "/docker/\xff", "/docker/\xfe"
	if got, want := labelIDs([]*stats.Container{&one, &two, &three, &four, &five}), []string{"/docker/web", "/other/web", "db", "/docker/\uFFFD", ""}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	got := show(t, full(one, two, three, four, five), nil)
	for _, want := range []string{"egressbpf_policed_containers 6\n", "egressbpf_containers_left_out 2\n", `egressbpf_container_refused_sockets_total{container="",id="/other/web"} 5`} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is missing in\n%s", want, got)
		}
	}
}

// TestDocs holds the table in docs/metrics.md against the code.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile("../../docs/metrics.md")
	check(t, err)
	var documented []string
	documented = append(documented, regexp.MustCompile("(?m)^\\| `egressbpf_.*$").FindAllString(string(page), -1)...)
	var want []string
	for _, family := range parse(t, written(t, full(row("web", 1)), nil)) {
		var labels []string
		for _, l := range family.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		name := family.GetName()
		if len(labels) > 0 {
			name += "{" + strings.Join(labels, ",") + "}"
		}
		want = append(want, fmt.Sprintf("| `%s` | %s | %s |", name, strings.ToLower(family.GetType().String()), family.GetHelp()))
	}
	slices.Sort(documented)
	slices.Sort(want)
	if !slices.Equal(documented, want) {
		t.Errorf("docs/metrics.md should have exactly these rows:\n%s", strings.Join(want, "\n"))
	}
}

// scrape returns what a Collector tells of a real filter.
func scrape(t testing.TB, c *Collector) string {
	t.Helper()
	var out bytes.Buffer
	if err := c.Write(&out); err != nil {
		t.Log(err)
	}
	parse(t, out.String())
	return out.String()
}

// TestFilter reads a real filter, from before it is attached until after it is detached.
func TestFilter(t *testing.T) {
	var log bytes.Buffer
	filter := testenv.Filter(t)
	c := &Collector{Filter: filter, Root: testenv.Root(t), Containers: true, Log: slog.New(slog.NewTextHandler(&log, nil))}
	expect := func(what string, want ...string) {
		t.Helper()
		got := scrape(t, c)
		for _, want := range want {
			if !strings.Contains(got, "\n"+want+"\n") {
				t.Errorf("%s: %s is missing in\n%s", what, want, got)
			}
		}
	}
	none := []string{"egressbpf_read_successful 1", "egressbpf_enforcing 0"}
	expect("before", none...)

	parent := testenv.Child(t, testenv.Cgroup(t), "docker")
	p := policy.Default()
	check(t, filter.Attach(t.Context(), []string{parent}, p))
	testenv.Child(t, parent, "web")
	expect("attached", "egressbpf_read_successful 1", "egressbpf_enforcing 1", `egressbpf_mode{mode="enforce"} 1`,
		"egressbpf_policed_containers 1", `egressbpf_dropped_packets_total{reason="blocked"} 0`,
		`egressbpf_container_smtp_tokens{container="",id="web"} 5`, `egressbpf_container_info{container="",id="web",image=""} 1`)
	check(t, os.Remove(parent+"/web"))
	if got := scrape(t, c); strings.Contains(got, `id="web"`) {
		t.Errorf("a container that is gone: %s", got)
	}
	testenv.Child(t, parent, "db")
	c.Containers = false
	if got := scrape(t, c); strings.Contains(got, "egressbpf_container_") || !strings.Contains(got, "\negressbpf_policed_containers 1\n") {
		t.Errorf("without containers: %s", got)
	}

	p.Mode = policy.Audit
	check(t, filter.Attach(t.Context(), []string{parent}, p))
	expect("audit", "egressbpf_enforcing 0", `egressbpf_mode{mode="audit"} 1`)
	check(t, filter.Detach(t.Context(), nil))
	expect("detached", none...)

	c.Filter = nil
	expect("unreadable", "egressbpf_read_successful 0", "egressbpf_enforcing 0")
	expect("still", "egressbpf_read_successful 0")
	c.Filter = filter
	expect("readable", none...)
	if strings.Count(log.String(), "metrics cannot be read") != 1 || strings.Count(log.String(), "can be read again") != 1 {
		t.Errorf("logged:\n%s", &log)
	}

	var out bytes.Buffer
	if err := c.Write(&out); !errors.Is(err, loader.ErrNotAttached) || !strings.Contains(out.String(), "\negressbpf_enforcing 0\n") {
		t.Errorf("got %v, %s", err, &out)
	}
}

// A scrape looks at each container once: its cost grows with them, not faster, and ends
// growing with MaxContainers.
func TestScrapeAmongMany(t *testing.T) {
	cost, lines := map[int]time.Duration{}, map[int]int{}
	collectors := map[int]*Collector{}
	for _, n := range []int{10, 1000, MaxContainers + 500} {
		filter := testenv.Filter(t)
		parent := testenv.Child(t, testenv.Cgroup(t), "docker")
		for i := range n {
			testenv.Child(t, parent, fmt.Sprint("c", i))
		}
		check(t, filter.Attach(t.Context(), []string{parent}, policy.Default()))
		collectors[n] = &Collector{Filter: filter, Root: testenv.Root(t), Containers: true}
	}
	for range 3 {
		for n, c := range collectors {
			var out bytes.Buffer
			before := cpu(t)
			check(t, c.Write(&out))
			if took := cpu(t) - before; cost[n] == 0 || took < cost[n] {
				cost[n] = took
			}
			lines[n] = strings.Count(out.String(), "\negressbpf_container_info{")
		}
	}
	t.Logf("a scrape of 10 containers: %v; 1000: %v; %d: %v", cost[10], cost[1000], MaxContainers+500, cost[MaxContainers+500])
	if cost[1000] > 8*cost[10] {
		t.Errorf("a scrape takes %v with 10 containers, and %v with 1000", cost[10], cost[1000])
	}
	if lines[1000] != 1000 || lines[MaxContainers+500] != MaxContainers {
		t.Errorf("series of so many containers: %v", lines)
	}
}

// cpu returns the CPU time of this process.
func cpu(t testing.TB) time.Duration {
	var ts unix.Timespec
	check(t, unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts))
	return time.Duration(ts.Nano())
}
