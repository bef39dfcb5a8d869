package top

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
)

var update = flag.Bool("update", false, "write the screens in testdata")

var start = time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)

// a is one container's counters at one time.
type a struct {
	key                      uint64
	name                     string
	blocked, limited, socket uint64
	host                     uint64 // blocked there
	tokens                   float64
	gone                     bool
}

func (c a) row() stats.Container {
	r := stats.Container{
		Identity: container.Identity{ID: fmt.Sprintf("%064x", c.key), Name: c.name, CgroupID: c.key, Cgroup: fmt.Sprintf("/docker/%064x", c.key)},
		Families: stats.Denied{Denied: c.socket},
		HostSide: stats.Traffic{Packets: c.host}, HostReasons: stats.Reasons{Blocked: stats.Traffic{Packets: c.host}},
		SMTP:    stats.Bucket{Tokens: &c.tokens, Rate: policy.Rate{Count: 5, Period: time.Minute}, Burst: 5},
		Refused: stats.Refusals{Blocked: stats.Blocked{Connects: c.blocked}, RateLimited: stats.Blocked{Traffic: stats.Traffic{Packets: c.limited}}},
	}
	if c.gone {
		r.Cgroup = ""
	}
	return r
}

// reading makes one in which the total is that of the rows and of one row more.
func reading(rest a, rows ...a) Reading {
	s := &stats.Stats{Mode: policy.Enforce}
	for _, c := range append(rows, rest) {
		r := c.row()
		s.Total.Families.Denied += c.socket
		s.Total.HostSide.Packets += c.host
		s.Total.HostReasons.Blocked.Packets += c.host
		s.Total.Refused.Blocked.Connects += c.blocked
		s.Total.Refused.RateLimited.Packets += c.limited
		if c.key != others {
			s.Containers = append(s.Containers, r)
		}
	}
	return Reading{Stats: s, Enforcing: true}
}

func refusal(at time.Duration, key uint64, reason, to, comm string) events.Record {
	r := events.Record{Type: events.Refusal, Time: start.Add(at), Hook: events.HookConnect, Reason: reason, Rule: "preset aws",
		Protocol: "tcp", Process: &events.Process{PID: 4711, Comm: comm}}
	if to != "" {
		p := netip.MustParseAddrPort(to)
		r.Destination = &events.Endpoint{Address: p.Addr(), Port: p.Port()}
	}
	if key != others {
		r.Container = &events.Container{ID: fmt.Sprintf("%064x", key), Name: fmt.Sprint("c", key), CgroupID: key}
	}
	return r
}

type fakeSource struct {
	records []events.Record
	err     error
}

func (s *fakeSource) Next(ctx context.Context) (events.Record, error) {
	if len(s.records) > 0 {
		r := s.records[0]
		s.records = s.records[1:]
		return r, nil
	}
	if s.err != nil {
		return events.Record{}, s.err
	}
	<-ctx.Done()
	return events.Record{}, ctx.Err()
}

func newTest(width, height int) *model {
	m := newModel(Options{Title: "host1, egressbpf v1.2.3", Events: &fakeSource{}})
	m.Update(tea.WindowSizeMsg{Width: width, Height: height})
	return m
}

func (m *model) readAt(at time.Duration, r Reading) {
	r.Time = start.Add(at)
	m.Update(readMsg{r, nil})
}

func (m *model) keys(names ...string) {
	for _, name := range names {
		k := tea.KeyPressMsg{Text: name, Code: []rune(name)[0]}
		if code, ok := map[string]rune{
			"enter": tea.KeyEnter, "esc": tea.KeyEscape, "up": tea.KeyUp, "down": tea.KeyDown, "left": tea.KeyLeft, "right": tea.KeyRight,
			"pgup": tea.KeyPgUp, "pgdown": tea.KeyPgDown, "home": tea.KeyHome, "end": tea.KeyEnd, "backspace": tea.KeyBackspace, "space": tea.KeySpace,
		}[name]; ok {
			k = tea.KeyPressMsg{Code: code}
		} else if letter, ok := strings.CutPrefix(name, "ctrl+"); ok {
			k = tea.KeyPressMsg{Code: []rune(letter)[0], Mod: tea.ModCtrl}
		}
		m.Update(k)
	}
}

