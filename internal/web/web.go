// Package web serves metrics and a page over HTTP.
//
// The service opens the address, and starts a process without privileges that speaks HTTP and
// TLS there (Serve). That process knows nothing: it asks the service, which answers some
// questions at a time and waits for nobody.
package web

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// UsageError means that an address or a web config file is wrong.
type UsageError struct{ error }

func (e UsageError) Unwrap() error { return e.error }

// Server serves at one address.
type Server struct {
	listener *net.TCPListener
	at       netip.AddrPort
	config   string
	settings settings
	answers  *answers
	log      *slog.Logger
}

// Open opens a Server's address. config is a file in the format of Prometheus's
// exporter-toolkit, with TLS and users; empty for neither. Nothing is served before Run, which
// closes the Server. The error is a UsageError if the address or the file is wrong.
func Open(address, config string, source Source, log *slog.Logger) (*Server, error) {
	at, err := parse(address)
	if err != nil {
		return nil, err
	}
	settings, err := readSettings(config)
	if err != nil {
		return nil, err
	}
	if open := settings.missing(); open != "" && !at.Addr().Unmap().IsLoopback() {
		log.Warn("anyone who reaches the address can see the metrics and the page, or the passwords: there is no "+open, "address", at)
	}
	listener, err := listen(at, false)
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		// The service starts before the network does.
		if listener, err = listen(at, true); err == nil {
			log.Warn("no device has the address: metrics and the page are served once one has it", "address", at)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	return &Server{listener: listener, at: at, config: config, settings: settings, answers: newAnswers(source), log: log}, nil
}

// listen opens an address; if free is set, also one that no device has.
func listen(at netip.AddrPort, free bool) (*net.TCPListener, error) {
	var config net.ListenConfig
	if free {
		level, option := unix.SOL_IP, unix.IP_FREEBIND
		if at.Addr().Unmap().Is6() {
			level, option = unix.SOL_IPV6, unix.IPV6_FREEBIND
		}
		config.Control = func(_, _ string, conn syscall.RawConn) error {
			var set error
			err := conn.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), level, option, 1) })
			return errors.Join(err, set)
		}
	}
	listener, err := config.Listen(context.Background(), "tcp", at.String())
	if err != nil {
		return nil, err
	}
	return listener.(*net.TCPListener), nil
}

// Addr is the address that is served.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// When a process is started again, and the web config file is looked at.
const (
	soonest     = time.Second
	latest      = time.Minute
	lookAgain   = 5 * time.Second
	endPatience = 2*stopPatience + time.Second
)

// Run serves until ctx ends. If the process that serves ends, Run starts it again, soon at first.
func (s *Server) Run(ctx context.Context) {
	defer s.listener.Close()
	wait := soonest
	for ctx.Err() == nil {
		began := time.Now()
		err := s.serve(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil { // for another web config file
			wait = soonest
			continue
		}
		if time.Since(began) > latest {
			wait = soonest
		}
		s.log.Error("the process that serves metrics and the page has ended; the filter does not need it", "err", err, "again_in", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		wait = min(2*wait, latest)
	}
}

// serve serves by one process until that ends, ctx ends, or the web config file is another.
func (s *Server) serve(ctx context.Context) error {
	p, err := s.start()
	if err != nil {
		return err
	}
	asked := make(chan error, 1)
	go func() { asked <- s.answers.serve(ctx, p.asked) }()
	look := time.NewTicker(lookAgain)
	defer look.Stop()
	var complained string
	for {
		select {
		case <-ctx.Done():
			p.end()
			return nil
		case <-p.ended:
			p.asked.Close()
			return p.why
		case err := <-asked:
			if err == nil {
				asked = nil // it is about to end
				continue
			}
			p.kill()
			return err
		case <-look.C:
			now, err := readSettings(s.config)
			if err != nil {
				if err.Error() != complained {
					s.log.Error("the web config file stays as it was", "err", err)
					complained = err.Error()
				}
				continue
			}
			complained = ""
			if !now.equal(s.settings) {
				s.log.Info("the web config file has changed")
				s.settings = now
				p.end()
				return nil
			}
		}
	}
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
