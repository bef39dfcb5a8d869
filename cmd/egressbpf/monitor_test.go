package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/loader"
)

// happening is a stream of records that waits for more when there are none.
type happening []events.Record

func (h *happening) Next(ctx context.Context) (events.Record, error) {
	if len(*h) == 0 {
		<-ctx.Done()
		return events.Record{}, context.Cause(ctx)
	}
	r := (*h)[0]
	*h = (*h)[1:]
	return r, nil
}

// aRefusal is one with everything.
func aRefusal() events.Record {
	yes := true
	return events.Record{
		Type: events.Refusal, Time: time.Date(2026, 11, 28, 12, 0, 0, 123456789, time.Local), Node: "host1",
		Container: &events.Container{ID: hex, Name: "web", Image: "nginx:1", Cgroup: "/docker/" + hex, CgroupID: 1<<63 + 1},
		K8s:       &events.K8s{Namespace: "shop", Pod: "web-0", PodUID: "u", Container: "nginx"},
		Hook:      events.HookConnect, Reason: events.ReasonBlocked, Rule: "preset aws", WouldBlock: &yes, Blocked: &yes, Protocol: "tcp",
		Source:      &events.Endpoint{Address: netip.MustParseAddr("172.17.0.2"), Port: 40000},
		Destination: &events.Endpoint{Address: netip.MustParseAddr("169.254.169.254"), Port: 80},
		Process:     &events.Process{PID: 4711, Comm: "curl"}, Bytes: 60,
	}
}

// shown returns what monitor prints of records.
func shown(t *testing.T, o monitorOptions, records ...events.Record) (stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out, errs bytes.Buffer
	source := append(happening(records), events.Record{Type: "done"})
	check(t, o.show(ctx, cancelAt{&source, cancel}, &out, &errs))
	return out.String(), errs.String()
}

// cancelAt interrupts the command at a record of type done.
type cancelAt struct {
	events.Source
	cancel func()
}

func (c cancelAt) Next(ctx context.Context) (events.Record, error) {
	r, err := c.Source.Next(ctx)
	if r.Type == "done" {
		c.cancel()
		return c.Source.Next(ctx)
	}
	return r, err
}

func TestCompact(t *testing.T) {
	no := false
	const at = "2026-11-28 12:00:00.123  "
	for _, tt := range []struct {
		change func(*events.Record)
		want   string
	}{
		{func(*events.Record) {}, at + "web  curl[4711]  connect tcp  169.254.169.254:80  blocked (preset aws)"},
		{func(r *events.Record) { r.Blocked = &no }, at + "web  curl[4711]  connect tcp  169.254.169.254:80  blocked (preset aws), passed in audit mode"},
		{func(r *events.Record) { r.Container.Name = "" }, at + "0123456789ab  curl[4711]  connect tcp  169.254.169.254:80  blocked (preset aws)"},
		{func(r *events.Record) { r.Container.Name, r.Container.ID = "", "web-2" }, at + "web-2  curl[4711]  connect tcp  169.254.169.254:80  blocked (preset aws)"},
		{func(r *events.Record) { *r.Container = events.Container{Cgroup: "/a/b"} }, at + "/a/b  curl[4711]  connect tcp  169.254.169.254:80  blocked (preset aws)"},
		{func(r *events.Record) { *r.Container = events.Container{} }, at + "-  curl[4711]  connect tcp  169.254.169.254:80  blocked (preset aws)"},
		{func(r *events.Record) {
			r.Container, r.Process, r.Hook, r.Protocol, r.Rule = nil, nil, events.HookHost, "icmp", ""
			r.Destination = &events.Endpoint{Address: netip.MustParseAddr("fd00:ec2::254")}
		}, at + "-  -  host icmp  fd00:ec2::254  blocked"},
		{func(r *events.Record) {
			r.Destination = &events.Endpoint{Address: netip.MustParseAddr("fd00:ec2::254"), Port: 443}
		}, at + "web  curl[4711]  connect tcp  [fd00:ec2::254]:443  blocked (preset aws)"},
		{func(r *events.Record) {
			r.Hook, r.Reason, r.Family, r.Protocol, r.Destination, r.Rule = events.HookSocket, events.ReasonFamily, "packet", "", nil, "socket_families"
		}, at + "web  curl[4711]  socket packet  -  family (socket_families)"},
		{func(r *events.Record) { *r = events.Record{Type: events.Refusal} }, "-  -  -  -  -  -"},
		{func(r *events.Record) { r.Destination = &events.Endpoint{} }, at + "web  curl[4711]  connect tcp  -  blocked (preset aws)"},
		// Names cannot pass for something else.
		{func(r *events.Record) {
			r.Container.Name, r.Process.Comm = "web  nc[1]  connect", `a"b`
		}, at + `"web  nc[1]  connect"  "a\"b"[4711]  connect tcp  169.254.169.254:80  blocked (preset aws)`},
		{func(r *events.Record) { r.Container.Name, r.Process.Comm = "-", "" }, at + `"-"  ""[4711]  connect tcp  169.254.169.254:80  blocked (preset aws)`},
		{func(r *events.Record) {
			r.Container.Name, r.Process.Comm = "\x1b[2Ja\nb\x9b", "\u202e\xff\t"
			r.Destination.Address = netip.MustParseAddr("fe80::1%\x1b[0m")
		}, at + `"\x1b[2Ja\nb\x9b"  "\u202e\xff\t"[4711]  connect tcp  "[fe80::1%\x1b[0m]:80"  blocked (preset aws)`},
	} {
		r := aRefusal()
		tt.change(&r)
		stdout, stderr := shown(t, monitorOptions{output: compact}, r)
		if stdout != tt.want+"\n" || stderr != "" {
			t.Errorf("got  %swant %s\n%s", stdout, tt.want, stderr)
		}
	}
}

