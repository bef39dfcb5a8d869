package tell_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/notify"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/tell"
)

const (
	blocked = 1 // in stats.TallyReasons
	limited = 2
)

// host is a host whose counters and events a test makes. Time is that of synctest.
type host struct {
	t      *testing.T
	teller *tell.Teller
	events chan events.Record
	stop   func() // ends the Teller

	mu       sync.Mutex
	tally    stats.Tally
	err      error // of reading the counters
	log      bytes.Buffer
	names    map[uint64]string
	down     bool // whether targets do not answer
	hangs    bool // whether they take forever
	attempts int
	sent     []notify.Message
}

// newHost returns a host at work. Targets are told if there are any.
func newHost(t *testing.T, targets ...string) *host {
	h := &host{
		t: t, events: make(chan events.Record), names: map[uint64]string{},
		tally: stats.Tally{Mode: policy.Enforce, Containers: map[uint64]stats.Refused{}},
	}
	h.teller = tell.New(tell.Options{
		Tally:    h.read,
		Describe: h.describe,
		Log:      slog.New(slog.NewJSONHandler(h, nil)),
		Node:     "host1",
		Send:     h.send,
	})
	h.target(targets...)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); h.teller.Run(ctx, h) }()
	h.stop = sync.OnceFunc(func() { cancel(); <-ended })
	t.Cleanup(h.stop)
	synctest.Wait()
	return h
}

func (h *host) target(urls ...string) {
	var targets []notify.Target
	for _, url := range urls {
		target, err := notify.Parse(url)
		if err != nil {
			h.t.Fatal(err)
		}
		targets = append(targets, target)
	}
	h.teller.SetTargets(targets)
}

func (h *host) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log.Write(p)
}

func (h *host) read() (*stats.Tally, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	copied := h.tally
	copied.Containers = map[uint64]stats.Refused{}
	for id, n := range h.tally.Containers {
		copied.Containers[id] = n
	}
	return &copied, h.err
}

func id(cgroup uint64) string { return fmt.Sprintf("%064x", cgroup) }

func (h *host) describe(cgroup uint64) events.Container {
	h.mu.Lock()
	defer h.mu.Unlock()
	return events.Container{ID: id(cgroup), Name: h.names[cgroup], Image: "nginx:1.27", CgroupID: cgroup, Cgroup: fmt.Sprint("/docker/", cgroup)}
}

func (h *host) send(ctx context.Context, _ notify.Target, m notify.Message) error {
	h.mu.Lock()
	h.attempts++
	down, hangs := h.down, h.hangs
	h.mu.Unlock()
	if hangs {
		<-ctx.Done()
		return ctx.Err()
	}
	time.Sleep(time.Second)
	if down {
		return errors.New("connection refused")
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sent = append(h.sent, m)
	return nil
}

// Next makes host a source of events.
func (h *host) Next(ctx context.Context) (events.Record, error) {
	select {
	case r, ok := <-h.events:
		if !ok {
			return r, io.EOF
		}
		return r, nil
	case <-ctx.Done():
		return events.Record{}, ctx.Err()
	}
}

// refuse counts refusals of a container. cgroup is 0 if it is not known.
func (h *host) refuse(cgroup uint64, reason int, n uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tally.Total[reason] += n
	if cgroup != 0 {
		c := h.tally.Containers[cgroup]
		c[reason] += n
		h.tally.Containers[cgroup] = c
	}
}

// event tells of a refusal.
func (h *host) event(cgroup uint64, reason int) {
	yes := true
	c := h.describe(cgroup)
	h.events <- events.Record{
		Type: events.Refusal, Container: &c, Hook: events.HookConnect, Reason: stats.TallyReasons[reason], Rule: "preset aws",
		WouldBlock: &yes, Blocked: &yes, Protocol: "tcp",
		Destination: &events.Endpoint{Address: netip.MustParseAddr("169.254.169.254"), Port: 80},
		Process:     &events.Process{PID: 4711, Comm: "curl", UID: 0},
	}
}

func (h *host) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// line is a line of the log.
type line struct {
	Level, Msg, Reason, Destination, Process, Rule, Target, Err string
	ID                                                          string `json:"container_id"`
	Name                                                        string `json:"container_name"`
	Message                                                     string `json:"message_id"`
	Count                                                       uint64
	Containers                                                  int
}

// lines returns the lines since the last call.
func (h *host) lines() (all []line) {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for decoder := json.NewDecoder(&h.log); ; {
		var l line
		err := decoder.Decode(&l)
		if err == io.EOF {
			return all
		}
		if err != nil {
			h.t.Fatal(err)
		}
		all = append(all, l)
	}
}

// told returns the messages since the last call.
func (h *host) told() []notify.Message {
	h.mu.Lock()
	defer h.mu.Unlock()
	sent := h.sent
	h.sent = nil
	return sent
}

func (h *host) wantLines(when string, want ...string) {
	h.t.Helper()
	var got []string
	for _, l := range h.lines() {
		got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %s %s %d", l.Msg, l.Name, l.Reason, l.Destination, l.Count)))
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		h.t.Errorf("%s:\n got %q\nwant %q", when, got, want)
	}
}

func test(t *testing.T, name string, run func(*testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, run) })
}

