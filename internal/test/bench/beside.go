package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"text/tabwriter"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// beside is an operation that another defence sees and lets pass. It is measured with the
// defence in force and without.
type beside struct {
	name string
	// defence is the defence's name in status.
	defence string
	// do does the operation n times.
	do func(n int) error
	n  int

	without, with []float64 // the fastest of each attach, in nanoseconds
	missing       string    // why this kernel has no such defence
}

const attaches = 11 // with each defence and without

// measureBeside attaches the filter to an empty cgroup, again and again. It needs a network
// namespace of its own, and leaves its thread in it.
func measureBeside(root cgroup.Root, policed string) (_ []*beside, err error) {
	send, err := newSender()
	if err != nil {
		return nil, err
	}
	defer send.close()

	// A bpf filesystem of its own, since not every machine has one mounted.
	dir, err := os.MkdirTemp("", "egressbpf-bench")
	if err != nil {
		return nil, err
	}
	defer os.Remove(dir)
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		return nil, fmt.Errorf("mount a bpf filesystem: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, 0)) }()
	filter := loader.New(filepath.Join(dir, "egressbpf"), root)
	defer func() { err = errors.Join(err, filter.Detach(context.Background(), nil)) }()
	all := []*beside{
		{name: "udp4 from a bridge", defence: "host_side", do: send.datagrams, n: 5_000},
		{name: "socket() and close() elsewhere", defence: loader.SocketFamilies, do: sockets, n: 5_000},
	}
	for range attaches {
		for _, i := range rand.Perm(2 * len(all)) {
			if err := all[i/2].measure(filter, policed, i%2 == 0); err != nil {
				return nil, fmt.Errorf("%s: %w", all[i/2].name, err)
			}
		}
	}
	return all, nil
}

func (b *beside) measure(filter *loader.Filter, policed string, with bool) error {
	p := policy.Default()
	p.Families, p.HostSide = policy.AnyFamily, policy.Off
	to := &b.without
	if with {
		to = &b.with
		switch b.defence {
		case loader.SocketFamilies:
			p.Families = policy.Default().Families
		default:
			p.HostSide = policy.On
		}
	}
	if err := filter.Attach(context.Background(), []string{policed}, p); err != nil {
		return err
	}
	if with {
		s, err := filter.Status()
		if err != nil {
			return err
		}
		for _, d := range s.Defences {
			if d.Name == b.defence && !d.Active {
				b.missing = d.Reason
				return nil
			}
		}
	}
	fastest, err := fastest(b.n, func() error { return b.do(b.n) })
	if err != nil {
		return err
	}
	*to = append(*to, fastest)
	return nil
}

func sockets(n int) error {
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		unix.Close(fd)
	}
	return nil
}

// udpSender sends datagrams from a container. This host discards them when it looks for
// their route. All of it happens within sendto(), in the thread's time.
type udpSender struct{ fd int }

func (s udpSender) close() { unix.Close(s.fd) }

func (s udpSender) datagrams(n int) error {
	data := make([]byte, 36)
	for range n {
		if err := unix.Send(s.fd, data, 0); err != nil {
			return err
		}
	}
	return nil
}

// newSender makes the networks of a host and of a container.
func newSender() (s udpSender, err error) {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return s, err
	}
	host, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return s, err
	}
	defer host.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return s, err
	}
	inside, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return s, err
	}
	defer inside.Close()
	const gateway, address, target = "172.31.0.1/24", "172.31.0.2/24", "198.51.100.1"
	if err := unix.Setns(int(host.Fd()), unix.CLONE_NEWNET); err != nil {
		return s, err
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "docker0"}}
	if err := netlink.LinkAdd(bridge); err != nil {
		return s, err
	}
	port := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "port", MasterIndex: bridge.Attrs().Index},
		PeerName:  "eth0", PeerNamespace: netlink.NsFd(inside.Fd()),
	}
	if err := netlink.LinkAdd(port); err != nil {
		return s, err
	}
	for _, l := range []netlink.Link{bridge, port} {
		if err := netlink.LinkSetUp(l); err != nil {
			return s, err
		}
	}
	if err := addAddress(bridge, gateway); err != nil {
		return s, err
	}
	all := netip.MustParsePrefix(target + "/24").Masked()
	discard := &netlink.Route{Type: unix.RTN_BLACKHOLE, Dst: &net.IPNet{IP: all.Addr().AsSlice(), Mask: net.CIDRMask(all.Bits(), 32)}}
	if err := netlink.RouteAdd(discard); err != nil {
		return s, err
	}
	if err := unix.Setns(int(inside.Fd()), unix.CLONE_NEWNET); err != nil {
		return s, err
	}
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return s, err
	}
	if err := addAddress(eth0, address); err != nil {
		return s, err
	}
	if err := netlink.LinkSetUp(eth0); err != nil {
		return s, err
	}
	via := netip.MustParsePrefix(gateway).Addr().AsSlice()
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: via}); err != nil {
		return s, err
	}
	if s.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0); err != nil {
		return s, err
	}
	if err := unix.Connect(s.fd, &unix.SockaddrInet4{Port: 9, Addr: netip.MustParseAddr(target).As4()}); err != nil {
		return s, err
	}
	// The filter runs on the host.
	return s, unix.Setns(int(host.Fd()), unix.CLONE_NEWNET)
}

func addAddress(l netlink.Link, text string) error {
	addr, err := netlink.ParseAddr(text)
	if err != nil {
		return err
	}
	return netlink.AddrAdd(l, addr)
}

func printBeside(w io.Writer, all []*beside) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "WHAT\tDEFENCE\tNS WITHOUT\tNS WITH\tRATIO")
	for _, b := range all {
		if b.missing != "" {
			fmt.Fprintf(tw, "%s\t%s\tnot on this kernel: %s\n", b.name, b.defence, b.missing)
			continue
		}
		without, with := slices.Min(b.without), slices.Min(b.with)
		fmt.Fprintf(tw, "%s\t%s\t%.0f\t%.0f\t%.3f\n", b.name, b.defence, without, with, with/without)
	}
	tw.Flush()
}