// screen returns what is on the screen, and checks that it fits there and is harmless.
func screen(t *testing.T, m *model) string {
	t.Helper()
	raw := m.View().Content
	plain := ansi.Strip(raw)
	lines := strings.Split(plain, "\n")
	if len(lines) != m.height {
		t.Errorf("%dx%d: %d lines:\n%s", m.width, m.height, len(lines), plain)
	}
	for i, l := range lines {
		if w, wc := ansi.StringWidth(l), ansi.StringWidthWc(l); w > m.width || w != wc {
			t.Errorf("%dx%d: %d or %d columns: %q", m.width, m.height, w, wc, l)
		}
		lines[i] = strings.TrimRight(l, " ")
	}
	for _, r := range strings.ReplaceAll(plain, "\n", "") {
		if !unicode.IsPrint(r) {
			t.Errorf("there is %q on the screen:\n%q", r, plain)
		}
	}
	if !utf8.ValidString(raw) {
		t.Errorf("not UTF-8: %q", raw)
	}
	return strings.Join(lines, "\n")
}

// names returns the first words of the rows on the screen.
func names(t *testing.T, m *model) string {
	t.Helper()
	var all []string
	for _, l := range strings.Split(screen(t, m), "\n")[3:] {
		if l == "" || strings.HasPrefix(l, "q quit") || strings.HasPrefix(l, "filter:") {
			break
		}
		all = append(all, strings.Fields(l)[0])
	}
	return strings.Join(all, " ")
}

// full is a screen with everything on it.
func full(width, height int) *model {
	m := newTest(width, height)
	rows := func(n uint64) []a {
		return []a{
			{key: 0xa1, name: "web", blocked: 3 + 4*n, tokens: 5},
			{key: 0xa2, name: "mailer", limited: 55 + n, blocked: 1, tokens: 0.4},
			{key: 0xa3, name: "日本語のコンテナ-1", socket: 2, host: 7, tokens: 5},
			{key: 0xa4, name: "e\u0301vil\x1b[2J", blocked: 1, tokens: 5},
			{key: 0xabcdef0123456789, tokens: 5},
		}
	}
	m.readAt(0, reading(a{host: 12}, rows(0)...))
	suppressed := events.Record{Type: events.Suppressed, Time: start.Add(900 * time.Millisecond), Count: 1200, Container: &events.Container{CgroupID: 0xa1}}
	family := events.Record{Type: events.Refusal, Time: start.Add(-5 * time.Minute), Hook: events.HookSocket, Reason: events.ReasonFamily, Family: "packet",
		Container: &events.Container{CgroupID: 0xa3}, Process: &events.Process{PID: 7, Comm: "dhclient"}}
	unknown := refusal(-3*time.Hour, others, events.ReasonBlocked, "[fd00:ec2::254]:80", "")
	unknown.Hook, unknown.Process, unknown.Interface = events.HookHost, nil, "br-\x1b0"
	m.Update(recordsMsg{
		unknown, family,
		refusal(-4*time.Second, 0xa1, events.ReasonBlocked, "[fd00:ec2::254]:80", "python3"),
		refusal(100*time.Millisecond, 0xa1, events.ReasonBlocked, "169.254.169.254:80", "curl"),
		refusal(200*time.Millisecond, 0xa2, events.ReasonRateLimited, "203.0.113.25:25", "sendmail\x1b]0;x"),
		suppressed,
		{Type: events.Lost, Count: 3},
	})
	m.readAt(time.Second, reading(a{host: 13}, rows(1)...))
	return m
}

// The screens are in testdata; -update writes them.
func TestScreens(t *testing.T) {
	for _, size := range [][2]int{{80, 24}, {40, 10}, {200, 50}} {
		t.Run(fmt.Sprintf("%dx%d", size[0], size[1]), func(t *testing.T) {
			var got strings.Builder
			m := full(size[0], size[1])
			for _, s := range []struct {
				title string
				keys  []string
			}{
				{"list", nil}, {"details", []string{"enter"}}, {"end of details", []string{"end"}}, {"details of others", []string{"esc", "down", "down", "enter"}},
				{"help", []string{"?"}}, {"filter", []string{"?", "esc", "/", "W", "E", "B"}}, {"reverse and paused", []string{"enter", "r", "p"}},
			} {
				m.keys(s.keys...)
				fmt.Fprintf(&got, "-- %s --\n%s\n", s.title, screen(t, m))
			}
			file := filepath.Join("testdata", fmt.Sprintf("%dx%d.txt", size[0], size[1]))
			if *update {
				if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got.String() != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got.String(), want)
			}
		})
	}
}

