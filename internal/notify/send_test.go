package notify_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egressbpf/egressbpf/internal/notify"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == notify.SendArg {
		os.Exit(notify.Child(os.Stdin, os.Stdout))
	}
	os.Exit(m.Run())
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var message = notify.Message{Title: "egressbpf on host1: test", Text: "Line 1\nLine 2: <a> \\x3c\n"}

func send(t *testing.T, url string) error {
	t.Helper()
	target, err := notify.Parse(url)
	check(t, err)
	return notify.Send(t.Context(), target, message)
}

// request is what a server got.
type request struct {
	host, path, title, auth string
	body                    string
}

// web is a server for all HTTP services. status is what it answers.
type web struct {
	status   int
	answer   string
	requests chan request
}

func newWeb() *web {
	return &web{status: http.StatusOK, answer: "{}", requests: make(chan request, 10)}
}

func (w *web) ServeHTTP(out http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	w.requests <- request{r.Host, r.URL.Path, r.Header.Get("Title"), r.Header.Get("Authorization"), string(body)}
	out.WriteHeader(w.status)
	_, _ = io.WriteString(out, w.answer)
}

// The services that run at the user's own place.
func TestSendToOwn(t *testing.T) {
	w := newWeb()
	server := httptest.NewServer(w)
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")

	check(t, send(t, "generic+http://"+host+"/hooks/"+secret+"?template=json&@Authorization=Bearer+"+secret))
	got := <-w.requests
	var fields map[string]string
	check(t, json.Unmarshal([]byte(got.body), &fields))
	if got.path != "/hooks/"+secret || got.auth != "Bearer "+secret || fields["title"] != message.Title || fields["message"] != message.Text {
		t.Errorf("generic: %+v", got)
	}
	check(t, send(t, "ntfy://user:"+secret+"@"+host+"/topic?scheme=http"))
	if got := <-w.requests; got.path != "/topic" || got.title != message.Title || got.body != message.Text || got.auth == "" {
		t.Errorf("ntfy: %+v", got)
	}
	check(t, send(t, "ntfy://"+host+"/topic?scheme=http&title=Mine"))
	if got := <-w.requests; got.title != "Mine" {
		t.Errorf("ntfy with a title of its own: %+v", got)
	}

	w.status, w.answer = http.StatusForbidden, `{"code":40301,"http":403,"error":"forbidden for `+secret+`"}`
	for _, url := range []string{"ntfy://user:" + secret + "@" + host + "/topic?scheme=http", "generic+http://" + host + "/" + secret} {
		err := send(t, url)
		<-w.requests
		if err == nil || !strings.Contains(strings.ToLower(err.Error()), "forbidden") || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", url, err)
		}
	}
	server.Close()
	for _, url := range []string{"ntfy://user:" + secret + "@" + host + "/topic?scheme=http", "generic+http://" + host + "/" + secret} {
		err := send(t, url)
		if err == nil || !strings.Contains(err.Error(), "connection refused") || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", url, err)
		}
	}
}

// The services whose host is fixed, through a proxy that leads to this server instead.
func TestSendToOthers(t *testing.T) {
	w := newWeb()
	server := httptest.NewUnstartedServer(w)
	server.TLS = &tls.Config{}
	server.StartTLS()
	defer server.Close()
	proxy := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		to, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			out.WriteHeader(http.StatusBadGateway)
			return
		}
		conn, buffered, err := http.NewResponseController(out).Hijack()
		if err != nil {
			return
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { _, _ = io.Copy(to, buffered); to.Close() }()
		_, _ = io.Copy(conn, to)
		conn.Close()
	}))
	defer proxy.Close()
	t.Setenv("HTTPS_PROXY", proxy.URL)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	check(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600))

	// The certificate is for example.com, so nobody else's is trusted: the secrets do not
	// leave.
	t.Setenv("SSL_CERT_FILE", ca)
	for _, url := range []string{slackURL, telegramURL} {
		if err := send(t, url); err == nil || !strings.Contains(err.Error(), "certificate") || strings.Contains(err.Error(), secret) {
			t.Errorf("%s with a wrong certificate: %v", url, err)
		}
	}
	cert := certificate(t, ca, "hooks.slack.com", "api.telegram.org")
	server.TLS.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{Certificates: []tls.Certificate{cert}}, nil
	}

	w.answer = "ok"
	check(t, send(t, slackURL))
	got := <-w.requests
	var slack struct {
		Text        string
		Attachments []struct{ Text string }
	}
	check(t, json.Unmarshal([]byte(got.body), &slack))
	if got.host != "hooks.slack.com" || got.path != "/services/T00000000/B00000000/"+secret || slack.Text != message.Title || len(slack.Attachments) != 2 {
		t.Errorf("slack: %+v", got)
	}

	w.answer = `{"ok":true,"result":{}}`
	check(t, send(t, telegramURL))
	got = <-w.requests
	var telegram struct {
		Text, Parse_mode string
		No_preview       bool `json:"disable_web_page_preview"`
	}
	check(t, json.Unmarshal([]byte(got.body), &telegram))
	const want = "<b>egressbpf</b>\n<pre>Line 1\nLine 2: &lt;a&gt; \\x3c\n</pre>"
	if got.host != "api.telegram.org" || telegram.Text != want || telegram.Parse_mode != "HTML" || !telegram.No_preview {
		t.Errorf("telegram: %+v", got)
	}

	w.status, w.answer = http.StatusBadGateway, "<html>"
	for _, url := range []string{slackURL, telegramURL} {
		err := send(t, url)
		<-w.requests
		if err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", url, err)
		}
	}
	server.Close()
	for _, url := range []string{slackURL, telegramURL} {
		if err := send(t, url); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%s cannot be reached: %v", url, err)
		}
	}
}

