package report

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/egressbpf/egressbpf/internal/test/bench/results"
)

var update = flag.Bool("update", false, "write what is generated now")

// rounds is how many there are in madeUp.
const rounds = 9

// madeUp returns results that nobody measured. The machine becomes slower from round to round,
// by much more than any filter costs, but within a round all differences are exact.
func madeUp() results.Results {
	r := results.Results{Machine: results.Machine{
		Time: time.Date(2001, 2, 3, 4, 5, 0, 0, time.UTC), Version: "made up", Kernel: "made up",
		CPU: "made up", CPUs: 3, Busy: 0.01, Tools: map[string]string{"iptables": "made up", "clang": "made up"},
	}}
	add := func(part, operation, filter string, containers, cpus int, ns float64) *results.Cost {
		c := results.Cost{Part: part, Operation: operation, Filter: filter, Containers: containers, CPUs: cpus, Unit: "ns"}
		for i := range rounds {
			c.Samples = append(c.Samples, ns+float64(100*i))
		}
		r.Costs = append(r.Costs, c)
		return &r.Costs[len(r.Costs)-1]
	}
	absent := func(part, operation, filter, why string) {
		c := add(part, operation, filter, 1, 1, 0)
		c.Samples, c.Missing = nil, why
	}

	for operation, above := range map[string]float64{"udp4 from a container": 1000, "udp6 from a container": 1100} {
		for filter, ns := range map[string]float64{
			none: 0, emptyPrograms: 80, emptyNetfilter: 30, withoutHost: 42, hostAlone: 38, tool: 90,
			nftRules: 20, hashlimit: 30, nftablesSet: 15, "another filter": 50,
		} {
			add(traffic, operation, filter, 1, 1, above+ns)
		}
	}
	add(traffic, udp4, addressDeny, 1, 1, 1070).Prefixes = 1
	add(traffic, udp4, addressDeny, 1, 1, 1075).Prefixes = 1000
	absent(traffic, udp4, legacyRules, "this kernel has no ip_tables")
	for n, ns := range map[int]float64{10: 200, 100: 1800, 1000: 18000} {
		add(traffic, udp4, perContainer, n, 1, 1000+ns)
	}
	for filter, ns := range map[string]float64{none: 0, tool: 95, nftRules: 25} {
		add(traffic, udp4, filter, 1, 2, 1200+ns)
	}
	for filter, ns := range map[string]float64{none: 0, emptyNetfilter: 30, hostAlone: 32, tool: 34} {
		add(traffic, udpIntoHost, filter, 1, 1, 600+ns)
	}
	// Less with egressbpf than with the rules.
	for filter, ns := range map[string]float64{none: 20000, tool: 20100, nftRules: 20200} {
		add(traffic, "round trip tcp4", filter, 1, 1, ns)
	}
	add(traffic, "round trip tcp4", perContainer, 100, 1, 40000)
	// With Docker's own rules in iptables-legacy, all is faster: the rules add 150.
	add(traffic, "round trip tcp4", noneLegacy, 1, 1, 19000)
	add(traffic, "round trip tcp4", legacyRules, 1, 1, 19150)
	// Higher with egressbpf in most rounds, but not in enough of them.
	connect := add(traffic, "connect and close tcp4", tool, 1, 1, 50010)
	connect.Samples[0], connect.Samples[1] = 49000, 49000
	add(traffic, "connect and close tcp4", nftRules, 1, 1, 50000)
	add(traffic, "connect and close tcp4", none, 1, 1, 49900)
	// Higher in each round.
	add(traffic, "connect and close tcp6", tool, 1, 1, 50010)
	add(traffic, "connect and close tcp6", nftRules, 1, 1, 50000)
	for filter, ns := range map[string]float64{none: 8000, tool: 2000, nftRules: 9000} {
		add(traffic, refusedConnect, filter, 1, 1, ns)
	}
	for filter, ns := range map[string]float64{none: 8000, tool: 2000, nftRules: 4000} {
		add(traffic, refusedMail, filter, 1, 1, ns)
	}

	add(programs, emptyProgram, emptyProgram, 1, 1, 20).Instructions = 2
	add(programs, "pass tcp4 64 B", tool, 1, 1, 22.5).Instructions = 12345
	add(programs, "pass tcp4 64 B", addressDeny, 1, 1, 40).Prefixes = 10
	add(programs, "tcp4, 10,000 containers", tool, 1, 1, 23)
	add(programs, "blocked tcp4", tool, 1, 1, 125)
	absent(programs, "pass tcp6 64 B", tool, "no IPv6")

	add(commands, "attach", tool, 10_000, 1, 3.5e6)
	add(commands, "container start", none, 1000, 1, 1e9)
	add(commands, "container start", tool, 1000, 1, 1.001e9)
	add(commands, startCPU+", service's CPU", tool, 1000, 1, 1.5e6)
	memory := add(commands, "kernel memory", tool, 10_000, 1, 0)
	memory.Unit, memory.Samples = "bytes", []float64{3 << 20}
	absent(commands, "stats", tool, "nobody ran it")

	slices.SortStableFunc(r.Costs, func(a, b results.Cost) int {
		return strings.Compare(fmt.Sprint(a.Part, a.Operation, a.CPUs, a.Filter, a.Containers, a.Prefixes), fmt.Sprint(b.Part, b.Operation, b.CPUs, b.Filter, b.Containers, b.Prefixes))
	})
	r.Limits = []results.Limiter{
		{Filter: tool, PerSecond: 5. / 60, Burst: 5, CPUs: 1, Seconds: 30, Asked: 1000, Admitted: 7, Allowed: 7.5},
		{Filter: tool, PerSecond: 5. / 60, Burst: 5, CPUs: 2, Seconds: 30, Asked: 2000, Admitted: 8, Allowed: 7.5},
		{Filter: nftRules, PerSecond: 5. / 60, Burst: 5, CPUs: 1, Seconds: 30, Asked: 1000, Admitted: 7, Allowed: 7.5},
		{Filter: hashlimit, CPUs: 1, Missing: "no such module"},
	}
	return r
}

