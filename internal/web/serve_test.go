package web

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// refusal is a record of a refusal.
func refusal(name string) events.Record {
	yes := true
	return events.Record{
		Type: events.Refusal, Time: time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC), Node: "host1",
		Container: &events.Container{ID: strings.Repeat("ab", 32), Name: name, Image: "nginx:1"},
		Hook:      events.HookConnect, Reason: events.ReasonBlocked, Rule: "preset aws", WouldBlock: &yes, Blocked: &yes, Protocol: "tcp",
		Destination: &events.Endpoint{Address: netip.MustParseAddr("169.254.169.254"), Port: 80},
		Process:     &events.Process{PID: 4711, Comm: "curl", UID: 0},
	}
}

// handled returns the handler of a process that serves, without the process.
func handled(t *testing.T, from Source, local bool) http.Handler {
	asks, _ := hostile(t, from)
	return handler(newService(asks), local)
}

func TestHost(t *testing.T) {
	h := handled(t, source(Page{}, nil), true)
	open := handled(t, source(Page{}, nil), false)
	for host, want := range map[string]int{
		"localhost": 200, "localhost:9750": 200, "LOCALHOST.": 200, "a.localhost:1": 200, "127.0.0.1:9750": 200, "127.0.0.1": 200, "[::1]:9750": 200, "[::1]": 200,
		"evil.example": 421, "evil.example:9750": 421, "127.0.0.1.evil.example": 421, "localhost.evil.example:80": 421, "": 421,
	} {
		r := httptest.NewRequest("GET", "/-/healthy", nil)
		r.Host = host
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("%q: %d, want %d", host, w.Code, want)
		}
		w = httptest.NewRecorder()
		open.ServeHTTP(w, r)
		if w.Code != 200 {
			t.Errorf("%q, served to others: %d", host, w.Code)
		}
	}
}

func TestHeaders(t *testing.T) {
	h := handled(t, source(Page{}, nil), true)
	for path, kind := range map[string]string{
		"/": "text/html; charset=utf-8", "/page.css": "text/css; charset=utf-8", "/page.js": "text/javascript; charset=utf-8", "/page.svg": "image/svg+xml; charset=utf-8",
		"/page.json": "application/json", "/metrics": "text/plain; version=0.0.4; charset=utf-8", "/-/healthy": "text/plain; charset=utf-8", "/none": "text/plain; charset=utf-8",
	} {
		r := httptest.NewRequest("GET", path, nil)
		r.Host = "localhost"
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Header().Get("Content-Type") != kind || w.Header().Get("X-Content-Type-Options") != "nosniff" || w.Header().Get("Cache-Control") != "no-store" ||
			w.Header().Get("Referrer-Policy") != "no-referrer" || !strings.HasPrefix(w.Header().Get("Content-Security-Policy"), "default-src 'none'; script-src 'self';") {
			t.Errorf("%s: %v", path, w.Header())
		}
	}
}

func TestCompressed(t *testing.T) {
	h := handled(t, source(Page{}, nil), false)
	for _, tt := range []struct {
		from, accepts string
		want          bool
	}{
		{"192.0.2.1:1", "gzip", true}, {"192.0.2.1:1", "zstd, GZIP;q=0.5", true}, {"192.0.2.1:1", "gzip;q=0", false},
		{"192.0.2.1:1", "gzip; q=0.000", false}, {"192.0.2.1:1", "", false}, {"127.0.0.1:1", "gzip", false}, {"[::1]:1", "gzip", false},
	} {
		r := httptest.NewRequest("GET", "/metrics", nil)
		r.RemoteAddr = tt.from
		r.Header.Set("Accept-Encoding", tt.accepts)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		var from io.Reader = w.Body
		if got := w.Header().Get("Content-Encoding") == "gzip"; got != tt.want {
			t.Errorf("%+v: %v", tt, w.Header())
		} else if got {
			var err error
			from, err = gzip.NewReader(w.Body)
			check(t, err)
		}
		if text, err := io.ReadAll(from); err != nil || !strings.HasSuffix(string(text), "\ntest_answer 42\n"+endOfMetrics) {
			t.Errorf("%+v: %q, %v", tt, text, err)
		}
	}
}

