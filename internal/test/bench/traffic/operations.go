package traffic

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
)

// do does an operation n times.
type do func(n int) error

// origin is where an operation's sockets are made.
type origin int

const (
	service  origin = iota // in a cgroup that is policed and no container
	confined               // in the container's cgroup
)

// Operation is something that is measured.
type Operation struct {
	Name string
	// CPUs is how many CPUs do it at once.
	CPUs int
	// from is where the operation is done.
	from origin
	// Refused is whether filters are to stop it.
	Refused bool
	prepare func(*worker) (do, error)
}

// The names of operations, as they are recorded.
const (
	UDP4, UDP6             = "udp4 from a container", "udp6 from a container"
	RoundTrip4, RoundTrip6 = "round trip tcp4", "round trip tcp6"
	Connect4, Connect6     = "connect and close tcp4", "connect and close tcp6"
	Bulk4                  = "bulk tcp4"
	UDPBeside              = "udp4 from a service beside"
	RoundTripBeside        = "round trip tcp4 from a service beside"
	UDPInto                = "udp4 into the host from outside"
	RoundTripInto          = "round trip tcp4 into the host from outside"
	RefusedConnect         = "refused connect"
	RefusedSocket          = "refused connect, with its socket"
	RefusedMail            = "refused mail connect"
	RefusedSYN             = "refused mail syn"
)

// Operations returns all operations.
func Operations() []Operation {
	all := []Operation{
		{Name: UDP4, from: confined, prepare: udpTo(lab.Sink4)},
		{Name: UDP6, from: confined, prepare: udpTo(lab.Sink6)},
		{Name: RoundTrip4, from: confined, prepare: roundTripTo(lab.Server4)},
		{Name: RoundTrip6, from: confined, prepare: roundTripTo(lab.Server6)},
		{Name: Bulk4, from: confined, prepare: bulk},
		{Name: UDPBeside, from: service, prepare: udpBeside},
		{Name: RoundTripBeside, from: service, prepare: roundTripBeside},
		{Name: UDPInto, from: service, prepare: udpInto},
		{Name: RoundTripInto, from: service, prepare: roundTripInto},
		// These fill the table of connections, so they come last.
		{Name: Connect4, from: confined, prepare: connectTo(lab.Server4)},
		{Name: Connect6, from: confined, prepare: connectTo(lab.Server6)},
		{Name: RefusedSYN, from: confined, Refused: true, prepare: rawSYNs},
		{Name: RefusedConnect, from: confined, Refused: true, prepare: repeated(lab.Metadata4, 80)},
		{Name: RefusedSocket, from: confined, Refused: true, prepare: attempts(lab.Metadata4, 80)},
		{Name: RefusedMail, from: confined, Refused: true, prepare: attempts(lab.Server4, 25)},
	}
	for i := range all {
		all[i].CPUs = 1
	}
	for _, op := range all {
		switch op.Name {
		case UDP4, RefusedConnect, RefusedSYN:
			op.CPUs = 2
			all = append(all, op)
		}
	}
	return all
}

const (
	echoPort   = 7    // of the server
	hostPort   = 9001 // of the service
	discarding = 9
)

func udpTo(a netip.Addr) func(*worker) (do, error) {
	return func(w *worker) (do, error) {
		fd, err := datagrams(w.container, a, discarding)
		return sendDatagrams(fd), err
	}
}

func udpBeside(w *worker) (do, error) {
	fd, err := datagrams(w.host, lab.Sink4, discarding)
	return sendDatagrams(fd), err
}

// udpInto sends to a service that does not read: its buffer is full, and what comes is
// discarded there.
func udpInto(w *worker) (do, error) {
	fd, err := socketIn(w.host, unix.AF_INET, unix.SOCK_DGRAM)
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 0); err != nil {
		return nil, err
	}
	if err := bind(fd, lab.Host4, hostPort); err != nil {
		return nil, err
	}
	return sendDatagrams(w.outside.udp), connect(w.outside.udp, newAddress(lab.Host4, hostPort))
}

func sendDatagrams(fd int) do {
	data := make([]byte, 36)
	return func(n int) error {
		for range n {
			if err := send(fd, data); err != nil {
				return err
			}
		}
		return nil
	}
}