// Whatever the size, the screen fits, on each page and with whatever selected.
func TestSizes(t *testing.T) {
	m := full(80, 24)
	for _, keys := range [][]string{nil, {"end"}, {"enter"}, {"end"}, {"?"}, {"end"}, {"?", "esc", "/", "x", "日"}, {"enter"}} {
		m.keys(keys...)
		for width := range 100 {
			for height := range 12 {
				m.Update(tea.WindowSizeMsg{Width: width + 1, Height: height + 1})
				screen(t, m)
			}
		}
	}
	m.Update(tea.WindowSizeMsg{})
	if got := m.View().Content; got != "" {
		t.Errorf("on no screen: %q", got)
	}
}

func TestLayout(t *testing.T) {
	for width := range 400 {
		used := -1
		for i, w := range layout(width) {
			if w == 0 {
				continue
			}
			if used += w + 1; w > columns[i].max || w < columns[i].min && i > 0 {
				t.Errorf("width %d: column %s has %d", width, columns[i].name, w)
			}
		}
		if used > width {
			t.Errorf("width %d: the columns take %d", width, used)
		}
	}
}

func TestRates(t *testing.T) {
	const s = time.Second
	type reads struct {
		at time.Duration
		r  Reading
	}
	for _, tt := range []struct {
		name  string
		reads []reads
		// of container 1, if it is there, and of all containers
		rate, all float64
		total     uint64
		why       string
	}{
		{"first", []reads{{0, reading(a{}, a{key: 1, blocked: 9})}}, 0, 0, 9, "blocked"},
		{"nothing new", []reads{{0, reading(a{}, a{key: 1, blocked: 9})}, {s, reading(a{}, a{key: 1, blocked: 9})}}, 0, 0, 9, "blocked"},
		{"more", []reads{{0, reading(a{}, a{key: 1, blocked: 9})}, {2 * s, reading(a{}, a{key: 1, blocked: 9, limited: 5})}}, 2.5, 2.5, 14, "rate_limited"},
		{"host and sockets count", []reads{{0, reading(a{}, a{key: 1})}, {s, reading(a{}, a{key: 1, host: 2, socket: 3})}}, 5, 5, 5, "family"},
		{"new", []reads{{0, reading(a{})}, {s, reading(a{}, a{key: 1, blocked: 4})}}, 4, 4, 4, "blocked"},
		{"gone", []reads{{0, reading(a{}, a{key: 1, blocked: 4})}, {s, reading(a{blocked: 4})}}, 0, 0, 4, ""},
		{"gone, refused before", []reads{{0, reading(a{}, a{key: 1, blocked: 4})}, {s, reading(a{blocked: 6})}}, 0, 2, 6, ""},
		{"restarted", []reads{{0, reading(a{}, a{key: 2, blocked: 400})}, {s, reading(a{blocked: 400}, a{key: 1, blocked: 1})}}, 1, 1, 401, "blocked"},
		{"counters anew", []reads{{0, reading(a{}, a{key: 1, blocked: 400})}, {s, reading(a{}, a{key: 1, blocked: 3})}}, 0, 0, 3, "blocked"},
		{"the same time", []reads{{0, reading(a{}, a{key: 1})}, {0, reading(a{}, a{key: 1, blocked: 1})}}, 0, 0, 1, "blocked"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tally := newTally()
			for _, r := range tt.reads {
				r.r.Time = start.Add(r.at)
				tally.read(r.r)
			}
			got := row{}
			if r := tally.rows[1]; r != nil {
				got = *r
			}
			if got.rate != tt.rate || tally.rate != tt.all || tally.total != tt.total || got.why != tt.why {
				t.Errorf("rate %v, of all %v, total %d, for %q; want %v, %v, %d, %q", got.rate, tally.rate, tally.total, got.why, tt.rate, tt.all, tt.total, tt.why)
			}
		})
	}
}

