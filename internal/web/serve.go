package web

import (
	"bufio"
	"compress/gzip"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	toolkit "github.com/prometheus/exporter-toolkit/web"
	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/events"
)

// ServeArg, as the first argument of this program, makes it the process that serves: Serve.
const ServeArg = "serve-web"

// The arguments after ServeArg.
const (
	argConfig = "config" // there is a web config file
	argLocal  = "local"  // only this machine may ask, so it knows no name but localhost
)

// The files of the process that serves. It opens no others.
const (
	fileListener = 3 + iota
	fileAsk      // where it asks the service
	fileConfig
)

// What clients can take of the process that serves.
const (
	maxConnections = 32
	// maxStreams is how much a connection may ask for at the same time. A browser asks for six
	// things.
	maxStreams = 8
	// maxAnswers is how many answers of the service may be on their way to clients, each with
	// a file.
	maxAnswers    = 32
	maxHeader     = 16 << 10
	maxPage       = 4 << 20
	maxRecord     = 64 << 10
	writePatience = 30 * time.Second
	readPatience  = 5 * time.Second
	idlePatience  = 2 * time.Minute
	stopPatience  = time.Second
	// beat is how often a stream of records shows that it is alive.
	beat = 15 * time.Second
)

// Serve is the process that serves, until the service ends. It has no privileges, and what it
// shows it asks of the service.
func Serve(args []string) error {
	if err := confine(); err != nil {
		return err
	}
	debug.SetMemoryLimit(memoryGoal)
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	at := os.NewFile(fileListener, "listener")
	listener, err := net.FileListener(at)
	if err != nil {
		return err
	}
	at.Close()
	asking := os.NewFile(fileAsk, "service")
	conn, err := net.FileConn(asking)
	if err != nil {
		return err
	}
	asking.Close()
	config := ""
	if slices.Contains(args, argConfig) {
		unix.CloseOnExec(fileConfig)
		config = fmt.Sprintf("/proc/self/fd/%d", fileConfig)
	}
	service := newService(conn.(*net.UnixConn))
	server := &http.Server{
		Handler:           handler(service, slices.Contains(args, argLocal)),
		ReadHeaderTimeout: readPatience,
		ReadTimeout:       readPatience,
		WriteTimeout:      writePatience,
		IdleTimeout:       idlePatience,
		MaxHeaderBytes:    maxHeader,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		// Clients can make it say something for each connection.
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-service.ended
		ctx, cancel := context.WithTimeout(context.Background(), stopPatience)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
	}()
	err = toolkit.Serve(netutil.LimitListener(listener, maxConnections), server, &toolkit.FlagConfig{WebConfigFile: &config}, log)
	if errors.Is(err, http.ErrServerClosed) {
		<-stopped
		return nil
	}
	return err
}

// service is the service as the process that serves sees it.
type service struct {
	conn    *net.UnixConn
	mu      sync.Mutex // one question at a time
	answers chan *os.File
	// underway has an element for each answer that is on its way to a client.
	underway chan struct{}
	// ended is closed when the service ends.
	ended chan struct{}
}

var (
	errBusy  = errors.New("others are being answered: try again")
	errEnded = errors.New("the service ends")
)

func newService(conn *net.UnixConn) *service {
	s := &service{conn: conn, answers: make(chan *os.File), underway: make(chan struct{}, maxAnswers), ended: make(chan struct{})}
	go s.read()
	return s
}

// read reads answers until the service ends.
func (s *service) read() {
	defer close(s.ended)
	for {
		var answer [1]byte
		rights := make([]byte, unix.CmsgSpace(4))
		n, length, _, _, err := s.conn.ReadMsgUnix(answer[:], rights)
		if err != nil || n == 0 {
			return
		}
		var from *os.File
		if answer[0] == accepted {
			// An answer without a file is one for which there was no room.
			from, _ = received(rights[:length])
		}
		s.answers <- from
	}
}

