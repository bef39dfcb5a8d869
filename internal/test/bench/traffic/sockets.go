package traffic

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
)

// address is a struct sockaddr.
type address []byte

func newAddress(a netip.Addr, port uint16) address {
	if a.Is4() {
		b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
		b = binary.BigEndian.AppendUint16(b, port)
		b = append(b, a.AsSlice()...)
		return append(b, make([]byte, 8)...)
	}
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	b = binary.BigEndian.AppendUint16(b, port)
	b = append(b, make([]byte, 4)...)
	b = append(b, a.AsSlice()...)
	return append(b, make([]byte, 4)...)
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// patience is how long any call may take.
const patience = 2 * time.Second

// socketIn makes a socket in a network namespace. Its cgroup is that of this process.
func socketIn(ns *lab.Netns, family, typ int) (fd int, err error) {
	err = ns.Do(func() (err error) {
		fd, err = unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return 0, err
	}
	tv := unix.NsecToTimeval(int64(patience))
	return fd, errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
}

// listener makes a server.
func listener(ns *lab.Netns, a netip.Addr, port uint16) (fd int, err error) {
	if fd, err = socketIn(ns, family(a), unix.SOCK_STREAM); err != nil {
		return 0, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return 0, err
	}
	if err := bind(fd, a, port); err != nil {
		return 0, err
	}
	return fd, unix.Listen(fd, 128)
}

func bind(fd int, a netip.Addr, port uint16) error {
	var to unix.Sockaddr = &unix.SockaddrInet4{Port: int(port), Addr: a4(a)}
	if a.Is6() {
		to = &unix.SockaddrInet6{Port: int(port), Addr: a.As16()}
	}
	return unix.Bind(fd, to)
}

func a4(a netip.Addr) (b [4]byte) {
	copy(b[:], a.AsSlice())
	return b
}

// datagrams makes a socket that sends to one address.
func datagrams(from *lab.Netns, to netip.Addr, port uint16) (fd int, err error) {
	if fd, err = socketIn(from, family(to), unix.SOCK_DGRAM); err != nil {
		return 0, err
	}
	if err := connect(fd, newAddress(to, port)); err != nil {
		return 0, fmt.Errorf("connect to %s: %w", to, err)
	}
	return fd, nil
}

// pair is a TCP connection, both ends.
type pair struct{ client, server int }

// connection connects to a server.
func connection(from *lab.Netns, server int, to netip.Addr, port uint16) (p pair, err error) {
	client, err := socketIn(from, family(to), unix.SOCK_STREAM)
	if err != nil {
		return p, err
	}
	return connectPair(client, server, to, port)
}

// connectPair connects a socket to a server.
func connectPair(client, server int, to netip.Addr, port uint16) (p pair, err error) {
	p.client = client
	if err := connect(p.client, newAddress(to, port)); err != nil {
		return p, fmt.Errorf("connect to %s: %w", to, err)
	}
	if p.server, err = accept(server); err != nil {
		return p, fmt.Errorf("accept: %w", err)
	}
	tv := unix.NsecToTimeval(int64(patience))
	return p, errors.Join(unix.SetsockoptInt(p.client, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.SetsockoptInt(p.server, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.SetsockoptTimeval(p.server, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(p.server, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv))
}