// Of a container that is gone, others keep the counts and the last refusals; so they do of
// containers that are not known.
func TestOthers(t *testing.T) {
	m := newTest(120, 24)
	m.readAt(0, reading(a{}, a{key: 1, name: "job", blocked: 2}))
	m.Update(recordsMsg{
		refusal(1*time.Second, 1, events.ReasonBlocked, "169.254.169.254:80", "curl"),
		refusal(2*time.Second, others, events.ReasonBlocked, "169.254.169.254:81", "wget"),
		// It has come after the reading was begun.
		refusal(4*time.Second, 2, events.ReasonBlocked, "169.254.169.254:82", "new"),
	})
	m.readAt(3*time.Second, reading(a{}, a{key: 1, name: "job", blocked: 3, gone: true}))
	if got := names(t, m); got != "(others)" {
		t.Fatalf("rows %s, want others alone", got)
	}
	if r := m.rows[0]; r.total != 3 || r.rate != 1.0/3 || len(r.log) != 2 || destination(r.newest()) != "169.254.169.254:81" {
		t.Errorf("others: %+v", r)
	}
	m.keys("enter")
	if got := screen(t, m); !strings.Contains(got, "c1, curl[4711]") {
		t.Errorf("the details do not say that it was c1:\n%s", got)
	}
	m.keys("esc")
	m.readAt(5*time.Second, reading(a{blocked: 3}, a{key: 2, name: "late", blocked: 1}))
	if got := m.rows[0]; got.name != "late" || len(got.log) != 1 {
		t.Errorf("the new container: %+v", got)
	}
}

// The records that are kept are bounded, and a flood in one container hides nothing of another.
func TestBounds(t *testing.T) {
	m := newTest(80, 24)
	var rows []a
	for key := range uint64(1000) {
		rows = append(rows, a{key: key + 1})
	}
	m.readAt(0, reading(a{}, rows...))
	flood := func(key uint64, n int) (all recordsMsg) {
		for i := range n {
			all = append(all, refusal(time.Duration(i)*time.Millisecond, key, events.ReasonBlocked, "169.254.169.254:80", "curl"))
		}
		return all
	}
	m.Update(flood(1, 3))
	before := m.tally.snapshot()
	m.Update(flood(2, 5000))
	if n := len(m.tally.logs[1]); n != 3 {
		t.Errorf("container 1 has %d records, want 3", n)
	}
	if n := len(m.tally.logs[2]); n != logLength {
		t.Errorf("container 2 has %d records, want %d", n, logLength)
	}
	for key := range uint64(1000) {
		m.Update(flood(key+1, 200))
	}
	kept := 0
	for _, log := range m.tally.logs {
		kept += len(log)
	}
	if kept > logsLength || kept < logsLength/2 {
		t.Errorf("%d records are kept, want at most %d", kept, logsLength)
	}
	// Ids that nobody knows, while the counters cannot be read.
	var unknown recordsMsg
	for key := range uint64(2 * logsLength) {
		unknown = append(unknown, flood(key+5000, 1)...)
	}
	m.tally.record(unknown)
	if n := len(m.tally.logs); n > logsLength+1 {
		t.Errorf("%d containers have records, want at most %d", n, logsLength+1)
	}
	for _, r := range before {
		if want := map[uint64]int{1: 3}[r.key]; len(r.log) != want {
			t.Errorf("a row that was handed out changed: container %d has %d records, want %d", r.key, len(r.log), want)
		}
	}
}