// Columns stay where they are, whatever is in them.
func TestMonitorTable(t *testing.T) {
	long, six := aRefusal(), aRefusal()
	long.Container.Name, long.Process.Comm = strings.Repeat("x", 255), "\x1b\x1b\x1b\x1b\x1b\x1b\x1b\x1b"
	six.Destination.Address = netip.MustParseAddr("2001:db8:1111:2222:3333:4444:5555:6666")
	stdout, stderr := shown(t, monitorOptions{output: table}, aRefusal(), long, six)
	want := `TIME                     CONTAINER             PROCESS                   REFUSED         DESTINATION            REASON
2026-11-28 12:00:00.123  web                   curl[4711]                connect tcp     169.254.169.254:80     blocked (preset aws)
2026-11-28 12:00:00.123  xxxxxxxxxxxxxxxxxxx…  "\x1b\x1b\x1b\x1b\x1b\x…  connect tcp     169.254.169.254:80     blocked (preset aws)
2026-11-28 12:00:00.123  web                   curl[4711]                connect tcp     [2001:db8:1111:2222:3333:4444:5555:6666]:80  blocked (preset aws)
`
	if stdout != want || stderr != "" {
		t.Errorf("got\n%swant\n%s%s", stdout, want, stderr)
	}
	if stdout, _ := shown(t, monitorOptions{output: table, fields: []string{"container.name", "process.uid"}}); stdout != "CONTAINER.NAME        PROCESS.UID\n" {
		t.Errorf("got %q", stdout)
	}
}