func madeUpData(t *testing.T, change func(*results.Results)) page {
	t.Helper()
	r := madeUp()
	if change != nil {
		change(&r)
	}
	d, err := newData(r)
	if err != nil {
		t.Fatal(err)
	}
	return page{data: d}
}

// remove removes costs.
func remove(which func(results.Cost) bool) func(*results.Results) {
	return func(r *results.Results) { r.Costs = slices.DeleteFunc(r.Costs, which) }
}

func TestAdded(t *testing.T) {
	f, err := madeUpData(t, nil).added(udp4, tool, emptyPrograms)
	if want := (figure{10, 10, 10, 10, 10, rounds}); err != nil || f != want {
		t.Errorf("got %+v, %v, want %+v", f, err, want)
	}
}

func TestSummarise(t *testing.T) {
	for _, test := range []struct {
		values []float64
		want   figure
	}{
		{[]float64{3}, figure{3, 3, 3, 3, 3, 1}},
		{[]float64{4, 1, 3, 2}, figure{2.5, 1.75, 3.25, 1, 4, 4}},
		// With five values, all are on one side of the median in 2/32 of all cases; with six
		// in 2/64; with nine, at most one is on one side in 20/512.
		{[]float64{1, 2, 3, 4, 5}, figure{3, 2, 4, 1, 5, 5}},
		{[]float64{1, 2, 3, 4, 5, 6}, figure{3.5, 2.25, 4.75, 1, 6, 6}},
		{[]float64{1, 2, 3, 4, 5, 6, 7, 8, 9}, figure{5, 3, 7, 2, 8, 9}},
		{[]float64{1, math.Inf(1), math.Inf(1)}, figure{math.Inf(1), math.Inf(1), math.Inf(1), 1, math.Inf(1), 3}},
	} {
		if got := summarise(test.values); got != test.want {
			t.Errorf("%v: got %+v, want %+v", test.values, got, test.want)
		}
	}
}