// received returns the file that came with a message.
func received(rights []byte) (*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil || len(messages) != 1 {
		return nil, errors.Join(errors.New("an answer without a file"), err)
	}
	files, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(files) != 1 {
		return nil, errors.Join(errors.New("an answer without a file"), err)
	}
	unix.CloseOnExec(files[0])
	if err := unix.SetNonblock(files[0], true); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(files[0]), "answer"), nil
}

// ask returns where to read the answer, which the caller closes.
func (s *service) ask(what byte) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.conn.Write([]byte{what}); err != nil {
		return nil, errEnded
	}
	select {
	case from := <-s.answers:
		if from == nil {
			return nil, errBusy
		}
		return from, nil
	case <-s.ended:
		return nil, errEnded
	}
}

// page asks for what the page shows.
func (s *service) page() (text []byte, page Page, err error) {
	from, err := s.ask(askPage)
	if err != nil {
		return nil, page, err
	}
	defer from.Close()
	if text, err = io.ReadAll(io.LimitReader(from, maxPage)); err == nil {
		err = json.Unmarshal(text, &page)
	}
	return text, page, err
}

//go:embed page
var pageFiles embed.FS

var pageTemplate = template.Must(template.New("page.html").Funcs(template.FuncMap{"describe": describe}).ParseFS(pageFiles, "page/page.html"))

// handler serves what there is.
func handler(s *service, local bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", s.answered(s.serveMetrics))
	mux.HandleFunc("GET /page.json", s.answered(s.serveJSON))
	mux.HandleFunc("GET /events", s.answered(s.serveEvents))
	mux.HandleFunc("GET /{$}", s.answered(s.servePage))
	mux.HandleFunc("GET /-/healthy", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = io.WriteString(w, "egressbpf serves. Whether the filter is in force is a metric, egressbpf_enforcing.\n")
	})
	for name, kind := range map[string]string{"page.css": "text/css", "page.js": "text/javascript", "page.svg": "image/svg+xml"} {
		text, err := pageFiles.ReadFile("page/" + name)
		if err != nil {
			panic(err) // it is part of the program
		}
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, r *http.Request) { answer(w, r, kind+"; charset=utf-8", text) })
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		if local && !localName(r.Host) {
			http.Error(w, "this address is served to this machine only: ask for localhost, or for the address", http.StatusMisdirectedRequest)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// localName says whether a browser that asks for a host means this machine. Any other name may
// be one that somebody else's page has had resolved to this machine, to read from it.
func localName(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil || host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// answered refuses to serve what has to be asked for while too many answers are on their way. The
// service is done with an answer that fits a pipe, however long the client takes.
func (s *service) answered(serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case s.underway <- struct{}{}:
			defer func() { <-s.underway }()
			serve(w, r)
		default:
			refuse(w, errBusy)
		}
	}
}

// refuse answers that there is no answer.
func refuse(w http.ResponseWriter, err error) {
	w.Header().Set("Retry-After", "1")
	http.Error(w, err.Error(), http.StatusServiceUnavailable)
}

// compressed returns a writer for an answer, which compresses it if the client wants that. On
// this machine it would cost more than it saves.
func compressed(w http.ResponseWriter, r *http.Request) (to io.Writer, end func() error) {
	w.Header().Add("Vary", "Accept-Encoding")
	if client, err := netip.ParseAddrPort(r.RemoteAddr); err == nil && client.Addr().Unmap().IsLoopback() || !accepts(r, "gzip") {
		return w, func() error { return nil }
	}
	w.Header().Set("Content-Encoding", "gzip")
	g, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		panic(err) // the level exists
	}
	return g, g.Close
}

// accepts says whether a client takes an encoding.
func accepts(r *http.Request, encoding string) bool {
	for part := range strings.SplitSeq(strings.Join(r.Header.Values("Accept-Encoding"), ","), ",") {
		name, weight, _ := strings.Cut(part, ";")
		never := weight != "" && strings.Trim(weight, " q=0.") == ""
		if strings.EqualFold(strings.TrimSpace(name), encoding) && !never {
			return true
		}
	}
	return false
}

