package lab

import (
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// Serve makes the agent accept connections to a port, read each to its end, and answer with
// what it received: see Receipt. If relay is valid, the agent sends what it received there,
// and passes on the answer from there.
func (a *Agent) Serve(port uint16, relay netip.AddrPort) {
	a.t.Helper()
	a.call("Serve", Service{port, relay}, &Result{})
}

// Service is the argument of Remote.Serve.
type Service struct {
	Port  uint16
	Relay netip.AddrPort
}

// Serve is Agent.Serve.
func (*Remote) Serve(s Service, _ *Result) error {
	l, err := net.Listen("tcp", fmt.Sprintf("[::]:%d", s.Port))
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if s.Relay.IsValid() {
					relay(c, s.Relay)
					return
				}
				sum := crc32.NewIEEE()
				if size, err := io.Copy(sum, c); err == nil {
					fmt.Fprint(c, Receipt{size, sum.Sum32()})
				}
			}()
		}
	}()
	return nil
}

// relay passes on the data, and then the answer.
func relay(from net.Conn, to netip.AddrPort) {
	next, err := net.DialTimeout("tcp", to.String(), patience)
	if err != nil {
		return
	}
	defer next.Close()
	if err := next.SetDeadline(time.Now().Add(patience)); err != nil {
		return
	}
	if _, err := io.Copy(next, from); err != nil {
		return
	}
	if err := next.(*net.TCPConn).CloseWrite(); err != nil {
		return
	}
	_, _ = io.Copy(from, next)
}

// Transfer does what Agent.Transfer does, from the namespace instead of a container.
func (n *Netns) Transfer(t testing.TB, to netip.AddrPort, bytes int) (sent Receipt, received string) {
	t.Helper()
	var r Transferred
	var err error
	n.Do(func() { err = new(Remote).Transfer(Stream{to, bytes}, &r) })
	if err != nil {
		t.Errorf("transfer to %s: %v", to, err)
	}
	return r.Sent, r.Received
}
