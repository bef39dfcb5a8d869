package lab

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Listener accepts connections to a TCP port and remembers the clients.
type Listener struct {
	ns   *Netns
	port int

	mu       sync.Mutex
	changed  *sync.Cond
	accepted []netip.AddrPort
	conns    []net.Conn
	closed   bool
}

// Listen accepts connections to a TCP port at every address of the namespace. It reads each
// connection to its end and answers with what it received: see Receipt.
func (n *Netns) Listen(t testing.TB, port int) *Listener {
	t.Helper()
	var socket net.Listener
	var err error
	// This has no effect unless tcp_fastopen allows it for servers.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var optErr error
		err := c.Control(func(fd uintptr) {
			optErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 1000)
		})
		return errors.Join(err, optErr)
	}}
	n.Do(func() { socket, err = config.Listen(t.Context(), "tcp", fmt.Sprintf("[::]:%d", port)) })
	if err != nil {
		t.Fatal(err)
	}
	l := &Listener{ns: n, port: port}
	l.changed = sync.NewCond(&l.mu)
	t.Cleanup(func() {
		socket.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		l.closed = true
		for _, c := range l.conns {
			c.Close()
		}
	})
	go func() {
		for {
			c, err := socket.Accept()
			if err != nil {
				return
			}
			l.note(c)
			go func() {
				defer c.Close()
				sum := crc32.NewIEEE()
				if size, err := io.Copy(sum, c); err == nil {
					fmt.Fprint(c, Receipt{size, sum.Sum32()})
				}
			}()
		}
	}()
	return l
}

func (l *Listener) note(c net.Conn) {
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.accepted = append(l.accepted, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()))
	l.conns = append(l.conns, c)
	if l.closed {
		c.Close()
	}
	l.changed.Broadcast()
}

// Accepted returns the sources of all accepted connections from an address, including all
// that were established when it was called. Connections are accepted in order, so Accepted
// makes one more, from the namespace itself, which comes last.
func (l *Listener) Accepted(t testing.TB, from netip.Addr) (accepted []netip.AddrPort) {
	t.Helper()
	var last net.Conn
	var err error
	l.ns.Do(func() {
		last, err = net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(l.port)), patience)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer last.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	late := false
	timer := time.AfterFunc(patience, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		late = true
		l.changed.Broadcast()
	})
	defer timer.Stop()
	for !slices.Contains(l.accepted, last.LocalAddr().(*net.TCPAddr).AddrPort()) {
		if late {
			t.Fatalf("port %d accepts nothing", l.port)
		}
		l.changed.Wait()
	}
	for _, a := range l.accepted {
		if a.Addr() == from {
			accepted = append(accepted, a)
		}
	}
	return accepted
}