func TestCrossing(t *testing.T) {
	perContainerIs := func(n int) func(results.Cost) bool {
		return func(c results.Cost) bool { return c.Filter == perContainer && c.Containers == n }
	}
	shift := func(filter string, containers int, by float64) func(*results.Results) {
		return func(r *results.Results) {
			for _, c := range r.Costs {
				if c.Operation == udp4 && c.Filter == filter && c.Containers == containers && c.CPUs == 1 {
					for i := range c.Samples {
						c.Samples[i] += by
					}
				}
			}
		}
	}
	for name, test := range map[string]struct {
		change func(*results.Results)
		want   float64
		text   string
	}{
		// The rules add 20 with one container and 200 with ten, egressbpf 90.
		"between": {nil, 4.5, "**cheaper from 5 containers on**"},
		// 200 with ten, 1800 with a hundred, egressbpf 1000.
		"later segment":    {shift(tool, 1, 910), 55, "**cheaper from 55 containers on**"},
		"cheaper at once":  {shift(tool, 1, -80), 1, "cheaper from the first container on"},
		"never":            {shift(tool, 1, 1e6), math.Inf(1), "not cheaper for up to 1,000 containers"},
		"no rules for one": {remove(func(c results.Cost) bool { return c.Filter == nftRules }), 10, "cheaper with 10 containers; fewer were not measured"},
		"without ten":      {remove(perContainerIs(10)), 1 + 99*70./1780, "**cheaper from 5 containers on**"},
		// egressbpf adds 90 with one, 1090 with a thousand: with ten 99, with a hundred 189.
		"a tool that grows": {func(r *results.Results) {
			for _, c := range r.Costs {
				if c.Operation == udp4 && c.Filter == tool && c.CPUs == 1 {
					c.Containers, c.Samples = 1000, slices.Clone(c.Samples)
					for i := range c.Samples {
						c.Samples[i] += 999
					}
					r.Costs = append(r.Costs, c)
				}
			}
		}, 1 + 9*70./171, "**cheaper from 5 containers on**"},
	} {
		t.Run(name, func(t *testing.T) {
			p := madeUpData(t, test.change)
			w, err := p.walk(udp4)
			if err != nil {
				t.Fatal(err)
			}
			if f := w.crossing(); f.median != test.want && !(math.Abs(f.median-test.want) < 1e-9) {
				t.Errorf("got %v, want %v", f.median, test.want)
			}
			if got := p.Crossing(); !strings.Contains(got, test.text) {
				t.Errorf("got %q, want %q", got, test.text)
			}
		})
	}
	p := madeUpData(t, remove(func(c results.Cost) bool { return c.Filter == perContainer }))
	if got := p.Crossing(); !strings.Contains(got, "was not measured: the results have no “per-container rules”") {
		t.Error(got)
	}
}