func roundTripTo(a netip.Addr) func(*worker) (do, error) {
	return func(w *worker) (do, error) {
		p, err := connection(w.container, w.listeners[a], a, echoPort)
		return p.roundTrips(), err
	}
}

func roundTripBeside(w *worker) (do, error) {
	p, err := connection(w.host, w.listeners[lab.Server4], lab.Server4, echoPort)
	return p.roundTrips(), err
}

func roundTripInto(w *worker) (do, error) {
	fd, err := listener(w.host, lab.Host4, hostPort)
	if err != nil {
		return nil, err
	}
	p, err := connectPair(w.outside.tcp, fd, lab.Host4, hostPort)
	return p.roundTrips(), err
}

func (p pair) roundTrips() do {
	data := make([]byte, 64)
	return func(n int) error {
		for range n {
			if err := send(p.client, data); err != nil {
				return err
			}
			if err := receive(p.server, data, len(data)); err != nil {
				return err
			}
			if err := send(p.server, data); err != nil {
				return err
			}
			if err := receive(p.client, data, len(data)); err != nil {
				return err
			}
		}
		return nil
	}
}

// bulk sends 64 KiB at a time.
func bulk(w *worker) (do, error) {
	p, err := connection(w.container, w.listeners[lab.Server4], lab.Server4, echoPort)
	if err != nil {
		return nil, err
	}
	data := make([]byte, 64<<10)
	return func(n int) error {
		for range n {
			if err := send(p.client, data); err != nil {
				return err
			}
			if err := receive(p.server, data, len(data)); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

func connectTo(a netip.Addr) func(*worker) (do, error) {
	return func(w *worker) (do, error) {
		to, server := newAddress(a, echoPort), w.listeners[a]
		return func(n int) error {
			for range n {
				if err := connectAndClose(family(a), to, server); err != nil {
					return err
				}
			}
			return nil
		}, nil
	}
}

func connectAndClose(family int, to address, server int) error {
	client, err := socket(family, unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	if err := connect(client, to); err != nil {
		return err
	}
	accepted, err := accept(server)
	if err != nil {
		return err
	}
	if err := closeSocket(client); err != nil {
		return err
	}
	return closeSocket(accepted)
}

// rawSYNs sends SYNs of its own making, each with another port and sequence number.
func rawSYNs(w *worker) (do, error) {
	s, err := NewSYNs(w.container, lab.Container4, lab.Server4, 25, uint16(len(w.ready[RefusedSYN])))
	if err != nil {
		return nil, err
	}
	return func(n int) error {
		for range n {
			if err := s.Send(); err != nil && !errors.Is(err, unix.EPERM) {
				return err
			}
		}
		return nil
	}, nil
}

// repeated begins to connect one socket to an address, and gives up at once, again and again.
// It does not wait: of the ICMP errors of REJECT, the kernel sends a few in a second.
func repeated(a netip.Addr, port uint16) func(*worker) (do, error) {
	return func(w *worker) (do, error) {
		to, none := newAddress(a, port), make(address, 16) // of AF_UNSPEC
		fd, err := socketIn(w.container, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK)
		return func(n int) error {
			for range n {
				if err := connect(fd, to); !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.ECONNREFUSED) {
					return fmt.Errorf("connect to %s: got %v, want it refused", a, err)
				}
				if err := connect(fd, none); err != nil {
					return fmt.Errorf("disconnect: %w", err)
				}
			}
			return nil
		}, err
	}
}

// attempts begins to connect to an address, and gives up at once. Nobody listens there: what
// no filter stops is answered with a reset.
func attempts(a netip.Addr, port uint16) func(*worker) (do, error) {
	return func(w *worker) (do, error) {
		to := newAddress(a, port)
		return func(n int) error {
			for range n {
				fd, err := socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK)
				if err != nil {
					return err
				}
				err = connect(fd, to)
				if err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.ECONNREFUSED) {
					return err
				}
				if err := closeSocket(fd); err != nil {
					return err
				}
			}
			return nil
		}, nil
	}
}