func TestLog(t *testing.T) {
	test(t, "first at once, then sums", func(t *testing.T) {
		h := newHost(t)
		h.names[7] = "web"
		h.refuse(7, blocked, 3)
		h.event(7, blocked)
		h.wait(1500 * time.Millisecond)
		got := h.lines()
		want := line{
			Level: "WARN", Msg: "refused", ID: id(7), Name: "web", Reason: "blocked", Destination: "169.254.169.254:80/tcp", Process: "curl",
			Rule: "preset aws", Message: tell.MessageID, Count: 3,
		}
		if len(got) != 1 || got[0] != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
		for range 58 {
			h.refuse(7, blocked, 10)
			h.event(7, blocked)
			h.wait(time.Second)
		}
		h.wantLines("within the minute")
		h.refuse(7, blocked, 1)
		h.wait(20 * time.Second)
		h.wantLines("after it", "refused web blocked 169.254.169.254:80/tcp 581")
		h.refuse(7, limited, 2)
		h.event(7, limited)
		h.wait(1500 * time.Millisecond)
		h.wantLines("another reason", "refused web rate_limited 169.254.169.254:80/tcp 2")
		h.wait(10 * time.Minute)
		h.wantLines("when nothing is refused")
	})
	test(t, "without events", func(t *testing.T) {
		h := newHost(t)
		close(h.events)
		h.names[7] = "web"
		h.refuse(7, blocked, 1)
		h.wait(15 * time.Second)
		h.wantLines("soon", "refused web blocked  1")
	})
	test(t, "not what was before", func(t *testing.T) {
		h := newHost(t)
		h.stop()
		h.refuse(7, blocked, 1000)
		h.teller = tell.New(h.teller.Options)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go h.teller.Run(ctx, nil)
		h.wait(time.Minute)
		h.wantLines("since the start")
		h.refuse(7, blocked, 1)
		h.wait(time.Minute)
		h.wantLines("then", "refused  blocked  1")
	})
	test(t, "gone and unknown containers", func(t *testing.T) {
		h := newHost(t)
		h.names[7] = "job"
		// Refused, told of by an event, and gone before the counters are compared.
		h.refuse(0, blocked, 5)
		h.event(7, blocked)
		h.event(7, blocked)
		h.wait(1500 * time.Millisecond)
		h.wantLines("gone", "refused; the container is gone or not known  blocked  3", "refused job blocked 169.254.169.254:80/tcp 2")
	})
	test(t, "counters that begin anew", func(t *testing.T) {
		h := newHost(t)
		h.names[7] = "web"
		h.refuse(7, blocked, 100)
		h.wait(time.Minute)
		h.lines()
		h.mu.Lock()
		h.err = fmt.Errorf("no counters: %w", loader.ErrNotAttached)
		h.mu.Unlock()
		h.wait(time.Minute)
		h.mu.Lock()
		h.err, h.tally.Total, h.tally.Containers = nil, stats.Refused{}, map[uint64]stats.Refused{}
		h.mu.Unlock()
		h.refuse(7, blocked, 4)
		h.wait(time.Minute)
		h.wantLines("after detach and attach", "refused web blocked  4")
		h.mu.Lock()
		h.err = errors.New("broken")
		h.mu.Unlock()
		h.wait(5 * time.Minute)
		h.wantLines("once", "cannot read the counters: refusals are not told until that works    0")
	})
	test(t, "audit", func(t *testing.T) {
		h := newHost(t)
		h.tally.Mode = policy.Audit
		h.refuse(7, blocked, 1)
		h.wait(15 * time.Second)
		h.wantLines("audit", "would be refused  blocked  1")
	})
	test(t, "forgotten when quiet", func(t *testing.T) {
		h := newHost(t)
		for n := range uint64(10_000) {
			h.refuse(n+1, blocked, 1)
		}
		h.wait(2 * time.Minute)
		h.mu.Lock()
		h.tally.Containers = map[uint64]stats.Refused{}
		h.mu.Unlock()
		h.wait(2 * time.Hour)
		h.stop()
		if n := h.teller.Remembered(); n > 0 {
			t.Errorf("%d things are remembered", n)
		}
	})
	test(t, "the rest when the service ends", func(t *testing.T) {
		h := newHost(t)
		h.names[7] = "web"
		h.refuse(7, blocked, 1)
		h.wait(15 * time.Second)
		h.lines()
		h.refuse(7, blocked, 41)
		h.stop()
		h.wantLines("ended", "refused web blocked  41")
	})
}