func TestOneWayUDP(t *testing.T) {
	// 90 against 20, over 1400 in the fifth of nine rounds.
	want := fmt.Sprintf("**dearer than the three rules** (iptables-nft rules), by 70.0 (70.0 to 70.0) ns a packet, or %.1f %%", 100*70./1420)
	if got := madeUpData(t, nil).OneWayUDP(); !strings.Contains(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	dear := func(r *results.Results) {
		for _, c := range r.Costs {
			if c.Operation == udp4 && c.Filter == nftRules {
				for i := range c.Samples {
					c.Samples[i] += 100
				}
			}
		}
	}
	if got := madeUpData(t, dear).OneWayUDP(); !strings.Contains(got, "**cheaper than the three rules** (iptables-nft rules), by 30.0 (30.0 to 30.0)") {
		t.Error(got)
	}
	gone := remove(func(c results.Cost) bool { return c.Filter == nftRules })
	if got := madeUpData(t, gone).OneWayUDP(); !strings.Contains(got, "was not measured: the results have no “iptables-nft rules”") {
		t.Error(got)
	}
}

func TestBounds(t *testing.T) {
	type rows map[string]verdict
	want := map[string]rows{
		"host-side-container": {"UDP packet from a container (IPv4)": holds, "UDP packet from a container (IPv6)": holds},
		"host-side-other":     {"UDP packet into the host from outside (IPv4)": holds},
		"into-host":           {"UDP packet into the host from outside (IPv4)": exceeded},
		"tool-udp":            {"UDP packet from a container (IPv4)": holds, "UDP packet from a container (IPv6)": holds},
		"round-trips": {
			"TCP round trip (IPv4), iptables-nft rules":           holds,
			"TCP round trip (IPv4), iptables-legacy rules":        holds,
			"TCP round trip (IPv6), iptables-nft rules":           notMeasured,
			"TCP round trip (IPv6), iptables-legacy rules":        notMeasured,
			"TCP connect and close (IPv4), iptables-nft rules":    holdsWithinNoise,
			"TCP connect and close (IPv4), iptables-legacy rules": notMeasured,
			"TCP connect and close (IPv6), iptables-nft rules":    exceeded,
			"TCP connect and close (IPv6), iptables-legacy rules": notMeasured,
		},
		"per-container-100":  {"UDP packet from a container (IPv4)": holds},
		"per-container-1000": {"UDP packet from a container (IPv4)": holds},
		"refused-mail":       {"iptables-nft rules": exceeded, "iptables-legacy rules": notMeasured},
		"refused-connect":    {"iptables-nft rules": exceeded, "iptables-legacy rules": notMeasured},
		"limiter":            {"1 CPU": holds, "2 CPUs": exceeded},
		"service-start":      {"container start, service's CPU": holds},
	}
	bounds := madeUpData(t, nil).bounds()
	if len(bounds) != len(want) {
		t.Errorf("%d bounds, want %d", len(bounds), len(want))
	}
	measured := map[string]string{}
	for _, b := range bounds {
		got := rows{}
		for _, r := range b.rows {
			got[r.what] = r.verdict
			measured[b.id] += r.measured + "\n"
		}
		if !maps.Equal(got, want[b.id]) {
			t.Errorf("%s: got %v, want %v", b.id, got, want[b.id])
		}
	}
	for id, text := range map[string]string{
		"host-side-container": "+8.0 (+8.0 to +8.0) ns",
		"into-host":           "+34.0 ns; an empty netfilter program: +30.0 ns; difference: +4.0 (+4.0 to +4.0) ns",
		"per-container-100":   "20.0 (20.0 to 20.0)",
		"per-container-1000":  "200 (200 to 200)",
		"limiter":             "1 (8 admitted, 7.5 allowed)",
		"service-start":       "1.5 ms",
	} {
		if !strings.Contains(measured[id], text) {
			t.Errorf("%s: got %q, want %q", id, measured[id], text)
		}
	}
}

// TestNothing generates a page from no results at all.
func TestNothing(t *testing.T) {
	files, err := generate(results.Results{}, fstest.MapFS{})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 1 {
		t.Errorf("files %v, want the page alone", slices.Collect(maps.Keys(files)))
	}
	for _, b := range (data{}).bounds() {
		for _, r := range b.rows {
			if r.verdict != notMeasured || !strings.HasPrefix(r.measured, "not measured: the results have no ") {
				t.Errorf("%s: %v", b.id, r)
			}
		}
	}
}

// TestEachMissing generates pages from results of which one each was not measured.
func TestEachMissing(t *testing.T) {
	all := madeUp()
	for i := range all.Costs {
		for _, why := range []string{"", "made-up reason"} {
			r := madeUp()
			r.Costs[i].Samples, r.Costs[i].Missing = nil, why
			d, err := newData(r)
			if err != nil {
				t.Fatal(err)
			}
			text, err := d.markdown(nil, fstest.MapFS{})
			if err != nil {
				t.Fatalf("%+v: %v", r.Costs[i], err)
			}
			if c := r.Costs[i]; c.Filter != emptyProgram && why != "" && !bytes.Contains(text, []byte(why)) {
				t.Errorf("%+v: the page does not say why", c)
			}
			if bytes.Contains(text, []byte("NaN")) {
				t.Errorf("%+v: NaN", r.Costs[i])
			}
		}
	}
}

func TestTwice(t *testing.T) {
	r := madeUp()
	r.Costs = append(r.Costs, r.Costs[0])
	if _, err := generate(r, fstest.MapFS{}); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Error(err)
	}
}

