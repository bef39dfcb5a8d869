package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// patience is for what has to happen, however slow the machine is.
const patience = 20 * time.Second

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// daemon is an API server that does as it pleases.
type daemon struct {
	t      *testing.T
	socket string
	server *http.Server
	mux    atomic.Pointer[http.ServeMux]
}

// newDaemon starts a server on a socket. It answers pings, and what is added to mux.
func newDaemon(t *testing.T) *daemon {
	t.Helper()
	d := &daemon{t: t, socket: filepath.Join(t.TempDir(), "socket")}
	d.mux.Store(http.NewServeMux())
	d.mux.Load().HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", "1.41") })
	d.start()
	t.Cleanup(d.stop)
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	l, err := net.Listen("unix", d.socket)
	check(d.t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { d.mux.Load().ServeHTTP(w, r) })}
	go func() { _ = server.Serve(l) }()
	d.server = server
}

func (d *daemon) stop() { d.server.Close() }

// answer adds a handler for a path of version 1.41.
func (d *daemon) answer(path string, handle http.HandlerFunc) {
	d.mux.Load().HandleFunc("/v1.41"+path, handle)
}

// client returns a client with the pace of a test: short where something is to
// happen, and else long.
func (d *daemon) client(p pace) *Client {
	d.t.Helper()
	d.t.Setenv("DOCKER_API_VERSION", "")
	c, err := Open("unix://" + d.socket)
	check(d.t, err)
	d.t.Cleanup(func() { check(d.t, c.Close()) })
	c.pace = p
	return c
}

var slow = pace{answer: time.Hour, ping: time.Hour, retryMin: time.Millisecond, retryMax: 10 * time.Millisecond, steady: time.Hour}

func id(n int) string { return fmt.Sprintf("%064x", n) }

func plainText(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, s) }
}

func TestOpen(t *testing.T) {
	cert := t.TempDir()
	for _, test := range []struct {
		host, env, want string // want is a part of the error, or after = the host
	}{
		{"unix:///x/y.sock", "", "=unix:///x/y.sock"},
		{"tcp://127.0.0.1:2375", "", "=tcp://127.0.0.1:2375"},
		{"tcp://[::1]:2375", "", "=tcp://[::1]:2375"},
		{"", "DOCKER_HOST=unix:///z", "=unix:///z"},
		{"unix:///x", "DOCKER_HOST=unix:///z", "=unix:///x"},
		{"", "DOCKER_HOST=", "=unix:///var/run/docker.sock"},
		{"", "DOCKER_HOST=ssh://root@there", "DOCKER_HOST: "},
		{"ssh://root@there", "", "want unix:///PATH"},
		{"ssh://there", "", "ssh is not supported"},
		{"/run/docker.sock", "", "want unix:///PATH"},
		{"unix://run/docker.sock", "", "want unix:///PATH"},
		{"unix://", "", "want unix:///PATH"},
		{"tcp://there", "", "tcp://HOST:PORT"},
		{"tcp://there:0", "", "tcp://HOST:PORT"},
		{"tcp://:2375", "", "tcp://HOST:PORT"},
		{"tcp://user@there:2375", "", "tcp://HOST:PORT"},
		{"fd://", "", "want unix:///PATH"},
		{"npipe:////./pipe/docker_engine", "", "want unix:///PATH"},
		{"http://there:2375", "", "want unix:///PATH"},
		{"\x1b[31m", "", `"\x1b[31m"`},
		{"tcp://there:2376", "DOCKER_TLS_VERIFY=1", "DOCKER_CERT_PATH"},
		{"tcp://there:2376", "DOCKER_CERT_PATH=" + cert, "DOCKER_CERT_PATH=" + cert},
		{"unix:///x", "DOCKER_CERT_PATH=" + cert, "=unix:///x"},
		{"unix:///x", "DOCKER_API_VERSION=new", "new"},
		{"unix:///" + strings.Repeat("x", 200), "", "too long"},
	} {
		t.Run(test.host+" "+test.env, func(t *testing.T) {
			for _, name := range []string{"DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "DOCKER_API_VERSION"} {
				t.Setenv(name, "")
			}
			if name, value, ok := strings.Cut(test.env, "="); ok {
				t.Setenv(name, value)
			}
			c, err := Open(test.host)
			if want, ok := strings.CutPrefix(test.want, "="); ok {
				check(t, err)
				if c.Host() != want && !(test.host == "" && c.Host() == "unix://"+usualSocket()) {
					t.Errorf("host %s, want %s", c.Host(), want)
				}
				return
			}
			if err == nil || c != nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, %v, want %s", c, err, test.want)
			}
		})
	}
}

