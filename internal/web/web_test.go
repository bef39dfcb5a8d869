package web

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == ServeArg {
		if err := Serve(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	switch {
	case len(os.Args) > 1 && os.Args[1] == argProbe:
		probe()
	case len(os.Args) > 1 && os.Args[1] == argService:
		s, err := Open("0", "", source(Page{}, nil), slog.Default())
		if err != nil {
			panic(err)
		}
		fmt.Println(s.Addr())
		s.Run(context.Background())
	default:
		os.Exit(m.Run())
	}
}

// source has one metric, and what it is given.
func source(page Page, recent *Recent) Source {
	return Source{
		Metrics: func(w io.Writer) error {
			_, err := io.WriteString(w, "# TYPE test_answer gauge\ntest_answer 42\n")
			return err
		},
		Page:   func() Page { return page },
		Recent: recent,
	}
}

// start serves until the test ends or stop is called.
func start(t *testing.T, address, config string, from Source) (s *Server, log *testenv.Log, stop func()) {
	t.Helper()
	log = new(testenv.Log)
	s, err := Open(address, config, from, slog.New(slog.NewTextHandler(log, nil)))
	check(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(stop)
	return s, log, stop
}

func get(t *testing.T, client *http.Client, url string) (status int, body string) {
	t.Helper()
	resp, err := client.Get(url)
	check(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	check(t, err)
	if resp.StatusCode == http.StatusOK && resp.Header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("headers %v", resp.Header)
	}
	return resp.StatusCode, string(text)
}

func TestParse(t *testing.T) {
	for in, want := range map[string]string{
		"9750": "127.0.0.1:9750", ":9750": "127.0.0.1:9750", "localhost:1": "127.0.0.1:1", "192.0.2.1:9750": "192.0.2.1:9750",
		"[::]:9750": "[::]:9750", "0.0.0.0:0": "0.0.0.0:0", "[::1]:80": "[::1]:80",
		"": "", "host:80": "", "1.2.3.4": "", "::1:80:": "", "65536": "", "-1": "", "1.2.3.4:http": "", "unix:/run/x": "", "[::1]": "",
	} {
		got, err := parse(in)
		if usage := (UsageError{}); (err != nil) != (want == "") || err != nil && !errors.As(err, &usage) {
			t.Errorf("%q: %v, %v", in, got, err)
		}
		if err == nil && got.String() != want {
			t.Errorf("%q: %v, want %s", in, got, want)
		}
	}
}

func TestServe(t *testing.T) {
	s, log, stop := start(t, "0", "", source(Page{}, nil))
	client := &http.Client{}
	url := "http://" + s.Addr().String()
	if code, body := get(t, client, url+"/metrics"); code != 200 || !strings.Contains(body, "\ntest_answer 42\n") {
		t.Errorf("got %d, %s", code, body)
	}
	for _, path := range []string{"/metrics/x", "/debug/pprof/", "/page/page.html", "/../etc/passwd"} {
		if code, _ := get(t, client, url+path); code != 404 {
			t.Errorf("%s: %d", path, code)
		}
	}
	if resp, err := client.Post(url+"/metrics", "text/plain", strings.NewReader("x")); err != nil || resp.StatusCode != 405 {
		t.Errorf("POST: %v, %v", resp, err)
	}
	if strings.Contains(log.String(), "WARN") {
		t.Errorf("on loopback: %s", log)
	}

	if _, err := Open(s.Addr().String(), "", source(Page{}, nil), slog.New(slog.NewTextHandler(log, nil))); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second one: %v", err)
	}
	client.CloseIdleConnections()

	// A client that sends nothing keeps nobody waiting, nor the end.
	silent, err := net.Dial("tcp", s.Addr().String())
	check(t, err)
	defer silent.Close()
	if code, _ := get(t, client, url+"/metrics"); code != 200 {
		t.Errorf("beside a silent client: %d", code)
	}
	before := time.Now()
	stop()
	if took := time.Since(before); took > 10*time.Second {
		t.Errorf("stopping took %v", took)
	}
	if conn, err := net.Dial("tcp", s.Addr().String()); err == nil {
		conn.Close()
		t.Error("it still listens")
	}
	if strings.Contains(log.String(), "has ended") || strings.Contains(log.String(), "says") {
		t.Errorf("an end that was asked for: %s", log)
	}
}

// TestNoDevice opens addresses that no device has, as before the network is up.
func TestNoDevice(t *testing.T) {
	for _, address := range []string{"192.0.2.1:0", "[2001:db8::1]:0"} {
		s, log, stop := start(t, address, "", source(Page{}, nil))
		if !strings.Contains(log.String(), "no device has the address") {
			t.Errorf("%v: %s", s.Addr(), log)
		}
		served(t, os.Getpid())
		stop()
	}
}

// TestOpenToAll checks who is warned of what.
func TestOpenToAll(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		check(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	check(t, err)
	users := fmt.Sprintf("basic_auth_users:\n  prometheus: %s\n", hash)
	certificate(t, dir)
	withTLS := "tls_server_config: {cert_file: cert.pem, key_file: key.pem}\n"

	clients := func(auth string) string {
		return "tls_server_config: {cert_file: cert.pem, key_file: key.pem, client_auth_type: " + auth + "}\n"
	}

	for what, tt := range map[string]struct{ config, want string }{
		"nothing": {"", "no TLS and no authentication"},
		"users":   {write("users", users), "no TLS\""},
		"tls":     {write("tls", withTLS), "no authentication"},
		"both":    {write("both", withTLS+users), ""},
		"empty":   {write("empty", ""), "no TLS and no authentication"},
		// Keys that turn nothing on.
		"version": {write("version", "tls_server_config: {min_version: TLS13}\n"), "no TLS and no authentication"},
		// Certificates that nobody has to have, or that anybody can make.
		"no certificate":  {write("no", clients("NoClientCert")), "no authentication"},
		"if it wants to":  {write("may", clients("RequestClientCert")), "no authentication"},
		"if it has one":   {write("if", clients("VerifyClientCertIfGiven, client_ca_file: cert.pem")), "no authentication"},
		"any certificate": {write("any", clients("RequireAnyClientCert")), "no authentication"},
		"a certificate":   {write("certificate", clients("RequireAndVerifyClientCert, client_ca_file: cert.pem")), ""},
		"a user's number": {write("number", fmt.Sprintf("basic_auth_users: {1: %s}\n", hash)), "no TLS\""},
	} {
		s, log, stop := start(t, "0.0.0.0:0", tt.config, source(Page{}, nil))
		if warned := strings.Contains(log.String(), "WARN"); warned != (tt.want != "") || !strings.Contains(log.String(), tt.want) {
			t.Errorf("%s: %s", what, log)
		}
		if what == "both" {
			_, port, _ := net.SplitHostPort(s.Addr().String())
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
			if code, _ := get(t, client, "https://127.0.0.1:"+port+"/metrics"); code != 401 {
				t.Errorf("without a password: %d", code)
			}
			if code, body := get(t, client, "https://prometheus:secret@127.0.0.1:"+port+"/metrics"); code != 200 || !strings.Contains(body, "test_answer 42") {
				t.Errorf("with a password: %d, %s", code, body)
			}
			client.CloseIdleConnections()
		}
		stop()
	}

	for what, text := range map[string]string{
		"an unknown key": "nonsense: yes\n", "YAML": "[", "a password": "basic_auth_users: {a: secret}\n",
		"a missing file": "tls_server_config: {cert_file: missing, key_file: missing}\n",
	} {
		_, err := Open("0", write("bad", text), source(Page{}, nil), slog.New(slog.DiscardHandler))
		if usage := (UsageError{}); !errors.As(err, &usage) || !strings.Contains(err.Error(), dir+"/bad") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := Open("0", dir+"/none", source(Page{}, nil), slog.New(slog.DiscardHandler)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// certificate writes cert.pem and key.pem.
func certificate(t *testing.T, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	check(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	check(t, err)
	for name, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: cert}, "key.pem": {Type: "PRIVATE KEY", Bytes: der}} {
		check(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600))
	}
}
