package loader_test

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/kernels/facts"
	"github.com/egressbpf/egressbpf/internal/test/netns"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// TestKernel shows each defence at work, or that status says that it is missing, and writes what
// this kernel can do to stdout: internal/test/kernels compares it with what is documented.
func TestKernel(t *testing.T) {
	lockHost(t)
	ownNetwork(t)
	h := newHost(t)
	scope := "own.slice/docker-" + id + ".scope"
	h.mkdir("own.slice")
	var uname unix.Utsname
	check(t, unix.Uname(&uname))
	f := &facts.Facts{
		Release: unix.ByteSliceToString(uname.Release[:]), Arch: runtime.GOARCH, PageSize: os.Getpagesize(),
		Defences: map[string]string{}, Programs: map[string]int{},
	}
	wire := newWire(t)
	for _, dst := range []string{blockedAddress, passes} {
		if !wire.forged(dst, true) || !wire.raw(dst, true) {
			t.Fatalf("without the filter, packets to %s do not arrive", dst)
		}
	}

	began := time.Now()
	s := h.mustAttach(policy.Default(), "own.slice")
	t.Logf("attached in %v", time.Since(began))
	h.countInstructions(f, policy.Default(), s)
	h.mkdir(scope)
	testenv.Eventually(t, "the container is known", func() bool { return h.enrolled()[scope] })
	f.Defences[facts.Recognition] = "yes"
	names := &events.Names{Node: "host", Filter: h.Filter, Root: h.root}
	told, err := events.Open(h.Filter, names, 1<<16)
	check(t, err)

	// The packets of this process, in the container.
	func() {
		testenv.Enter(t, h.paths(scope)[0])
		var refusal unix.Errno
		if err := connectErrno(unix.SOCK_STREAM, blockedAddress); !errors.As(err, &refusal) || refusal != unix.ECONNREFUSED && refusal != unix.EPERM {
			t.Errorf("a refused connect() says %v", err)
		}
		for what, errno := range map[string]error{
			"connect() of UDP": connectErrno(unix.SOCK_DGRAM, blockedAddress), "connect() of IPv6": connectErrno(unix.SOCK_STREAM, "fd00:ec2::254"),
		} {
			if !errors.Is(errno, refusal) {
				t.Errorf("%s says %v, want %v", what, errno, refusal)
			}
		}
		if err := sendErrno(blockedAddress); !errors.Is(err, unix.EPERM) && !errors.Is(err, refusal) {
			t.Errorf("sendto() says %v", err)
		}
		if err := connectErrno(unix.SOCK_DGRAM, passes); err != nil {
			t.Errorf("connect() to what is not blocked says %v", err)
		}
		f.Defences[facts.Connect] = unix.ErrnoName(refusal)
		if wire.raw(blockedAddress, false) {
			t.Error("a packet of a raw socket arrives")
		}
		if !wire.raw(passes, true) {
			t.Error("a packet that is not blocked does not arrive")
		}
		containers, _ := h.counters()
		if n := containers[h.id(scope)].Counters.Dropped[bpf.EgressReasonREASON_BLOCKED]; n.Packets != 1 || n.Connects < 4 {
			t.Errorf("counted: %+v", n)
		}
		f.Defences[facts.Egress] = "yes"

		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		active := s.HasDefence(loader.SocketFamilies)
		if errors.Is(err, unix.EPERM) != active || !active && err != nil {
			t.Errorf("a packet socket: %v, and the defence is active: %v", err, active)
		}
		if active {
			f.Defences[facts.Families] = h.strategy(loader.FamiliesHook, "own.slice")
		}
		testenv.Enter(t, h.root.Path("/"))
	}()

	if record := nextRefusal(t, told); record.Hook != events.HookConnect || record.Reason != events.ReasonBlocked ||
		record.Destination == nil || record.Destination.Address != netip.MustParseAddr(blockedAddress) {
		t.Errorf("told: %+v", record)
	} else if f.Defences[facts.Events] = "without process"; record.Process != nil {
		f.Defences[facts.Events] = "with process"
		if record.Process.PID != uint32(os.Getpid()) {
			t.Errorf("told: process %+v, not %d", record.Process, os.Getpid())
		}
	}

	check(t, told.Close()) // it holds the maps

	// A packet that has passed no hook of a container.
	if s.HasDefence(loader.HostSide) {
		_, before := h.counters()
		arrived := wire.forged(blockedAddress, false)
		_, after := h.counters()
		if arrived || after.HostSide.Packets != before.HostSide.Packets+1 {
			t.Errorf("a forged packet arrives: %v, and the host side has counted %d", arrived, after.HostSide.Packets-before.HostSide.Packets)
		}
		if !wire.forged(passes, true) {
			t.Error("a forged packet that is not blocked does not arrive")
		}
		f.Defences[facts.HostSide] = "netfilter"
		if len(ingressHooks(s)) > 0 {
			f.Defences[facts.HostSide] = "tc"
		}
	}

	// The same programs with what else a policy can say, in place of those in force.
	for _, p := range otherPolicies(t) {
		check(t, h.attach(p))
		s := h.status()
		if s.Mode != p.Mode || s.Enforcing != (p.Mode == policy.Enforce) {
			t.Errorf("%s: %+v", p.Mode, s)
		}
		h.countInstructions(f, p, s)
		expected := p.Mode == policy.Audit || !s.HasDefence(loader.HostSide)
		if wire.forged(blockedAddress, expected) != expected {
			t.Errorf("%s: the host side's mode has no effect", p.Mode)
		}
	}
	o := h.objects()
	h.mustDetach()
	h.nothingLeft(o)
	if !t.Failed() {
		check(t, f.Write(os.Stdout))
	}
}