// mail takes one message, or refuses the password.
func mail(t *testing.T, conn net.Conn, accept bool) (got []string) {
	defer conn.Close()
	c := textproto.NewConn(conn)
	say := func(line string) { check(t, c.PrintfLine("%s", line)) }
	say("220 mail.example")
	for {
		line, err := c.ReadLine()
		if err != nil {
			return got
		}
		got = append(got, line)
		switch verb, _, _ := strings.Cut(strings.ToUpper(line), " "); verb {
		case "EHLO":
			say("250-mail.example")
			say("250 AUTH PLAIN")
		case "AUTH":
			if !accept {
				say("535 no: user " + secret)
				continue
			}
			say("235 welcome")
		case "DATA":
			say("354 go on")
			lines, err := c.ReadDotLines()
			check(t, err)
			got = append(got, lines...)
			say("250 taken")
		case "QUIT":
			say("221 bye")
			return got
		default:
			say("250 ok")
		}
	}
}

// A server that leads elsewhere gets nothing sent there, and the message does not count as sent.
func TestSendRedirected(t *testing.T) {
	elsewhere := newWeb()
	other := httptest.NewServer(elsewhere)
	defer other.Close()
	for _, status := range []int{301, 302, 303, 307, 308} {
		server := httptest.NewServer(http.RedirectHandler(other.URL+"/latest/meta-data", status))
		host := strings.TrimPrefix(server.URL, "http://")
		for _, url := range []string{"generic+http://" + host + "/hook?template=json&@X-Token=" + secret, "ntfy://user:" + secret + "@" + host + "/topic?scheme=http"} {
			err := send(t, url)
			if err == nil || !strings.Contains(err.Error(), "redirects are not followed") || strings.Contains(err.Error(), secret) {
				t.Errorf("%d, %s: %v", status, url, err)
			}
		}
		server.Close()
	}
	select {
	case got := <-elsewhere.requests:
		t.Errorf("elsewhere: %+v", got)
	default:
	}
}

// ntfy goes through the proxy too.
func TestSendByProxy(t *testing.T) {
	w := newWeb()
	proxy := httptest.NewServer(w)
	defer proxy.Close()
	t.Setenv("HTTP_PROXY", proxy.URL)
	for _, url := range []string{"generic+http://push.example/topic", "ntfy://push.example/topic?scheme=http"} {
		check(t, send(t, url))
		if got := <-w.requests; got.host != "push.example" || got.path != "/topic" {
			t.Errorf("%s: %+v", url, got)
		}
	}
}

// A server whose answer does not end is heard for a while.
func TestSendToEndless(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, _ *http.Request) {
		for r := make([]byte, 1<<16); ; {
			if _, err := out.Write(r); err != nil {
				return
			}
		}
	}))
	defer server.Close()
	check(t, send(t, "generic+http://"+strings.TrimPrefix(server.URL, "http://")+"/hook"))
}

func TestSendMail(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	for _, accept := range []bool{true, false} {
		lines := make(chan []string)
		go func() {
			conn, err := l.Accept()
			if err != nil {
				close(lines)
				return
			}
			lines <- mail(t, conn, accept)
		}()
		err := send(t, "smtp://user:"+secret+"@"+l.Addr().String()+"/?from=a@b.example&to=c@d.example")
		got := strings.Join(<-lines, "\n")
		if !accept {
			if err == nil || !strings.Contains(err.Error(), "535") || strings.Contains(err.Error(), secret) {
				t.Errorf("refused: %v", err)
			}
			continue
		}
		check(t, err)
		for _, want := range []string{"MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>", "Subject: " + message.Title, "\n\nLine 1\nLine 2: <a> \\x3c"} {
			if !strings.Contains(got, want) {
				t.Errorf("%q is missing in\n%s", want, got)
			}
		}
	}
}

// A target that takes the connection and says nothing is given up, and so is the process.
func TestSendToSilence(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	target, err := notify.Parse("smtp://" + l.Addr().String() + "/?from=a@b.example&to=c@d.example")
	check(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() { result <- notify.Send(ctx, target, message) }()
	conn, err := l.Accept()
	check(t, err)
	defer conn.Close()
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	// The process has ended, and its connection with it.
	check(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	if _, err := bufio.NewReader(conn).ReadByte(); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the process still holds its connection")
	}
}