// Each key of a record is a field, in each format.
func TestFields(t *testing.T) {
	since := time.Date(2026, 11, 28, 11, 0, 0, 0, time.Local)
	r := aRefusal()
	r.Family, r.Interface, r.Version, r.Stage, r.Count, r.Since = "inet", "docker0", "1.0", events.StageKernel, 7, &since
	text, err := json.Marshal(r)
	check(t, err)
	for _, key := range events.Keys() {
		stdout, _ := shown(t, monitorOptions{output: compact, fields: []string{key}}, r, events.Record{Type: events.Refusal})
		value, missing, _ := strings.Cut(stdout, "\n")
		want := "-\n"
		if key == "type" {
			want = "refusal\n"
		}
		if value == "" || value == "-" || missing != want {
			t.Errorf("%s: got %q", key, stdout)
		}
		stdout, _ = shown(t, monitorOptions{output: jsonText, fields: []string{key}}, r)
		start, object, _ := strings.Cut(stdout, "\n")
		if !strings.Contains(start, `"type":"start"`) {
			t.Errorf("%s: begins with %s", key, start)
		}
		var part map[string]any
		dec := json.NewDecoder(strings.NewReader(object))
		dec.UseNumber()
		check(t, dec.Decode(&part))
		if got, _ := json.Marshal(recordValue(part, key)); string(got) == "null" || !strings.Contains(string(text), string(got)) && !strings.HasPrefix(string(got), "{") {
			t.Errorf("%s: got %s", key, object)
		}
		if len(part) > 2 || part["type"] != "refusal" {
			t.Errorf("%s: too much or too little: %s", key, object)
		}
	}
	for _, fields := range [][]string{{"container", "container.name"}, {"container.name", "container"}} {
		stdout, _ := shown(t, monitorOptions{output: jsonText, fields: fields}, r)
		if !strings.Contains(stdout, `"cgroup_id":9223372036854775809`) {
			t.Errorf("%v: got %s", fields, stdout)
		}
	}
	stdout, _ := shown(t, monitorOptions{output: compact, fields: []string{"container.cgroup_id", "rule", "blocked", "k8s"}}, r)
	if want := `9223372036854775809  "preset aws"  true  shop/web-0/nginx` + "\n"; stdout != want {
		t.Errorf("got %q", stdout)
	}
}

func TestMonitorJSON(t *testing.T) {
	start := events.Record{Type: events.Start, Version: "1.0", Node: "host1"}
	stdout, stderr := shown(t, monitorOptions{output: jsonText}, start, aRefusal(), events.Record{Type: events.Lost, Stage: events.StageReader, Count: 3})
	lines := strings.Split(stdout, "\n")
	if len(lines) != 4 || !strings.Contains(lines[0], `"version":"1.0","node":"host1"`) || !strings.Contains(lines[2], `"count":3,"stage":"reader"`) || stderr != "" {
		t.Errorf("got\n%s%s", stdout, stderr)
	}
	var r events.Record
	check(t, json.Unmarshal([]byte(lines[1]), &r))
	if !r.Time.Equal(aRefusal().Time) || r.Container.CgroupID != 1<<63+1 {
		t.Errorf("got %+v", r)
	}
	// A stream without its beginning gets one.
	stdout, _ = shown(t, monitorOptions{output: jsonText}, aRefusal(), aRefusal())
	if !strings.HasPrefix(stdout, `{"type":"start"`) || !strings.Contains(stdout, `"version":"`+loader.Version()+`"`) || strings.Count(stdout, "start") != 1 {
		t.Errorf("got %s", stdout)
	}

	hostile := "\x1b[2J\n<script>\u202e\x9b\x7f\u009b\U000e0001é"
	r = aRefusal()
	r.Container.Name = hostile
	stdout, _ = shown(t, monitorOptions{output: jsonText, fields: []string{"container.name"}}, r)
	_, line, _ := strings.Cut(stdout, "\n")
	if want := `{"container":{"name":"\u001b[2J\n<script>\u202e` + "\ufffd" + `\u007f\u009b\udb40\udc01é"},"type":"refusal"}` + "\n"; line != want {
		t.Errorf("got %s", line)
	}
}

// What is not shown is said.
func TestNotShown(t *testing.T) {
	since := time.Date(2026, 11, 28, 11, 0, 0, 0, time.Local)
	suppressed := events.Record{Type: events.Suppressed, Container: &events.Container{Name: "\x1bweb"}, Count: 1200, Since: &since}
	for _, format := range []output{compact, table} {
		stdout, stderr := shown(t, monitorOptions{output: format, selection: events.Selection{Reasons: []string{events.ReasonBlocked}}},
			events.Record{Type: events.Start}, suppressed, events.Record{Type: events.Suppressed, Count: 1},
			events.Record{Type: events.Lost, Stage: events.StageKernel, Count: 3}, events.Record{Type: events.Lost, Stage: events.StageReader, Count: 4}, events.Record{Type: "later"})
		want := `warning: refusals not shown: 1200 of "\x1bweb" since 2026-11-28 11:00:00.000, because there were too many
warning: refusals not shown: 1 of a container since -, because there were too many
warning: refusals not shown: 3, because a buffer in the kernel was full
warning: refusals not shown: 4, because egressbpf was too slow
`
		if stderr != want || format == compact && stdout != "" {
			t.Errorf("got\n%s%s", stdout, stderr)
		}
	}
}