// otherPolicies are a policy with which the programs are larger than with the default, and one in
// mode audit.
func otherPolicies(t *testing.T) []policy.Policy {
	full := policy.Default()
	full.Block = rules(t, "192.0.2.0/24", "203.0.113.7:8000/udp", "2001:db8:1::/48")
	full.Allow = rules(t, "192.0.2.9:53")
	full.SMTP.Exempt = []netip.Prefix{netip.MustParsePrefix("198.51.100.9/32")}
	full.SMTP.OverLimit = policy.Reject
	full.SMTP.Ports = append(full.SMTP.Ports, 2525)
	full.HostDevices = []policy.Device{"cali*"}
	check(t, full.Validate())
	audit := policy.Default()
	audit.Mode = policy.Audit
	return []policy.Policy{full, audit}
}

// countInstructions notes how many instructions the verifier has processed.
func (h *host) countInstructions(f *facts.Facts, p policy.Policy, s *loader.Status) {
	h.t.Helper()
	processed := map[string]int{}
	defer func() {
		for name, n := range processed {
			f.Programs[name] = max(f.Programs[name], n)
		}
		h.t.Logf("mode %s, over the limit %s: the verifier has processed %v", p.Mode, p.SMTP.OverLimit, processed)
	}()
	untold := false
	for _, row := range s.Hooks {
		if !row.Attached {
			continue
		}
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(row.Program))
		check(h.t, err)
		info, err := prog.Info()
		check(h.t, err)
		check(h.t, prog.Close())
		n, ok := info.VerifiedInstructions()
		if untold = untold || !ok; ok {
			processed[info.Name] = int(n)
		}
	}
	if !untold {
		return
	}
	state, err := h.State()
	check(h.t, err)
	defer state.Close()
	rel, err := h.root.Rel(h.paths("own.slice")[0])
	check(h.t, err)
	processed, err = loader.Processed(p, state, rel, h.id("own.slice"))
	check(h.t, err)
}

// strategy tells by the program of a hook how it is attached.
func (h *host) strategy(hook, cgroup string) string {
	h.t.Helper()
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(h.hook(hook, cgroup).Program))
	check(h.t, err)
	defer prog.Close()
	if prog.Type() == ebpf.LSM {
		return "lsm_cgroup"
	}
	return "fmod_ret"
}

func nextRefusal(t *testing.T, from events.Source) events.Record {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	for {
		r, err := from.Next(ctx)
		check(t, err)
		if r.Type == events.Refusal {
			return r
		}
	}
}

// passes is an address that is not blocked.
const passes = "198.51.100.1"

// wire is a bridge of the test's network namespace with a guest at it, and a listener that
// packets arrive at.
type wire struct {
	t      *testing.T
	guest  *netns.Namespace
	device int // of the guest
	bridge net.HardwareAddr
	at     int // the listener's socket
	serial uint32
	seen   map[uint32]bool
}

const wirePort = 4242

func newWire(t *testing.T) *wire {
	t.Helper()
	w := &wire{t: t, seen: map[uint32]bool{}}
	lo, err := netlink.LinkByName("lo")
	check(t, err)
	check(t, netlink.LinkSetUp(lo))
	for _, address := range []string{blockedAddress + "/32", passes + "/32", "fd00:ec2::254/128"} {
		addr, err := netlink.ParseAddr(address)
		check(t, err)
		check(t, netlink.AddrAdd(lo, addr))
	}
	bridge := addBridge(t, "docker0")
	w.guest, err = netns.New()
	check(t, err)
	t.Cleanup(func() { w.guest.Close() })
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "port", MasterIndex: bridge.Attrs().Index}, PeerName: "guest"}
	check(t, netlink.LinkAdd(pair))
	guest, err := netlink.LinkByName("guest")
	check(t, err)
	path, err := os.Open(w.guest.Path())
	check(t, err)
	defer path.Close()
	check(t, netlink.LinkSetNsFd(guest, int(path.Fd())))
	for _, l := range []netlink.Link{bridge, pair} {
		check(t, netlink.LinkSetUp(l))
	}
	addr, err := netlink.ParseAddr("172.31.0.1/24")
	check(t, err)
	check(t, netlink.AddrAdd(bridge, addr))
	again, err := netlink.LinkByName("docker0")
	check(t, err)
	w.bridge = again.Attrs().HardwareAddr
	check(t, w.guest.Do(func() error {
		l, err := netlink.LinkByName("guest")
		if err != nil {
			return err
		}
		w.device = l.Attrs().Index
		return netlink.LinkSetUp(l)
	}))
	w.at, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	t.Cleanup(func() { unix.Close(w.at) })
	check(t, unix.Bind(w.at, &unix.SockaddrInet4{Port: wirePort}))
	testenv.Eventually(t, "the bridge forwards", func() bool { check(t, w.forge(passes)); return w.arrives(w.serial, time.Second) })
	return w
}