func TestDecimal(t *testing.T) {
	for want, got := range map[string]string{
		"0": decimal(-0.4, 0), "−1": decimal(-1, 0), "1,234,567.9": decimal(1234567.89, 1), "999": decimal(999, 0),
		"+1.5": signed(nanoseconds)(1.5), "0.0": signed(nanoseconds)(0.01), "−0.1": signed(nanoseconds)(-0.1),
		"1.2 ms": quantity("ns")(1.2e6), "350 KiB": quantity("bytes")(350 << 10), "1 CPU2 CPUs": count(1, "CPU") + count(2, "CPU"), "2 prefixes": count(2, "prefix"),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestGolden generates a page from made-up results, and a note on a bound that does not hold.
func TestGolden(t *testing.T) {
	notes := fstest.MapFS{"into-host.md": {Data: []byte("A made-up explanation.\n")}}
	files, err := generate(madeUp(), notes)
	if err != nil {
		t.Fatal(err)
	}
	again, err := generate(madeUp(), notes)
	if err != nil {
		t.Fatal(err)
	}
	if !maps.EqualFunc(files, again, bytes.Equal) {
		t.Error("the same results make different files")
	}
	page := files[pageName]
	for _, plot := range []string{"ratios", "refused", "containers", "programs", "limiter"} {
		svg := files["performance/"+plot+".svg"]
		if !bytes.Contains(svg, []byte("fill:#FFFFFF")) {
			t.Errorf("plot %s has no white background", plot)
		}
		if bytes.Contains(svg, []byte("NaN")) || bytes.Contains(svg, []byte("Inf")) {
			t.Errorf("plot %s has coordinates that are no numbers", plot)
		}
		if texts, fixed := bytes.Count(svg, []byte("<text ")), bytes.Count(svg, []byte("textLength=")); texts == 0 || texts != fixed {
			t.Errorf("plot %s has %d texts, and sets the width of %d", plot, texts, fixed)
		}
		if !bytes.Contains(page, []byte("(performance/"+plot+".svg)")) {
			t.Errorf("the page does not show plot %s", plot)
		}
	}
	const file = "testdata/made-up.md"
	if *update {
		if err := os.WriteFile(file, page, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(page, want) {
		t.Errorf("the page differs from %s: go test ./internal/test/bench/report -run TestGolden -update", file)
	}
}

// TestRun runs the command in a folder that has a plot of earlier results.
func TestRun(t *testing.T) {
	docs := t.TempDir()
	if err := os.MkdirAll(filepath.Join(docs, folder, "notes"), 0o755); err != nil {
		t.Fatal(err)
	}
	old, raw := filepath.Join(docs, folder, "old.svg"), filepath.Join(docs, folder, "results.json")
	for path, text := range map[string]string{
		old: "<svg/>",
		filepath.Join(docs, folder, "notes", "limiter.md"): "A made-up note.",
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := madeUp().Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := Run([]string{"--results", raw, "--out", docs}); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(docs, pageName))
	if err != nil || !bytes.Contains(page, []byte("A made-up note.")) {
		t.Error("no note", err)
	}
	if _, err := os.Stat(old); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the old plot is still there", err)
	}
	if err := Run([]string{"--results", raw + "x", "--out", docs}); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := Run([]string{"more"}); err == nil {
		t.Error("no error about an argument")
	}
}