// With 1,000 containers the screen has no more on it than with a few.
func TestThousand(t *testing.T) {
	m := newTest(80, 24)
	read := func(at time.Duration, busy uint64) {
		var rows []a
		for key := range uint64(1000) {
			c := a{key: key + 1, name: fmt.Sprintf("c%04d", key+1), blocked: 1}
			if c.key == busy {
				c.blocked += uint64(at / time.Second)
			}
			rows = append(rows, c)
		}
		m.readAt(at, reading(a{}, rows...))
	}
	read(0, 0)
	read(time.Second, 777)
	if got := names(t, m); !strings.HasPrefix(got, "c0777 c0001 c0002") || len(strings.Fields(got)) != 20 {
		t.Errorf("rows %s, want 20 and the busy one first", got)
	}
	if n := len(m.View().Content); n > 4*80*24 {
		t.Errorf("the screen has %d bytes", n)
	}
	m.keys("end")
	if got := names(t, m); !strings.HasSuffix(got, "c0999 c1000") || m.rows[m.index()].key != 1000 {
		t.Errorf("at the end: %s", got)
	}
	// The selected row moves to the beginning, and the screen goes with it.
	read(2*time.Second, 1000)
	if got := names(t, m); !strings.HasPrefix(got, "c1000 c") || m.rows[m.index()].key != 1000 {
		t.Errorf("it has moved: %s", got)
	}
	m.keys("pgdown", "down")
	if got := m.rows[m.index()].key; got == 1000 || m.index() != 21 {
		t.Errorf("a page and a row down: row %d", m.index())
	}
	m.keys("esc")
	if got := names(t, m); m.chosen || !strings.HasPrefix(got, "c1000") {
		t.Errorf("without a selected row: %s", got)
	}
}

func TestKeys(t *testing.T) {
	m := newTest(120, 24)
	rows := func(n uint64) []a {
		return []a{{key: 1, name: "alpha", blocked: 9 * n, tokens: 3}, {key: 2, name: "beta", blocked: 100 + n, tokens: 1}, {key: 3, name: "gamma", socket: 1, tokens: 2}}
	}
	m.readAt(0, reading(a{}, rows(0)...))
	m.Update(recordsMsg{
		refusal(-2*time.Hour, 3, events.ReasonFamily, "10.0.0.1:1", "Zed"),
		refusal(-1*time.Hour, 2, events.ReasonBlocked, "10.0.0.2:1", "awk"),
	})
	m.readAt(time.Second, reading(a{}, rows(1)...))
	for _, tt := range []struct{ keys, want string }{
		{"", "alpha beta gamma"},        // by rate
		{"s", "beta alpha gamma"},       // total
		{"right", "alpha beta gamma"},   // why
		{"r", "gamma alpha beta"},       //
		{"s", "beta gamma alpha"},       // tokens
		{"s", "alpha beta gamma"},       // last
		{"s", "gamma beta alpha"},       // destination
		{"s", "gamma beta alpha"},       // process
		{"s", "alpha beta gamma"},       // name
		{"r", "gamma beta alpha"},       //
		{"left", "gamma beta alpha"},    // process
		{"right r", "gamma beta alpha"}, // name, reversed
		{"/ b e t", "beta"},
		{"backspace backspace backspace q enter", "none"},
		{"esc", "gamma beta alpha"},
		{"/ Z E enter", "gamma"},         // a process
		{"/ ctrl+u 0 . 0 . 2 :", "beta"}, // a destination
		{"enter", "beta"},
		{"esc", "gamma beta alpha"},
		{"/ a esc", "gamma beta alpha"},
	} {
		m.keys(strings.Fields(tt.keys)...)
		if got := names(t, m); got != tt.want {
			t.Errorf("after %q: %s, want %s", tt.keys, got, tt.want)
		}
	}
	for _, key := range []string{"q", "ctrl+c"} {
		k := tea.KeyPressMsg{Text: key, Code: 'q'}
		if key == "ctrl+c" {
			k = tea.KeyPressMsg{Code: 'c', Mod: tea.ModCtrl}
		}
		if _, cmd := m.Update(k); cmd == nil || cmd() != (tea.QuitMsg{}) {
			t.Errorf("%s does not quit", key)
		}
	}
}

// A paused screen stays as it is, but what happens is not forgotten.
func TestPause(t *testing.T) {
	m := newTest(80, 24)
	m.readAt(0, reading(a{}, a{key: 1, name: "web"}))
	m.keys("p")
	before := screen(t, m)
	m.readAt(time.Second, reading(a{}, a{key: 1, name: "web", blocked: 1}))
	m.Update(recordsMsg{refusal(time.Second, 1, events.ReasonBlocked, "169.254.169.254:80", "curl")})
	m.readAt(2*time.Second, reading(a{}, a{key: 1, name: "web", blocked: 3}))
	if got := screen(t, m); got != before {
		t.Errorf("the screen has changed:\n%s", got)
	}
	m.keys("space")
	if r := m.rows[0]; r.rate != 2 || r.total != 3 || len(r.log) != 1 {
		t.Errorf("after the pause: %+v", r)
	}
}