// A part of the metrics is no answer.
func TestCutOff(t *testing.T) {
	from := source(Page{}, nil)
	from.Metrics = func(w io.Writer) error {
		_, _ = io.WriteString(w, strings.Repeat("test_answer 42\n", 10000))
		return errors.New("no")
	}
	s := httptest.NewServer(handled(t, from, true))
	defer s.Close()
	resp, err := http.Get(s.URL + "/metrics")
	if err == nil {
		_, err = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	if err == nil {
		t.Error("the client does not see that something is missing")
	}
}

func TestEvents(t *testing.T) {
	recent := &Recent{}
	recent.Add(refusal("before"))
	s := httptest.NewServer(handled(t, source(Page{}, recent), true))
	defer s.Close()
	resp, err := http.Get(s.URL + "/events")
	check(t, err)
	defer resp.Body.Close()
	if resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Errorf("headers %v", resp.Header)
	}
	lines := bufio.NewScanner(resp.Body)
	next := func() (r events.Record) {
		t.Helper()
		for lines.Scan() {
			if text, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
				check(t, json.Unmarshal([]byte(text), &r))
				return r
			}
		}
		t.Fatal("the stream has ended")
		return r
	}
	if r := next(); r.Container.Name != "before" {
		t.Errorf("got %+v", r)
	}
	hostile := "a\n\ndata: x\r\x00\xff<script>"
	recent.Add(refusal(hostile))
	if r := next(); r.Container.Name != strings.ToValidUTF8(hostile, "\uFFFD") {
		t.Errorf("got %q", r.Container.Name)
	}

	// More clients than there are streams.
	var open []*http.Response
	defer func() {
		for _, resp := range open {
			resp.Body.Close()
		}
	}()
	codes := map[int]int{}
	for range atOnce[askEvents] + 2 {
		resp, err := http.Get(s.URL + "/events")
		check(t, err)
		open = append(open, resp)
		codes[resp.StatusCode]++
	}
	if codes[200] != atOnce[askEvents]-1 || codes[503] != 3 {
		t.Errorf("got %v", codes)
	}
}