func TestLimit(t *testing.T) {
	r := aRefusal()
	other := aRefusal()
	other.Container = nil
	lost := events.Record{Type: events.Lost, Count: 1}
	o := monitorOptions{output: compact, limit: 2, selection: events.Selection{Containers: []string{"web"}}}
	stdout, stderr := shown(t, o, other, lost, r, lost, other, r, lost, r)
	if strings.Count(stdout, "\n") != 2 || strings.Count(stderr, "\n") != 2 {
		t.Errorf("got\n%s%s", stdout, stderr)
	}
}

func TestColor(t *testing.T) {
	no := false
	passed := aRefusal()
	passed.Blocked = &no
	const want = "\x1b[2m2026-11-28 12:00:00.123\x1b[0m  \x1b[1mweb\x1b[0m  curl[4711]  connect tcp  169.254.169.254:80  \x1b[31mblocked (preset aws)\x1b[0m\n"
	stdout, _ := shown(t, monitorOptions{output: compact, color: "always"}, aRefusal(), passed)
	if !strings.HasPrefix(stdout, want) || !strings.Contains(stdout, "\x1b[33mblocked") {
		t.Errorf("got %q", stdout)
	}
	stdout, _ = shown(t, monitorOptions{output: table, color: "always"}, aRefusal())
	if !strings.Contains(stdout, "\x1b[1mweb\x1b[0m                   curl") || strings.Contains(strings.Split(stdout, "\n")[0], "\x1b") {
		t.Errorf("got %q", stdout)
	}

	// A terminal of its own.
	terminal := openTerminal(t)
	for _, tt := range []struct {
		color         output
		noColor, term string
		w             io.Writer
		want          bool
	}{
		{automatic, "", "xterm", terminal, true},
		{automatic, "1", "xterm", terminal, false},
		{automatic, "", "dumb", terminal, false},
		{automatic, "", "xterm", new(bytes.Buffer), false},
		{"never", "", "xterm", terminal, false},
		{"always", "1", "dumb", new(bytes.Buffer), true},
	} {
		t.Setenv("NO_COLOR", tt.noColor)
		t.Setenv("TERM", tt.term)
		if got := newRecordPrinter(&monitorOptions{color: tt.color}, nil, tt.w, io.Discard).color; got != tt.want {
			t.Errorf("%+v: got %v", tt, got)
		}
	}
}