func TestTLS(t *testing.T) {
	for _, name := range []string{"DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_API_VERSION"} {
		t.Setenv(name, "")
	}
	server := httptest.NewUnstartedServer(plainText("[]"))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	dir := t.TempDir()
	writeCertificate(t, dir)
	t.Setenv("DOCKER_CERT_PATH", dir)
	host := "tcp://" + server.Listener.Addr().String()
	c, err := Open(host)
	check(t, err)
	_, err = c.Containers(t.Context())
	check(t, err)
	check(t, c.Close())

	// Not with a certificate that the CA has not signed.
	t.Setenv("DOCKER_TLS_VERIFY", "1")
	c, err = Open(host)
	check(t, err)
	if _, err := c.Containers(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("got %v", err)
	}
	check(t, c.Close())
}

func TestContainers(t *testing.T) {
	d := newDaemon(t)
	d.answer("/containers/json", plainText(`[
		{"Id":"`+id(1)+`","Names":["/db/alias","/web"],"Image":"nginx:1","ImageID":"sha256:1","Labels":{"a":"b\u001b"},
		 "NetworkSettings":{"Networks":{"bridge":{"NetworkID":"`+id(7)+`","IPAddress":"","MacAddress":""},"a":null,"b\n":{},"net":{"NetworkID":"../x"}}}},
		{"Id":"`+id(2)+`","Names":["/\u001b[2J"],"Image":"x\u0007","Unknown":[{}]},
		{"Id":"`+id(3)+`","Names":["/a\nb","/..","","/","//x","/ok"]},
		{"Id":"`+id(4)+`","Names":null,"Labels":null,"NetworkSettings":null}]`))
	got, err := d.client(slow).Containers(t.Context())
	check(t, err)
	want := []Container{
		{ID: id(1), Name: "web", Names: []string{"db/alias", "web"}, Labels: map[string]string{"a": "b\x1b"}, Image: "nginx:1", ImageID: "sha256:1",
			Networks: []Network{{"bridge", id(7)}, {"net", ""}}},
		{ID: id(2)},
		{ID: id(3), Name: "ok", Names: []string{"ok"}},
		{ID: id(4)},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestInspect(t *testing.T) {
	d := newDaemon(t)
	d.answer("/containers/{id}/json", func(w http.ResponseWriter, r *http.Request) {
		switch r.PathValue("id") {
		case id(1):
			fmt.Fprintf(w, `{"Id":%q,"Name":"/web","Image":"sha256:1","State":{"Running":true,"Pid":42},
				"Config":{"Image":"nginx","Labels":{"a":"b"}},"HostConfig":{"CgroupParent":"/parent"},"NetworkSettings":{"Networks":{"host":{}}}}`, id(1))
		case id(2):
			fmt.Fprintf(w, `{"Id":%q}`, id(2))
		case id(3):
			fmt.Fprintf(w, `{"Id":%q}`, id(1))
		case id(4):
			fmt.Fprintf(w, `{"Id":%q,"State":{"Pid":-1}}`, id(4))
		default:
			http.Error(w, `{"message":"No such container"}`, http.StatusNotFound)
		}
	})
	c := d.client(slow)
	got, err := c.Inspect(t.Context(), id(1))
	check(t, err)
	want := Container{ID: id(1), Name: "web", Names: []string{"web"}, Labels: map[string]string{"a": "b"}, Image: "nginx", ImageID: "sha256:1",
		Networks: []Network{{Name: "host"}}, Pid: 42, CgroupParent: "/parent"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if got, err := c.Inspect(t.Context(), id(2)); err != nil || got.Pid != 0 {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, wrong := range []string{id(3), id(4), "", "web", "../info", strings.ToUpper(id(0xabc))} {
		if _, err := c.Inspect(t.Context(), wrong); err == nil || errors.Is(err, ErrNoContainer) {
			t.Errorf("%q: %v", wrong, err)
		}
	}
	if _, err := c.Inspect(t.Context(), id(5)); !errors.Is(err, ErrNoContainer) {
		t.Errorf("got %v, want ErrNoContainer", err)
	}
}

func TestInfo(t *testing.T) {
	d := newDaemon(t)
	d.answer("/info", plainText(`{"ServerVersion":"29.1.3","CgroupDriver":"systemd\u001b","CgroupVersion":"2","SecurityOptions":["name=seccomp","name=rootless"]}`))
	got, err := d.client(slow).Info(t.Context())
	check(t, err)
	if want := (Info{Version: "29.1.3", CgroupVersion: 2, Rootless: true}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// repeat writes again and again, until the client has had enough.
func repeat(begin, again string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		block := []byte(strings.Repeat(again, 64<<10/len(again)))
		if _, err := io.WriteString(w, begin); err != nil {
			return
		}
		for {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}
}

// closing hangs up after some text.
func closing(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		_, _ = io.WriteString(conn, s)
		conn.Close()
	}
}

func failing(code int, s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		_, _ = io.WriteString(w, s)
	}
}

// Whatever comes back, it is an error that can be shown, and it does not take more
// memory than it may.
func TestHostileAnswers(t *testing.T) {
	const header = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
	for name, handle := range map[string]http.HandlerFunc{
		"nothing":             plainText(""),
		"no JSON":             plainText("<html>\x1b[2J</html>"),
		"an object":           plainText(`{"message":"x"}`),
		"a number":            plainText("1"),
		"numbers":             plainText("[1,2]"),
		"wrong types":         plainText(`[{"Id":1,"Names":"web"}]`),
		"names of numbers":    plainText(`[{"Id":"` + id(1) + `","Names":[1]}]`),
		"an id in words":      plainText(`[{"Id":"web"}]`),
		"no id":               plainText(`[{}]`),
		"an id with escapes":  plainText(`[{"Id":"\u001b[2J` + id(1) + `"}]`),
		"a short id":          plainText(`[{"Id":"0123456789ab"}]`),
		"an upper-case id":    plainText(`[{"Id":"` + strings.Repeat("A", 64) + `"}]`),
		"an id and a newline": plainText(`[{"Id":"` + id(1) + `\n"}]`),
		"half an answer":      plainText(`[{"Id":"` + id(1) + `"`),
		"nesting":             plainText(strings.Repeat("[", 100_000)),
		"a huge string":       repeat(`[{"Id":"`, "x"),
		"huge white space":    repeat("", " "),
		"many containers":     repeat("[{}", ",{}"),
		"many mounts":         repeat(`[{"Mounts":[{}`, ",{}"),
		"many names":          repeat(`[{"Names":[""`, `,""`),
		"many labels":         repeat(`[{"Labels":{"":""`, `,"":""`),
		"many nothings":       repeat(`[null`, `,null`),
		"deep objects":        repeat("", `[{"a":`),
		"failure":             failing(500, `{"message":"no \u001b[31mluck\n\u0007"}`),
		"failure in words":    failing(500, "no \x1b[31mluck\n"),
		"huge failure":        func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500); repeat("", "x")(w, r) },
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusMovedPermanently)
		},
		"no HTTP":         closing("what?\r\n"),
		"closes at once":  closing(""),
		"closes early":    closing(header + "Content-Length: 100\r\n\r\n["),
		"bad chunks":      closing(header + "Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
		"huge header":     closing(header + strings.Repeat("X-Filler: "+strings.Repeat("x", 1000)+"\r\n", 1000)),
		"endless header":  closing(strings.Repeat("x", 1<<20)),
		"switches":        closing("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"),
		"no content":      failing(http.StatusNoContent, ""),
		"compressed junk": closing(header + "Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"),
	} {
		t.Run(name, func(t *testing.T) {
			d := newDaemon(t)
			d.answer("/containers/json", handle)
			c := d.client(slow)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			got, err := c.Containers(t.Context())
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Fatalf("no error: %+v", got)
			}
			if msg := err.Error(); len(msg) > 600 || strings.ContainsFunc(msg, func(r rune) bool { return !strconv.IsPrint(r) }) {
				t.Errorf("not to be shown: %q", msg)
			}
			if !strings.Contains(err.Error(), d.socket) {
				t.Errorf("does not say which daemon: %v", err)
			}
			if took := after.TotalAlloc - before.TotalAlloc; took > 2*maxDocument {
				t.Errorf("took %d MB", took>>20)
			}
		})
	}
}