// A thousand containers that are refused at once do not fill the log, and are one message. All
// that was refused is counted.
func TestThousand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t, "ntfy://ntfy.example/topic", "slack://hook:T00000000-B00000000-000000000000000000000000@webhook")
		const containers = 1000
		for range 10 {
			for n := range uint64(containers) {
				h.refuse(n+1, blocked, 3)
				h.event(n+1, blocked)
			}
			h.wait(time.Minute)
		}
		var sum uint64
		lines := h.lines()
		for _, l := range lines {
			sum += l.Count
		}
		if len(lines) > 10*61+1 {
			t.Errorf("%d lines in ten minutes", len(lines))
		}
		first := h.told()
		if len(first) != 2 || first[0] != first[1] {
			t.Fatalf("%d messages to two targets: %q", len(first), first)
		}
		if text := first[0].Text; !strings.HasPrefix(text, "1000 containers on host1: refused (mode enforce).\n\n- ") || !strings.Contains(text, "\nand 988 more containers, 2964 times\n") {
			t.Errorf("the first message is\n%s", text)
		}
		h.wait(2 * time.Hour)
		digests := h.told()
		if len(digests) != 2 || !strings.Contains(digests[0].Text, "\nand 988 more containers, 26676 times\n") {
			t.Errorf("the digests are %q", digests)
		}
		h.stop()
		for _, l := range h.lines() {
			sum += l.Count
		}
		if sum != 30*containers {
			t.Errorf("lines tell of %d refusals, want %d", sum, 30*containers)
		}
	})
}

func TestNotify(t *testing.T) {
	const target = "ntfy://:S3cretS3cret@ntfy.example/topic"
	test(t, "first, then digests", func(t *testing.T) {
		h := newHost(t, target)
		h.names[7] = "web"
		h.refuse(7, blocked, 1)
		h.event(7, blocked)
		h.wait(10 * time.Second)
		want := notify.Message{
			Title: "egressbpf on host1: container web refused",
			Text: "Container web on host1: refused (mode enforce).\n\n" +
				"container: web (id " + id(7) + ")\nimage: nginx:1.27\nprocess: curl (pid 4711, uid 0)\n" +
				"destination: 169.254.169.254:80/tcp\nreason: blocked\nrule: preset aws\nrefusals so far: 1\n" +
				"\nTo look further, on host1: egressbpf stats --container 000000000000\n",
		}
		if got := h.told(); len(got) != 1 || got[0] != want {
			t.Errorf("got %q, want %q", got, want)
		}
		h.wait(3 * time.Hour)
		if got := h.told(); len(got) != 0 {
			t.Errorf("told again of what is known: %q", got)
		}
		// Forgotten by now, so this is a first one again.
		h.refuse(7, blocked, 1)
		h.wait(30 * time.Second)
		if got := h.told(); len(got) != 1 {
			t.Errorf("after hours: %q", got)
		}
		for range 180 {
			h.refuse(7, blocked, 2)
			h.event(7, blocked)
			h.wait(time.Minute)
		}
		digests := h.told()
		if len(digests) < 2 || len(digests) > 3 || !strings.Contains(digests[0].Text, "\n- web (000000000000): blocked, 1") {
			t.Errorf("in three hours: %q", digests)
		}
	})
	test(t, "not too many", func(t *testing.T) {
		h := newHost(t, target)
		for n := range uint64(30) {
			h.refuse(n+1, blocked, 1)
			h.wait(time.Minute)
		}
		if got := h.told(); len(got) != 6 {
			t.Errorf("%d messages in half an hour", len(got))
		}
		h.wait(time.Hour)
		got := h.told()
		if len(got) != 1 || strings.Count(got[0].Text, "\n- ")+12 != 24 {
			t.Errorf("then %q", got)
		}
	})
	test(t, "a target that is down for hours", func(t *testing.T) {
		h := newHost(t, target)
		h.down = true
		for n := range uint64(300) { // minutes
			h.refuse(n%20+1, blocked, 10)
			h.wait(time.Minute)
		}
		if h.attempts > 12 || h.attempts < 5 {
			t.Errorf("tried %d times in five hours", h.attempts)
		}
		failures := 0
		for _, l := range h.lines() {
			if l.Err != "" {
				failures++
				if l.Target != "1: ntfy://ntfy.example" || l.Err != "connection refused" {
					t.Errorf("the log says %+v", l)
				}
			}
		}
		if failures != h.attempts {
			t.Errorf("the log tells of %d failures, want %d", failures, h.attempts)
		}
		h.mu.Lock()
		h.down = false
		h.mu.Unlock()
		h.wait(time.Hour)
		got := h.told()
		if len(got) != 1 || !strings.Contains(got[0].Text, "\nand 8 more containers, 1200 times\n") {
			t.Errorf("then %q", got)
		}
		again := false
		for _, l := range h.lines() {
			again = again || l.Msg == "a notification target is told of refusals again"
		}
		if !again {
			t.Error("the log does not say that the target is back")
		}
	})
	test(t, "other targets", func(t *testing.T) {
		h := newHost(t)
		h.refuse(1, blocked, 1)
		h.wait(time.Minute)
		h.target(target)
		h.refuse(2, blocked, 1)
		h.wait(time.Minute)
		if got := h.told(); len(got) != 1 || strings.Contains(got[0].Text, "containers") {
			t.Errorf("a new target: %q", got)
		}
		h.target(target, target+"2")
		h.wait(time.Minute)
		h.refuse(3, blocked, 1)
		h.wait(time.Minute)
		if got := h.told(); len(got) != 2 {
			t.Errorf("one more: %q", got)
		}
		h.target()
		h.wait(time.Minute)
		h.refuse(4, blocked, 1)
		h.wait(2 * time.Hour)
		if got := h.told(); len(got) != 0 {
			t.Errorf("none: %q", got)
		}
	})
	test(t, "a target that hangs", func(t *testing.T) {
		h := newHost(t, target)
		h.hangs = true
		h.refuse(1, blocked, 5)
		h.wait(time.Minute)
		h.lines()
		began := time.Now()
		h.stop()
		if took := time.Since(began); took > 0 {
			t.Errorf("the end takes %v", took)
		}
		h.wantLines("the end", "a notification target was not told of the latest refusals    5")
	})
	test(t, "more containers than there is room for", func(t *testing.T) {
		h := newHost(t, target)
		for n := range uint64(5000) {
			h.refuse(n+1, blocked, 1)
		}
		h.wait(time.Minute)
		h.refuse(1, blocked, 1)
		h.wait(3 * time.Hour)
		var all strings.Builder
		for _, m := range h.told() {
			all.WriteString(m.Text)
		}
		for _, want := range []string{"2000 containers on host1", "and 1988 more containers, 1988 times", "and more containers, 3000 times"} {
			if !strings.Contains(all.String(), want) {
				t.Errorf("%q is missing in\n%s", want, all.String())
			}
		}
	})
}