func openTerminal(t *testing.T) *os.File {
	t.Helper()
	f, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	check(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// The reader of a quiet stream leaves.
func TestAwaitClosed(t *testing.T) {
	r, w, err := os.Pipe()
	check(t, err)
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go awaitClosed(ctx, w, cancel)
	stopped := make(chan error)
	go func() {
		o := monitorOptions{output: compact}
		stopped <- o.show(ctx, new(happening), w, io.Discard)
	}()
	check(t, r.Close())
	check(t, <-stopped)

	// It does not wait for what cannot be closed, and ends with the command.
	awaitClosed(t.Context(), new(bytes.Buffer), func() { t.Error("closed") })
	file, err := os.Create(t.TempDir() + "/out")
	check(t, err)
	defer file.Close()
	awaitClosed(t.Context(), file, func() { t.Error("closed") })
	open, w2, err := os.Pipe()
	check(t, err)
	defer open.Close()
	defer w2.Close()
	awaitClosed(ctx, w2, func() { t.Error("closed") })
}

func TestMonitorErrors(t *testing.T) {
	broken := errors.New("the ring buffer is gone")
	o := monitorOptions{output: compact}
	ctx, cancel := context.WithCancelCause(t.Context())
	source := failing{broken}
	if err := o.show(ctx, source, io.Discard, io.Discard); err != broken {
		t.Errorf("got %v", err)
	}
	cancel(broken)
	if err := o.show(ctx, source, io.Discard, io.Discard); err != nil {
		t.Errorf("interrupted: %v", err)
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	check(t, err)
	defer full.Close()
	for _, format := range []output{compact, table, jsonText} {
		o.output = format
		if err := o.show(t.Context(), &happening{aRefusal()}, full, io.Discard); err == nil {
			t.Errorf("%s: a full disk is no error", format)
		}
	}
}

type failing struct{ err error }

func (f failing) Next(context.Context) (events.Record, error) { return events.Record{}, f.err }

func TestBelowRoot(t *testing.T) {
	root, err := cgroup.FindRoot()
	check(t, err)
	g := &globals{}
	got := (&monitorOptions{globals: g}).belowRoot([]string{string(root) + "/docker/web/", "/docker/web", "web", string(root) + "x/web", "docker/../x"})
	if want := []string{"/docker/web", "/docker/web", "web", string(root) + "x/web", "docker/../x"}; !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	g.cgroupRoot = "/host/cgroup/"
	if got := (&monitorOptions{globals: g}).belowRoot([]string{"/host/cgroup/docker/*"}); !slices.Equal(got, []string{"/docker/*"}) {
		t.Errorf("got %q", got)
	}
}

// Whatever is stored, nothing but text reaches a terminal.
func FuzzMonitor(f *testing.F) {
	text, err := json.Marshal(aRefusal())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"type":"refusal","container":{"name":"\u001b[2J\u202e"},"process":{"comm":"a\nb"},"destination":{"address":"fe80::1%` + "\x1b" + `"}}`))
	f.Add([]byte("{\"type\":\"\x9b2J\",\"k\x9b\":\"\x7f\u009b\"}\n{\"type\":\"suppressed\",\"container\":{\"id\":\"\x9b\"},\"since\":\"2026-11-28T12:00:00Z\"}"))
	f.Add([]byte("{\"type\":\"refusal\"}\n{\"\\u001b\": \"\x1b\"}"))
	f.Add([]byte(`{"type":"lost","stage":"\u001b"}`))
	colors := strings.NewReplacer(stylePlain, "", styleBold, "", styleFaint, "", styleRed, "", styleYellow, "")
	f.Fuzz(func(t *testing.T, data []byte) {
		records := 0
		for _, o := range []monitorOptions{
			{output: compact}, {output: compact, color: "always"}, {output: table, color: "always"},
			{output: compact, fields: events.Keys()}, {output: table, fields: events.Keys()},
			{output: jsonText}, {output: jsonText, fields: events.Keys()},
		} {
			var out, errs bytes.Buffer
			s := events.ReadStored(bytes.NewReader(data), "stored.json")
			if err := o.show(t.Context(), s, &out, &errs); err != nil {
				report(&errs, err, false)
			}
			check(t, s.Close())
			stdout := out.String()
			if o.color == "always" {
				stdout = colors.Replace(stdout)
			}
			for _, text := range []string{stdout, errs.String()} {
				if i := strings.IndexFunc(text, func(r rune) bool { return r != '\n' && !strconv.IsPrint(r) }); i >= 0 || !utf8.ValidString(text) {
					t.Fatalf("%s, fields %v: %q reaches the terminal", o.output, o.fields, text)
				}
			}
			if o.output != jsonText {
				continue
			}
			lines := strings.Split(strings.TrimSuffix(stdout, "\n"), "\n")
			if stdout == "" {
				lines = nil
			}
			for _, line := range lines {
				if !json.Valid([]byte(line)) {
					t.Fatalf("%q is no JSON", line)
				}
			}
			if o.fields == nil {
				records = len(lines)
			} else if len(lines) != records {
				t.Fatalf("%d lines, and with fields %d", records, len(lines))
			}
		}
	})
}
