package notify

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/nicholas-fedor/shoutrrr/pkg/services/push/ntfy"
	"github.com/nicholas-fedor/shoutrrr/pkg/types"
	"golang.org/x/sys/unix"
)

// Message is what a target is told. Both texts are ASCII and have nothing in them that a
// service takes for markup; Text has several lines.
type Message struct{ Title, Text string }

// SendArg, as the only argument of this program, makes it the process that sends: see [Child].
const SendArg = "notify-send"

// Timeout is how long a target may take.
const Timeout = 30 * time.Second

// order is what the process that sends reads from its standard input: arguments and the
// environment of a process can be seen by others.
type order struct {
	URL     string
	Message Message
}

// Send tells a target. A process of its own does it, without capabilities, so that a target
// that hangs can be given up, and that whoever answers finds nothing but the message. The
// error has no secrets.
func Send(ctx context.Context, t Target, m Message) error {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	in, err := json.Marshal(order{t.url, m})
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", SendArg)
	cmd.Args[0] = "egressbpf"
	cmd.Env = environment()
	cmd.Stdin = bytes.NewReader(in)
	var out said
	cmd.Stdout = &out
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("no answer within %v", Timeout)
	case ctx.Err() != nil:
		return ctx.Err()
	case len(out) > 0:
		return errors.New(scrub(t.url, string(out)))
	case err != nil:
		return fmt.Errorf("the process that sends: %s", scrub(t.url, err.Error()))
	}
	return nil
}

// said keeps the beginning of what the process that sends says, which is a line. Whoever has taken
// that process over may say more.
type said []byte

func (s *said) Write(text []byte) (int, error) {
	const most = 4096
	*s = append(*s, text[:min(len(text), most-len(*s))]...)
	return len(text), nil
}

// environment returns what Go's HTTP and TLS code reads.
func environment() (env []string) {
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		for _, name := range []string{name, strings.ToLower(name)} {
			if value, ok := os.LookupEnv(name); ok {
				env = append(env, name+"="+value)
			}
		}
	}
	return env
}

// Child is the process that sends. It reads an order, prints what went wrong, and returns the
// exit code. It changes this process for good.
func Child(stdin io.Reader, stdout io.Writer) int {
	// A server can answer as much as it likes; and a core would hold the secrets.
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	_ = unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: 512 << 20, Max: 512 << 20})
	time.AfterFunc(Timeout+5*time.Second, func() { os.Exit(1) })
	var o order
	err := json.NewDecoder(stdin).Decode(&o)
	if err == nil {
		err = deliver(o)
	}
	if err != nil {
		fmt.Fprint(stdout, scrub(o.URL, err.Error()))
		return 1
	}
	return 0
}

func deliver(o order) error {
	service, err := open(o.URL)
	if err != nil {
		return err
	}
	web := &watched{}
	if n, ok := service.(*ntfy.Service); ok {
		// It has a transport of its own, without a proxy.
		own := http.DefaultTransport.(*http.Transport).Clone()
		own.TLSClientConfig = &tls.Config{InsecureSkipVerify: n.Config.DisableTLSVerification}
		web.RoundTripper = own
		n.SetHTTPClient(&http.Client{Transport: web})
	} else {
		web.RoundTripper = http.DefaultTransport
		http.DefaultTransport = web
	}
	text := o.Message.Text
	params := types.Params{}
	query := Target{o.URL}.query()
	if !query["title"] && !query["subject"] {
		params["title"] = o.Message.Title
	}
	if service.GetID() == "telegram" {
		// Inside of <pre>, Telegram makes no links of names and commands.
		params["parsemode"], params["preview"] = "HTML", "No"
		text = "<pre>" + html.EscapeString(text) + "</pre>"
		if !query["title"] {
			params["title"] = "egressbpf"
		}
	}
	if err := service.Send(text, &params); err != nil {
		return err
	}
	return web.err
}

// query returns which options the URL has.
func (t Target) query() map[string]bool {
	has := map[string]bool{}
	if u, _, err := split(t.url); err == nil {
		for key := range u.Query() {
			has[strings.ToLower(key)] = true
		}
	}
	return has
}

// watched notes failed requests, since the library takes some of them for a success: it drops
// the error if Telegram cannot be reached. It follows no redirects: the message would be lost on
// the way, or go to whatever this host reaches, such as a metadata service, together with
// headers that hold secrets.
type watched struct {
	http.RoundTripper
	err error
}

// maxAnswer is how much of an answer the library gets to read, in bytes.
const maxAnswer = 1 << 20

func (w *watched) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := w.RoundTripper.RoundTrip(r)
	switch {
	case err != nil:
		w.err = err
		return nil, err
	case res.StatusCode >= http.StatusMultipleChoices && res.StatusCode < http.StatusBadRequest:
		res.Body.Close()
		w.err = errors.New(res.Status + ": redirects are not followed: give the URL that this one leads to")
		return nil, w.err
	case res.StatusCode >= http.StatusBadRequest:
		w.err = errors.New(res.Status)
	}
	res.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(res.Body, maxAnswer), res.Body}
	return res, nil
}