// A daemon that lies about its version is asked with one that the library knows.
func TestVersions(t *testing.T) {
	for _, test := range []struct{ says, want string }{
		{"1.41", "/v1.41/"}, {"1.44", "/v1.44/"}, {"9.99", "/v1."}, {"", "/v1."}, {"0.1", "/v1."}, {"../..", "/v1."}, {"1.41/x", "/v1."},
	} {
		d := newDaemon(t)
		var asked atomic.Value
		mux := http.NewServeMux()
		mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Api-Version", test.says)
			asked.Store(r.URL.Path)
			_, _ = io.WriteString(w, "[]")
		})
		d.mux.Store(mux)
		_, err := d.client(slow).Containers(t.Context())
		if path := asked.Load().(string); err != nil || !strings.HasPrefix(path, test.want) || !strings.HasSuffix(path, "/containers/json") {
			t.Errorf("version %q: asked for %s, %v", test.says, path, err)
		}
	}
}

func stall(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func TestStall(t *testing.T) {
	for name, prepare := range map[string]func(*daemon){
		"ping": func(d *daemon) {
			mux := http.NewServeMux()
			mux.HandleFunc("/", stall)
			d.mux.Store(mux)
		},
		"answer": func(d *daemon) { d.answer("/containers/json", stall) },
		"half": func(d *daemon) {
			d.answer("/containers/json", func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.WriteString(w, "[")
				w.(http.Flusher).Flush()
				stall(w, r)
			})
		},
		"header": func(d *daemon) {
			d.answer("/containers/json", func(w http.ResponseWriter, r *http.Request) {
				conn, _, _ := w.(http.Hijacker).Hijack()
				_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n")
				t.Cleanup(func() { conn.Close() })
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDaemon(t)
			prepare(d)
			quick := slow
			quick.answer = 20 * time.Millisecond
			if _, err := d.client(quick).Containers(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
			// The caller's time counts too.
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if _, err := d.client(slow).Containers(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestNoDaemon(t *testing.T) {
	d := newDaemon(t)
	c := d.client(slow)
	d.stop()
	if _, err := c.Containers(t.Context()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), d.socket) {
		t.Errorf("got %v", err)
	}
	// It may come later.
	d.answer("/containers/json", plainText("[]"))
	d.start()
	_, err := c.Containers(t.Context())
	check(t, err)
}

func TestConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "daemon.json")
	if c, err := ReadConfig(path); err != nil || !reflect.DeepEqual(c, Config{}) {
		t.Errorf("missing file: %+v, %v", c, err)
	}
	for _, test := range []struct {
		text string
		want Config
		err  string
	}{
		{text: ""},
		{text: " \n"},
		{text: "{}"},
		{text: "\xef\xbb\xbf{}"},
		{text: `{"debug":true,"runtimes":{"x":{"path":"/x"}}}`},
		{text: `{"cgroup-parent":"/foo"}`, want: Config{CgroupParent: "/foo"}},
		{text: `{"exec-opts":["native.cgroupdriver=systemd"]}`, want: Config{CgroupDriver: "systemd"}},
		{text: `{"exec-opts":["isolation=x", "native.cgroupdriver=cgroupfs"]}`, want: Config{CgroupDriver: "cgroupfs"}},
		{text: `{"hosts":["unix:///x","tcp://0.0.0.0:2376"]}`, want: Config{Hosts: []string{"unix:///x", "tcp://0.0.0.0:2376"}}},
		{text: "{", err: ":1: "},
		{text: "{\n\"hosts\": [,]\n}", err: ":2: "},
		{text: "{\n\n\"cgroup-parent\": 1}", err: ":3: "},
		{text: "[]", err: ":1: "},
		{text: `{"exec-opts":["native.cgroupdriver=magic"]}`, err: "exec-opts"},
		{text: `{"exec-opts":["native.cgroupdriver"]}`, err: "exec-opts"},
		{text: `{"a":"` + strings.Repeat("x", 1<<20) + `"}`, err: "more than"},
	} {
		check(t, os.WriteFile(path, []byte(test.text), 0o600))
		c, err := ReadConfig(path)
		if test.err != "" {
			if err == nil || !strings.HasPrefix(err.Error(), path+":") || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%.40q: got %v, want %s", test.text, err, test.err)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(c, test.want) {
			t.Errorf("%q: got %+v, %v", test.text, c, err)
		}
	}
	if _, err := ReadConfig(filepath.Dir(path)); err == nil {
		t.Error("a directory is no file")
	}
}

// eventText is an event as the daemon sends it.
func eventText(action string, n int, name string) []byte {
	text, _ := json.Marshal(map[string]any{
		"Type": "container", "Action": action, "Actor": map[string]any{"ID": id(n), "Attributes": map[string]string{"name": name}},
		"status": action, "id": id(n), "time": 1,
	})
	return append(text, '\n')
}

// feed is what a daemon sends as events: connections come out of opened, and what
// is put into one is written to it.
type feed struct {
	opened chan *subscription
}

type subscription struct {
	query string
	send  chan []byte   // closed: hang up
	ended chan struct{} // closed when the client is gone
}

func newFeed() *feed { return &feed{opened: make(chan *subscription)} }

func (f *feed) serve(w http.ResponseWriter, r *http.Request) {
	s := &subscription{query: r.URL.RawQuery, send: make(chan []byte), ended: make(chan struct{})}
	defer close(s.ended)
	flush := func() { _ = http.NewResponseController(w).Flush() }
	flush()
	select {
	case f.opened <- s:
	case <-r.Context().Done():
		return
	}
	for {
		select {
		case text, ok := <-s.send:
			if !ok {
				return
			}
			if _, err := w.Write(text); err != nil {
				return
			}
			flush()
		case <-r.Context().Done():
			return
		}
	}
}

func receive[T any](t *testing.T, from <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatalf("%s: not within %v", what, patience)
	}
	return v
}

// watch returns what Watch tells, and a function that ends it.
func watch(t *testing.T, c *Client) (told <-chan Event, end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ch, ended := make(chan Event), make(chan error, 1)
	go func() {
		ended <- c.Watch(ctx, func(e Event) {
			select {
			case ch <- e:
			case <-ctx.Done():
			}
		})
	}()
	end = func() {
		t.Helper()
		cancel()
		if err := receive(t, ended, "the end of Watch"); !errors.Is(err, context.Canceled) {
			t.Errorf("Watch: %v", err)
		}
		ended <- context.Canceled
	}
	t.Cleanup(end)
	return ch, end
}

func expect(t *testing.T, told <-chan Event, want Event) {
	t.Helper()
	got := receive(t, told, fmt.Sprintf("%+v", want))
	if want.Action == Lost && got.Err != nil {
		got.Err = nil
	}
	if got != want {
		t.Fatalf("told %+v, want %+v", got, want)
	}
}

func (d *daemon) feed() *feed {
	f := newFeed()
	d.answer("/events", f.serve)
	return f
}

func TestWatch(t *testing.T) {
	d := newDaemon(t)
	f := d.feed()
	told, end := watch(t, d.client(slow))
	s := receive(t, f.opened, "a subscription")
	expect(t, told, Event{Action: Resync})
	if !strings.Contains(s.query, "since=") || !strings.Contains(s.query, "rename") {
		t.Errorf("query %s", s.query)
	}
	for i, action := range []Action{Start, Die, Destroy, Rename, Update} {
		s.send <- eventText(string(action), i, "web")
		expect(t, told, Event{Action: action, ID: id(i), Name: "web"})
	}
	// What is not asked for is not told, and names are names.
	s.send <- eventText("exec_start: sh", 1, "web")
	s.send <- eventText("pause", 1, "web")
	s.send <- []byte(`{"Type":"network","Action":"destroy","Actor":{"ID":"` + id(1) + `"}}` + "\n")
	s.send <- []byte(`{"Type":"container","Action":"die","Actor":{"ID":"web"}}` + "\n")
	s.send <- []byte(`{}` + "\n\n \n\x1e")
	s.send <- eventText("start", 2, "\x1b[2J")
	expect(t, told, Event{Action: Start, ID: id(2)})
	// In pieces.
	whole := eventText("die", 3, "web")
	s.send <- whole[:10]
	s.send <- whole[10:]
	expect(t, told, Event{Action: Die, ID: id(3), Name: "web"})
	end()
	receive(t, s.ended, "the end of the connection")
}

// The connection ends, the daemon is away, and comes back with another version.
func TestWatchRestart(t *testing.T) {
	d := newDaemon(t)
	f := d.feed()
	c := d.client(slow)
	told, _ := watch(t, c)
	s := receive(t, f.opened, "a subscription")
	expect(t, told, Event{Action: Resync})
	close(s.send)
	expect(t, told, Event{Action: Lost})
	receive(t, f.opened, "another subscription")
	expect(t, told, Event{Action: Resync})

	d.stop()
	expect(t, told, Event{Action: Lost})
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", "1.44") })
	mux.HandleFunc("/v1.44/events", f.serve)
	mux.HandleFunc("/v1.44/containers/json", plainText("[]"))
	d.mux.Store(mux)
	d.start()
	s = receive(t, f.opened, "a subscription with the new daemon")
	expect(t, told, Event{Action: Resync})
	s.send <- eventText("start", 1, "web")
	expect(t, told, Event{Action: Start, ID: id(1), Name: "web"})
	_, err := c.Containers(t.Context())
	check(t, err)
}

// Nobody is listening while 10,000 events come; the last of each container is told.
func TestWatchBurst(t *testing.T) {
	for _, test := range []struct {
		name       string
		containers int
	}{
		{"one", 1}, {"some", 100}, {"many", maxPending - 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newDaemon(t)
			f := newFeed()
			again := make(chan struct{})
			var attempts atomic.Int32
			d.answer("/events", func(w http.ResponseWriter, r *http.Request) {
				if attempts.Add(1) == 1 {
					f.serve(w, r)
					return
				}
				select {
				case again <- struct{}{}:
				case <-r.Context().Done():
				}
				w.WriteHeader(http.StatusServiceUnavailable)
			})
			told, _ := watch(t, d.client(slow))
			s := receive(t, f.opened, "a subscription")
			expect(t, told, Event{Action: Resync})
			// This one keeps fn from returning.
			s.send <- eventText("update", 1<<20, "first")
			var all bytes.Buffer
			for i := range 10_000 {
				action := "start"
				if i >= 10_000-test.containers {
					action = "die"
				}
				all.Write(eventText(action, i%test.containers, "web"))
			}
			all.Write(eventText("rename", 0, "new"))
			s.send <- all.Bytes()
			close(s.send)
			receive(t, again, "the next attempt, all being read")
			if e := receive(t, told, "the first event"); e.Name != "first" {
				t.Fatalf("told %+v", e)
			}
			expect(t, told, Event{Action: Lost})
			seen := map[string]Event{}
			for len(seen) < test.containers {
				e := receive(t, told, "an event")
				if _, ok := seen[e.ID]; ok {
					t.Fatalf("told twice: %+v", e)
				}
				seen[e.ID] = e
			}
			if e := seen[id(0)]; e.Action != Die || e.Name != "new" {
				t.Errorf("told %+v, want what came before the new name", e)
			}
		})
	}
}

// What is not an event ends the connection, however long it goes on.
func TestWatchJunk(t *testing.T) {
	for name, junk := range map[string]string{
		"no JSON":        "\x1b[2J\n",
		"wrong types":    `{"Type":1}` + "\n",
		"a list":         "[]\n",
		"half of one":    `{"Type":` + "\n",
		"a string":       `"` + strings.Repeat("x", 2*maxLine),
		"white space":    strings.Repeat(" ", 2*maxLine),
		"a long event":   `{"Type":"` + strings.Repeat("x", maxLine) + "\"}\n",
		"a list of many": "[" + strings.Repeat("1,\n", maxLine),
	} {
		t.Run(name, func(t *testing.T) {
			d := newDaemon(t)
			f := d.feed()
			told, _ := watch(t, d.client(slow))
			for range 2 {
				s := receive(t, f.opened, "a subscription")
				expect(t, told, Event{Action: Resync})
				s.send <- eventText("start", 1, "web")
				expect(t, told, Event{Action: Start, ID: id(1), Name: "web"})
				s.send <- []byte(junk)
				if e := receive(t, told, "lost"); e.Action != Lost || strings.ContainsFunc(e.Err.Error(), func(r rune) bool { return !strconv.IsPrint(r) }) {
					t.Errorf("told %+v", e)
				}
			}
		})
	}
}

// Lines without anything in them take no memory.
func TestWatchEmptyLines(t *testing.T) {
	d := newDaemon(t)
	f := d.feed()
	told, _ := watch(t, d.client(slow))
	s := receive(t, f.opened, "a subscription")
	expect(t, told, Event{Action: Resync})
	s.send <- eventText("start", 1, "web")
	expect(t, told, Event{Action: Start, ID: id(1), Name: "web"})
	block := bytes.Repeat([]byte("\r\n"), 1<<19)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 100 {
		s.send <- block
	}
	s.send <- eventText("die", 1, "web")
	expect(t, told, Event{Action: Die, ID: id(1), Name: "web"})
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > 16<<20 {
		t.Errorf("took %d MB", took>>20)
	}
}

// A daemon that stops answering is noticed, whether it had or not.
func TestWatchStall(t *testing.T) {
	d := newDaemon(t)
	f := newFeed()
	var stalled atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, r *http.Request) {
		if stalled.Load() {
			stall(w, r)
		}
		w.Header().Set("Api-Version", "1.41")
	})
	mux.HandleFunc("/v1.41/events", f.serve)
	d.mux.Store(mux)
	quick := slow
	quick.ping, quick.answer = time.Millisecond, 500*time.Millisecond
	told, _ := watch(t, d.client(quick))
	s := receive(t, f.opened, "a subscription")
	expect(t, told, Event{Action: Resync})
	stalled.Store(true)
	expect(t, told, Event{Action: Lost})
	receive(t, s.ended, "the end of the connection")
	stalled.Store(false)
	receive(t, f.opened, "another subscription")
	expect(t, told, Event{Action: Resync})
}