// The screen says what it cannot know.
func TestNotices(t *testing.T) {
	m := newModel(Options{Title: "egressbpf", Filter: "w", NoEvents: errors.New("8 others\x1b[2J")})
	m.Update(tea.WindowSizeMsg{Width: 200, Height: 24})
	expect := func(what string, want ...string) {
		t.Helper()
		got := screen(t, m)
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: want %q in\n%s", what, w, got)
			}
		}
	}
	expect("at first", "reading the counters", "no events: destinations and processes are not known (8 others\uFFFD[2J)")
	m.Update(readMsg{err: errors.New("broken\x1b[2J\nmap")})
	expect("cannot be read at first", "cannot read the counters, trying again: broken\uFFFD[2J\uFFFDmap")
	m.readAt(0, reading(a{}))
	expect("no containers", "no containers", "enforcing  0 refused/s  0 in all  0 containers")
	r := reading(a{}, a{key: 1, name: "db"})
	m.readAt(time.Second, r)
	expect("filtered", "filter w: 0 of 1", "none of 1 row")
	m.Update(readMsg{err: errors.New("broken")})
	expect("cannot be read", "not known whether it is enforcing", "trying again: broken")
	r.Enforcing = false
	m.readAt(2*time.Second, r)
	expect("not enforcing", "NOT ENFORCING")
	r.Stats.Mode = policy.Audit
	m.readAt(3*time.Second, r)
	expect("audit", "audit: nothing is refused")
	m.Update(endMsg{errors.New("no more")})
	expect("no more events", "no more events", "(no more)")

	// The details of a container stay when it goes.
	m.keys("esc", "enter")
	m.readAt(4*time.Second, reading(a{}))
	expect("gone", "db", "gone")
	m.keys("enter")
	expect("back", "no containers")
}

// A host that slept refused nothing meanwhile: a rate is by the clock that sleeps too, an age by
// the one that does not.
func TestAge(t *testing.T) {
	for _, tt := range []struct {
		ago  time.Duration
		want string
	}{
		{-time.Second, "0s"}, {0, "0s"}, {59 * time.Second, "59s"}, {time.Minute, "1m"}, {59 * time.Minute, "59m"},
		{time.Hour, "1h"}, {47 * time.Hour, "47h"}, {48 * time.Hour, "2d"}, {999 * 24 * time.Hour, "999d"},
	} {
		if got := ageText(start, start.Add(tt.ago)); got != tt.want {
			t.Errorf("%v ago: %s, want %s", tt.ago, got, tt.want)
		}
	}
	if got := ageText(time.Time{}, start); got != "" {
		t.Errorf("never: %s", got)
	}
	now := time.Now()
	if got := ageText(now.Round(0).Add(-time.Hour), now); got != "1h" {
		t.Errorf("by a clock that sleeps: %s", got)
	}
}

func TestNumbers(t *testing.T) {
	for n, want := range map[float64]string{0: "0", 999_999: "999999", 1e6: "1.0M", 999_900_000: "999.9M", 2.5e9: "2.5G", 1.8e19: "18000000.0T"} {
		if got := compact(n); got != want {
			t.Errorf("compact(%v) = %s, want %s", n, got, want)
		}
	}
	for n, want := range map[float64]string{0: "0", 0.01: "<0.1", 0.05: "0.1", 12.34: "12.3", 999.9: "999.9", 1234.5: "1234", 1e7: "10.0M"} {
		if got := rateText(n); got != want {
			t.Errorf("rateText(%v) = %s, want %s", n, got, want)
		}
	}
	tokens := 2.4
	many := 999_999.9
	for _, tt := range []struct {
		b    stats.Bucket
		want string
	}{
		{stats.Bucket{}, ""}, {stats.Bucket{Burst: 5}, "unlimited"}, {stats.Bucket{Burst: 5, Tokens: &tokens}, "2.4/5"},
		{stats.Bucket{Burst: 1_000_000, Tokens: &tokens}, "2/1.0M"}, {stats.Bucket{Burst: 1_000_000, Tokens: &many}, "1000000/1.0M"},
	} {
		if got := tokensText(tt.b); got != tt.want {
			t.Errorf("tokensText(%+v) = %s, want %s", tt.b, got, tt.want)
		}
	}
}