// Nothing of what containers choose is markup, a mention or a link, for any service; and no
// message is too long.
func TestHostileNames(t *testing.T) {
	for _, tt := range []struct{ name, want string }{
		{"web-1_a.2", "web-1_a.2"},
		{"registry.example:5000/a/b@sha256:00ff", "registry[.]example:5000/a/b@sha256:00ff"},
		{"", `""`},
		{"a b", `"a b"`},
		{"<!channel>", `\x3c\x21channel\x3e`},
		{"@here", `\x40here`},
		{"<http://x.y|z>", `\x3chttp[:]//x[.]y\x7cz\x3e`},
		{"[a](b)*_`~#&", `\x5ba\x5d\x28b\x29\x2a_\x60\x7e\x23\x26`},
		{`"\'`, `\x22\x5c\x27`},
		{"a\nSubject: b\r\x00\x1b", `"a\x0aSubject: b\x0d\x00\x1b"`},
		{"\xff\u00fc\u202e\U0001f600\uFFFD", `\xff\u00fc\u202e\U0001f600\ufffd`},
		{strings.Repeat("x", 255), strings.Repeat("x", 80) + "..."},
	} {
		if got := tell.Inert(tt.name); got != tt.want {
			t.Errorf("%q: got %s, want %s", tt.name, got, tt.want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t, "ntfy://ntfy.example/topic")
		for n := range uint64(100) {
			h.names[n+1] = strings.Repeat(".a", 100) + "<!channel> \n" + fmt.Sprint(n)
			h.refuse(n+1, blocked, 1)
			h.event(n+1, blocked)
			if n == 0 {
				h.wait(time.Minute)
			}
		}
		h.wait(2 * time.Hour)
		got := h.told()
		if len(got) < 2 {
			t.Errorf("got %d messages", len(got))
		}
		for _, m := range got {
			if len(m.Text) > tell.MaxText || strings.ContainsAny(m.Title+m.Text, "<>&`*|~#@") || strings.Contains(m.Title, "\n") {
				t.Errorf("%d bytes: %q", len(m.Text), m)
			}
		}
	})
}