// datagram returns a UDP packet, from its IP header on, whose data is unique.
func (w *wire) datagram(src, dst string) []byte {
	w.serial++
	packet := make([]byte, 20+8+4)
	copy(packet, []byte{0: 0x45, 3: byte(len(packet)), 8: 64, 9: unix.IPPROTO_UDP})
	copy(packet[12:], net.ParseIP(src).To4())
	copy(packet[16:], net.ParseIP(dst).To4())
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(packet[i:]))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(packet[10:], ^uint16(sum+sum>>16))
	binary.BigEndian.PutUint16(packet[20:], 7)
	binary.BigEndian.PutUint16(packet[22:], wirePort)
	binary.BigEndian.PutUint16(packet[24:], 8+4)
	binary.BigEndian.PutUint32(packet[28:], w.serial)
	return packet
}

// forged has the guest send a packet by a packet socket, and says whether it arrives.
func (w *wire) forged(dst string, expected bool) bool {
	w.t.Helper()
	return w.sent(w.forge, dst, expected)
}

func (w *wire) forge(dst string) error {
	frame := append([]byte{}, w.bridge...)
	frame = append(frame, 2, 0, 0, 0, 0, 1, 0x08, 0x00)
	frame = append(frame, w.datagram("172.31.0.2", dst)...)
	return w.guest.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: w.device, Protocol: 0x0008, Halen: 6})
	})
}

// raw sends a packet by a raw IP socket of this process, and says whether it arrives.
func (w *wire) raw(dst string, expected bool) bool {
	w.t.Helper()
	return w.sent(func(dst string) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		to := &unix.SockaddrInet4{Addr: netip.MustParseAddr(dst).As4()}
		if err := unix.Sendto(fd, w.datagram(dst, dst), 0, to); !errors.Is(err, unix.EPERM) {
			return err
		}
		return nil
	}, dst, expected)
}

// sent sends a packet, and behind it one that must arrive, and says whether the first did. It waits longer
// for a packet that is expected.
func (w *wire) sent(send func(dst string) error, dst string, expected bool) bool {
	w.t.Helper()
	check(w.t, send(dst))
	first := w.serial
	check(w.t, send(passes))
	const patience, overtaken = 2 * time.Minute, 100 * time.Millisecond
	if last := w.serial; !w.arrives(last, patience) {
		w.t.Fatalf("a packet to %s does not arrive", passes)
	}
	if expected {
		return w.arrives(first, patience)
	}
	return w.arrives(first, overtaken)
}

// arrives waits for the packet with a number.
func (w *wire) arrives(serial uint32, patience time.Duration) bool {
	w.t.Helper()
	buf := make([]byte, 16)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		n, _, err := unix.Recvfrom(w.at, buf, unix.MSG_DONTWAIT)
		switch {
		case err == nil && n == 4:
			w.seen[binary.BigEndian.Uint32(buf)] = true
			continue
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR):
			check(w.t, err)
		}
		if w.seen[serial] || time.Now().After(deadline) {
			return w.seen[serial]
		}
	}
}

// connectErrno says how a connect() to an address ends; nil if it is not refused.
func connectErrno(typ int, address string) error {
	fd, to := socketTo(typ, address)
	defer unix.Close(fd)
	return unix.Connect(fd, to)
}

// sendErrno says how a sendto() to an address ends.
func sendErrno(address string) error {
	fd, to := socketTo(unix.SOCK_DGRAM, address)
	defer unix.Close(fd)
	return unix.Sendto(fd, []byte("x"), 0, to)
}

func socketTo(typ int, address string) (fd int, to unix.Sockaddr) {
	addr := netip.MustParseAddr(address)
	family := unix.AF_INET6
	to = &unix.SockaddrInet6{Addr: addr.As16(), Port: 9}
	if addr.Is4() {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Addr: addr.As4(), Port: 9}
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	return fd, to
}