// Cells have the width that was asked for, on terminals of either kind, and nothing that a
// terminal obeys.
func TestCell(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want string // of 6 columns
	}{
		{"web", "web   "}, {"abcdef", "abcdef"}, {"abcdefg", "abcde…"},
		{"日本語", "日本語"}, {"日本語a", "日本… "}, {"a日本語", "a日本…"},
		{"e\u0301te\u0301", "e\u0301te\u0301   "},
		{"\u0301a", "\uFFFDa    "},                            // an accent without a letter
		{"a\u200db", "\uFFFDb    "},                           // joined to nothing
		{"\U0001F1E9\U0001F1EA.", "\U0001F1E9\U0001F1EA.   "}, // a flag
		{"a\x1b[2Jb", "a\uFFFD[2Jb"}, {"a\nb\tc\r", "a\uFFFDb\uFFFDc\uFFFD"},
		{"\xff\x9b2J", "\uFFFD\uFFFD2J  "}, {"\u009b2J", "\uFFFD2J   "}, {"\u202eab", "\uFFFDab   "},
		{"a" + strings.Repeat("\u0300", 255), "\uFFFD     "},
	} {
		got := cell(tt.in, 6, false)
		if got != tt.want {
			t.Errorf("cell(%q) = %q, want %q", tt.in, got, tt.want)
		}
		for width := range 12 {
			c := cell(tt.in, width, true)
			if w, wc := ansi.StringWidth(c), ansi.StringWidthWc(c); w != width || wc != width {
				t.Errorf("cell(%q) has %d or %d columns, want %d", tt.in, w, wc, width)
			}
		}
	}
}

func FuzzCell(f *testing.F) {
	for _, s := range []string{"日本", "e\u0301", "\U0001F468\u200d\U0001F469", "\xff\x1b]0;x\a", "\u0e33\u0e33", "\u1100\u1161\u11a8"} {
		f.Add(s, 7)
	}
	f.Fuzz(func(t *testing.T, s string, width int) {
		width = max(0, width%100)
		c := cell(s, width, false)
		if w, wc := ansi.StringWidth(c), ansi.StringWidthWc(c); w != width || wc != width || !utf8.ValidString(c) || strings.ContainsFunc(c, unicode.IsControl) {
			t.Errorf("cell(%q, %d) = %q, with %d or %d columns", s, width, c, w, wc)
		}
	})
}

// All records arrive, in their order, and then why there are no more.
func TestFollow(t *testing.T) {
	const n = 3 * batchLength
	want := errors.New("broken")
	for _, tt := range []struct{ err, want error }{{want, want}, {io.EOF, nil}} {
		source := &fakeSource{err: tt.err}
		for i := range n {
			source.records = append(source.records, events.Record{Count: uint64(i)})
		}
		var got []events.Record
		ended := false
		follow(t.Context(), source, func(msg tea.Msg) {
			switch msg := msg.(type) {
			case recordsMsg:
				got = append(got, msg...)
			case endMsg:
				if ended = true; msg.err != tt.want {
					t.Errorf("ended with %v, want %v", msg.err, tt.want)
				}
			}
		})
		if len(got) != n || !slices.IsSortedFunc(got, func(a, b events.Record) int { return int(a.Count) - int(b.Count) }) || !ended {
			t.Errorf("%d records, want %d in order; ended %v", len(got), n, ended)
		}
	}
}

// After an error the counters are read again, and nothing reads any more at the end.
func TestRead(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var got []error
	calls := 0
	broken := errors.New("broken")
	read(ctx, Options{Interval: time.Millisecond, Read: func(context.Context) (Reading, error) {
		if calls++; calls == 1 {
			return Reading{}, broken
		}
		return reading(a{}), nil
	}}, func(msg tea.Msg) {
		if got = append(got, msg.(readMsg).err); len(got) == 3 {
			cancel()
		}
	})
	if !slices.Equal(got, []error{broken, nil, nil}) {
		t.Errorf("readings: %v", got)
	}
}