// Who reads too slowly is told what is missing.
func TestRecent(t *testing.T) {
	var recent Recent
	ctx, cancel := context.WithCancel(t.Context())
	slow := recent.Records(ctx)
	for range kept + queued + 7 {
		recent.Add(refusal("flood"))
	}
	recent.Add(events.Record{Type: events.Start})
	if n := len(recent.Last()); n != kept {
		t.Errorf("%d are kept", n)
	}
	for range kept + queued {
		if r := <-slow; r.Type != events.Refusal {
			t.Errorf("got %+v", r)
		}
	}
	recent.Add(refusal("after"))
	if r := <-slow; r.Type != events.Lost || r.Count != 7 || r.Stage != events.StageReader || r.Since == nil {
		t.Errorf("got %+v", r)
	}
	if r := <-slow; r.Container == nil || r.Container.Name != "after" {
		t.Errorf("got %+v", r)
	}
	cancel()
	if _, more := <-slow; more {
		t.Error("it goes on")
	}

	stream := []events.Record{{Type: events.Start}, refusal("a"), refusal("b")}
	check(t, recent.Follow(t.Context(), &stored{stream, io.EOF}))
	if last := recent.Last(); last[kept-1].Container.Name != "b" {
		t.Errorf("got %+v", last)
	}
	if err := recent.Follow(t.Context(), &stored{nil, net.ErrClosed}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

// stored is a source of records, which ends with an error.
type stored struct {
	records []events.Record
	end     error
}

func (s *stored) Next(context.Context) (events.Record, error) {
	if len(s.records) == 0 {
		return events.Record{}, s.end
	}
	r := s.records[0]
	s.records = s.records[1:]
	return r, nil
}

func TestDescribe(t *testing.T) {
	audit := refusal("web")
	no := false
	audit.Blocked = &no
	for _, tt := range []struct {
		record events.Record
		want   string
	}{
		{refusal("web"), "curl (4711): connect tcp to 169.254.169.254:80 · blocked by preset aws"},
		{audit, "curl (4711): connect tcp to 169.254.169.254:80 · blocked by preset aws (audit: it passed)"},
		{events.Record{Type: events.Refusal, Hook: events.HookSocket, Family: "packet", Reason: events.ReasonFamily}, "socket packet · family"},
		{events.Record{Type: events.Refusal, Hook: events.HookPacket, Protocol: "icmp", Reason: events.ReasonBlocked, Destination: &events.Endpoint{Address: netip.MustParseAddr("fd00:ec2::254")}}, "packet icmp to fd00:ec2::254 · blocked"},
		{events.Record{Type: events.Suppressed, Count: 3}, "3 more refusals, too many to show each"},
		{events.Record{Type: events.Lost, Count: 3, Stage: "kernel"}, "3 refusals were lost (kernel)"},
	} {
		if got := describe(tt.record); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

// Names are text on the page.
func TestPage(t *testing.T) {
	hostile := `<script>alert(1)</script>"'&` + "\x00\xff"
	recent := &Recent{}
	recent.Add(refusal(hostile))
	h := handled(t, source(Page{
		Node: hostile, Error: hostile, Why: []string{hostile}, Defences: []Defence{{Name: hostile, Reason: hostile}},
		Containers: 3, Rows: []Row{{ID: hostile, Name: hostile, Image: hostile, Limit: hostile}, {ID: "without a name"}},
	}, recent), true)
	r := httptest.NewRequest("GET", "/", nil)
	r.Host = "localhost"
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	text := w.Body.String()
	if w.Code != 200 || strings.Contains(text, "<script>alert") || strings.Count(text, "&lt;script&gt;") < 7 {
		t.Errorf("%d: %s", w.Code, text)
	}
	for _, want := range []string{"without a name", "1 more, with fewer refusals", "Not known"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in %s", want, text)
		}
	}
	if slices.Contains(strings.Fields(text), "onload=") {
		t.Error("it has a handler in it")
	}
}

// stuck is a client that takes no answer, unless that is an error.
type stuck struct {
	*httptest.ResponseRecorder
	first func(code int)
	until <-chan struct{}
}

func (s stuck) Write(text []byte) (int, error) {
	s.first(s.Code)
	if s.Code == http.StatusOK {
		<-s.until
	}
	return len(text), nil
}

// TestStuck has many clients take nothing. Each answer is a file of the process, though the service
// is done with it as soon as it fits a pipe.
func TestStuck(t *testing.T) {
	asks, _ := hostile(t, source(Page{}, nil))
	s := newService(asks)
	h := handler(s, false)
	answered, until := make(chan int), make(chan struct{})
	var clients sync.WaitGroup
	ask := func() int {
		var once sync.Once
		first := func(code int) { once.Do(func() { answered <- code }) }
		clients.Go(func() {
			h.ServeHTTP(stuck{httptest.NewRecorder(), first, until}, httptest.NewRequest("GET", "/metrics", nil))
		})
		return <-answered
	}
	got := 0
	testenv.Eventually(t, "as many answers as there may be", func() bool {
		if ask() == http.StatusOK {
			got++
		}
		return got == maxAnswers
	})
	time.Sleep(2 * time.Second / perSecond) // the service would answer
	if code := ask(); code != http.StatusServiceUnavailable {
		t.Errorf("one more: %d", code)
	}
	close(until)
	clients.Wait()
	testenv.Eventually(t, "an answer", func() bool { return ask() == http.StatusOK })
}

// TestNoRoom gets an answer whose file found no room. The next one is as usual.
func TestNoRoom(t *testing.T) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	var conns [2]*net.UnixConn
	for i, end := range ends {
		file := os.NewFile(uintptr(end), "web")
		conn, err := net.FileConn(file)
		check(t, err)
		file.Close()
		defer conn.Close()
		conns[i] = conn.(*net.UnixConn)
	}
	go func() {
		var question [1]byte
		_, _ = conns[0].Read(question[:])
		_, _ = conns[0].Write([]byte{accepted})
		_ = newAnswers(source(Page{}, nil)).serve(t.Context(), conns[0])
	}()
	s := newService(conns[1])
	if _, err := s.ask(askMetrics); err != errBusy {
		t.Errorf("got %v, want %v", err, errBusy)
	}
	from, err := s.ask(askMetrics)
	check(t, err)
	from.Close()
}

// TestStreams asks how much a client may ask for at the same time.
func TestStreams(t *testing.T) {
	dir := t.TempDir()
	certificate(t, dir)
	check(t, os.WriteFile(dir+"/web", []byte("tls_server_config: {cert_file: cert.pem, key_file: key.pem}\n"), 0o600))
	s, _, _ := start(t, "0", dir+"/web", source(Page{}, nil))
	conn, err := tls.Dial("tcp", s.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	check(t, err)
	defer conn.Close()
	_, err = io.WriteString(conn, http2.ClientPreface)
	check(t, err)
	framer := http2.NewFramer(conn, conn)
	check(t, framer.WriteSettings())
	frame, err := framer.ReadFrame()
	check(t, err)
	settings, ok := frame.(*http2.SettingsFrame)
	if !ok {
		t.Fatalf("got %v", frame)
	}
	if most, _ := settings.Value(http2.SettingMaxConcurrentStreams); most != maxStreams {
		t.Errorf("%d streams, want %d", most, maxStreams)
	}
}
