// Package web serves metrics over HTTP.
package web

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"time"

	toolkit "github.com/prometheus/exporter-toolkit/web"
	"go.yaml.in/yaml/v3"
	"golang.org/x/net/netutil"
)

// UsageError means that an address or a web config file is wrong.
type UsageError struct{ error }

func (e UsageError) Unwrap() error { return e.error }

// What clients can take of the process that serves them.
const (
	maxConnections = 32
	maxScrapes     = 2 // at the same time
	maxHeader      = 16 << 10
	writePatience  = 30 * time.Second
	readPatience   = 5 * time.Second
	idlePatience   = 2 * time.Minute
	stopPatience   = time.Second
)

// Server serves metrics at one address.
type Server struct {
	listener net.Listener
	server   *http.Server
	config   string
	log      *slog.Logger
}

// Open opens a Server's address. config is a file in the format of Prometheus's
// exporter-toolkit, with TLS and users; empty for neither. Nothing is served before Run, which
// closes the Server. The error is a UsageError if the address or the file is wrong.
func Open(address, config string, metrics Metrics, log *slog.Logger) (*Server, error) {
	at, err := parse(address)
	if err != nil {
		return nil, err
	}
	if err := toolkit.Validate(config); err != nil {
		return nil, UsageError{fmt.Errorf("web config file %s: %w", config, err)}
	}
	if open, err := openTo(at, config); err != nil {
		return nil, err
	} else if open != "" {
		log.Warn("anyone who reaches the address can see the metrics, or the passwords: there is no "+open, "address", at)
	}
	listener, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", serve(metrics))
	return &Server{
		listener: netutil.LimitListener(listener, maxConnections),
		config:   config,
		log:      log,
		server: &http.Server{
			Handler:           mux,
			ReadHeaderTimeout: readPatience,
			ReadTimeout:       readPatience,
			WriteTimeout:      writePatience,
			IdleTimeout:       idlePatience,
			MaxHeaderBytes:    maxHeader,
			// Clients can make it say something for each connection.
			ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		},
	}, nil
}

// Addr is the address that is served.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopPatience)
		defer cancel()
		if s.server.Shutdown(ctx) != nil {
			s.server.Close()
		}
	})
	defer s.listener.Close()
	err := toolkit.Serve(s.listener, s.server, &toolkit.FlagConfig{WebConfigFile: &s.config}, s.log)
	if stop() { // nobody has asked for the end
		s.log.Error("metrics are not served any more", "err", err)
		s.server.Close()
		return
	}
	<-stopped
}

// Metrics writes metrics in Prometheus's text format.
type Metrics func(io.Writer) error

// serve answers with metrics. Some clients at a time get an answer, since each costs a reading.
func serve(metrics Metrics) http.Handler {
	scrapes := make(chan struct{}, maxScrapes)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case scrapes <- struct{}{}:
			defer func() { <-scrapes }()
		default:
			http.Error(w, "others are being answered", http.StatusServiceUnavailable)
			return
		}
		// Browsers are not to take it for anything but text.
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		// What is written says why there are no numbers.
		_ = metrics(w)
	})
}

// parse reads an address: ADDR:PORT, or a port alone for this machine only.
func parse(s string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = "", s
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err == nil {
		if host == "" || host == "localhost" {
			host = "127.0.0.1"
		}
		var addr netip.Addr
		if addr, err = netip.ParseAddr(host); err == nil {
			return netip.AddrPortFrom(addr, uint16(number)), nil
		}
	}
	return netip.AddrPort{}, UsageError{fmt.Errorf("%q: want ADDR:PORT, or PORT for this machine alone: 9750, 192.0.2.1:9750, [::]:9750", s)}
}

// openTo says what keeps others from reading what is served at an address is missing; empty if
// nothing, or if there are no others.
func openTo(at netip.AddrPort, config string) (missing string, err error) {
	if at.Addr().Unmap().IsLoopback() {
		return "", nil
	}
	if config == "" {
		return "TLS and no authentication", nil
	}
	text, err := os.ReadFile(config)
	if err != nil {
		return "", err
	}
	var c struct {
		TLS   map[string]any `yaml:"tls_server_config"`
		Users map[string]any `yaml:"basic_auth_users"`
	}
	if err := yaml.Unmarshal(text, &c); err != nil {
		return "", UsageError{fmt.Errorf("web config file %s: %w", config, err)}
	}
	switch {
	case len(c.TLS) == 0 && len(c.Users) == 0:
		return "TLS and no authentication", nil
	case len(c.TLS) == 0:
		return "TLS", nil
	case len(c.Users) == 0 && c.TLS["client_auth_type"] == nil:
		return "authentication", nil
	}
	return "", nil
}