// answer writes an answer that is at hand.
func answer(w http.ResponseWriter, r *http.Request, kind string, text []byte) {
	w.Header().Set("Content-Type", kind)
	to, end := compressed(w, r)
	_, _ = to.Write(text)
	_ = end()
}

// endOfMetrics is the last line of the metrics, which tells that none is missing. It is a comment.
const endOfMetrics = "# EOF\n"

func (s *service) serveMetrics(w http.ResponseWriter, r *http.Request) {
	from, err := s.ask(askMetrics)
	if err != nil {
		refuse(w, err)
		return
	}
	defer from.Close()
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	to, end := compressed(w, r)
	var last tail
	_, err = io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(&last, to)}, struct{ io.Reader }{from}, make([]byte, 32<<10))
	if err != nil || string(last.text) != endOfMetrics || end() != nil {
		// The client shall not take a part for the whole.
		panic(http.ErrAbortHandler)
	}
}

// tail keeps the end of what is written, as long as endOfMetrics.
type tail struct{ text []byte }

func (t *tail) Write(text []byte) (int, error) {
	t.text = append(t.text, text[max(0, len(text)-len(endOfMetrics)):]...)
	t.text = t.text[max(0, len(t.text)-len(endOfMetrics)):]
	return len(text), nil
}

func (s *service) serveJSON(w http.ResponseWriter, r *http.Request) {
	text, _, err := s.page()
	if err != nil {
		refuse(w, err)
		return
	}
	answer(w, r, "application/json", text)
}

func (s *service) servePage(w http.ResponseWriter, r *http.Request) {
	_, page, err := s.page()
	if err != nil {
		refuse(w, err)
		return
	}
	slices.Reverse(page.Records) // the latest first
	var text strings.Builder
	if err := pageTemplate.Execute(&text, page); err != nil {
		refuse(w, err)
		return
	}
	answer(w, r, "text/html; charset=utf-8", []byte(text.String()))
}

// serveEvents passes records on as server-sent events.
func (s *service) serveEvents(w http.ResponseWriter, r *http.Request) {
	from, err := s.ask(askEvents)
	if err != nil {
		refuse(w, err)
		return
	}
	defer from.Close()
	defer context.AfterFunc(r.Context(), func() { from.Close() })()
	w.Header().Set("Content-Type", "text/event-stream")
	to := http.NewResponseController(w)
	if to.SetReadDeadline(time.Time{}) != nil { // the request has been read
		return
	}
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, maxRecord)
	write := func(text string) bool {
		if to.SetWriteDeadline(time.Now().Add(writePatience)) != nil {
			return false
		}
		_, err := io.WriteString(w, text)
		return err == nil && to.Flush() == nil
	}
	if !write(": egressbpf\n\n") {
		return
	}
	for lines.Scan() {
		text := ":\n\n"
		if line := lines.Text(); line != "" {
			text = "data: " + line + "\n\n"
		}
		if !write(text) {
			return
		}
	}
}

// describe says in a line what a record tells, without its time and container. page.js says it
// the same way.
func describe(r events.Record) string {
	switch r.Type {
	case events.Suppressed:
		return fmt.Sprintf("%d more refusals, too many to show each", r.Count)
	case events.Lost:
		return fmt.Sprintf("%d refusals were lost (%s)", r.Count, r.Stage)
	}
	var words []string
	if r.Process != nil {
		words = append(words, fmt.Sprintf("%s (%d):", r.Process.Comm, r.Process.PID))
	}
	words = append(words, r.Hook)
	for _, word := range []string{r.Protocol, r.Family} {
		if word != "" {
			words = append(words, word)
		}
	}
	if to := r.Destination; to != nil {
		at := to.Address.String()
		if to.Port != 0 {
			at = netip.AddrPortFrom(to.Address, to.Port).String()
		}
		words = append(words, "to "+at)
	}
	words = append(words, "·", r.Reason)
	if r.Rule != "" {
		words = append(words, "by "+r.Rule)
	}
	if r.Blocked != nil && !*r.Blocked {
		words = append(words, "(audit: it passed)")
	}
	return strings.Join(words, " ")
}