// A daemon that answers keeps its stream, though nothing happens for long.
func TestWatchIdle(t *testing.T) {
	d := newDaemon(t)
	f := newFeed()
	pings := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		select {
		case pings <- struct{}{}:
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/v1.41/events", f.serve)
	d.mux.Store(mux)
	quick := slow
	quick.answer, quick.ping = time.Second, 100*time.Millisecond
	told, _ := watch(t, d.client(quick))
	receive(t, pings, "the first, which is about the version")
	s := receive(t, f.opened, "a subscription")
	expect(t, told, Event{Action: Resync})
	for range 2 * quick.answer / quick.ping {
		receive(t, pings, "a ping")
	}
	select {
	case s.send <- eventText("start", 1, "web"):
	case <-s.ended:
		t.Fatal("the stream has ended")
	}
	expect(t, told, Event{Action: Start, ID: id(1), Name: "web"})
}

// A daemon that never begins to answer.
func TestWatchMute(t *testing.T) {
	d := newDaemon(t)
	begun := make(chan struct{})
	d.answer("/events", func(w http.ResponseWriter, r *http.Request) {
		select {
		case begun <- struct{}{}:
		case <-r.Context().Done():
		}
		stall(w, r)
	})
	quick := slow
	quick.answer = 50 * time.Millisecond
	told, _ := watch(t, d.client(quick))
	receive(t, begun, "an attempt")
	expect(t, told, Event{Action: Lost})
	receive(t, begun, "another attempt")

	// The end of the context does not wait for it.
	told, end := watch(t, d.client(slow))
	receive(t, begun, "an attempt")
	end()
	select {
	case e := <-told:
		t.Errorf("told %+v", e)
	default:
	}
}

// Lost is told once, however often it is tried.
func TestWatchNoDaemon(t *testing.T) {
	d := newDaemon(t)
	f := d.feed()
	d.stop()
	told, _ := watch(t, d.client(slow))
	e := receive(t, told, "lost")
	if e.Action != Lost || !errors.Is(e.Err, os.ErrNotExist) {
		t.Errorf("told %+v", e)
	}
	d.start()
	receive(t, f.opened, "a subscription")
	expect(t, told, Event{Action: Resync})
}

func TestQueue(t *testing.T) {
	event := func(a Action, n int) Event { return Event{Action: a, ID: id(n)} }
	for _, test := range []struct {
		name      string
		add, want []Event
	}{
		{"the last", []Event{event(Start, 1), event(Die, 1)}, []Event{event(Die, 1)}},
		{"restart", []Event{event(Die, 1), event(Start, 1)}, []Event{event(Start, 1)}},
		{"rename after start", []Event{event(Start, 1), event(Rename, 1), event(Update, 1)}, []Event{event(Start, 1)}},
		{"rename after die", []Event{event(Die, 1), event(Rename, 1)}, []Event{event(Die, 1)}},
		{"start after rename", []Event{event(Rename, 1), event(Start, 1)}, []Event{event(Start, 1)}},
		{"rename, update", []Event{event(Rename, 1), event(Update, 1)}, []Event{event(Update, 1)}},
		{"two", []Event{event(Start, 1), event(Start, 2), event(Die, 1)}, []Event{event(Die, 1), event(Start, 2)}},
	} {
		q := newQueue()
		for _, e := range test.add {
			q.add(e)
		}
		var got []Event
		for e, ok := q.take(); ok; e, ok = q.take() {
			got = append(got, e)
		}
		if !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s: got %+v, want %+v", test.name, got, test.want)
		}
	}
	// Too many containers.
	q := newQueue()
	for n := range 10_000 {
		q.add(event(Start, n))
		if len(q.order) > maxPending || len(q.events) != len(q.order) {
			t.Fatalf("holds %d and %d events", len(q.order), len(q.events))
		}
	}
	if e, _ := q.take(); e.Action != Resync {
		t.Errorf("got %+v, want to hear that there were too many", e)
	}
	// What was before a resync is void.
	q = newQueue()
	q.add(event(Start, 1))
	q.resync()
	q.add(event(Start, 2))
	q.lost(io.EOF)
	q.lost(io.ErrUnexpectedEOF)
	q.resync()
	for _, want := range []Event{{Action: Lost, Err: io.EOF}, {Action: Resync}} {
		if e, _ := q.take(); e != want {
			t.Errorf("got %+v, want %+v", e, want)
		}
	}
	if e, ok := q.take(); ok {
		t.Errorf("got %+v", e)
	}
}
