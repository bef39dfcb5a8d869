package loader_test

import (
	"errors"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// closedPorts returns the UDP ports that are closed to containers.
func (h *host) closedPorts() map[uint16]bool {
	h.t.Helper()
	state, err := h.State()
	check(h.t, err)
	defer state.Close()
	ports, err := state.Tunnels()
	check(h.t, err)
	closed := map[uint16]bool{}
	for port := range ports {
		closed[port] = true
	}
	return closed
}

func (h *host) hostSide() loader.Defence {
	h.t.Helper()
	all := h.status().Defences
	i := slices.IndexFunc(all, func(d loader.Defence) bool { return d.Name == "host_side" })
	if i < 0 {
		h.t.Fatal("status does not tell of host_side")
	}
	return all[i]
}

// TestTunnels closes the ports of the host's tunnels, those that are there and those that
// come, and tells of what is not closed yet.
func TestTunnels(t *testing.T) {
	ownNetwork(t)
	h := newHost(t)
	addBridge(t, "docker0") // before 6.4, the host side is nowhere without one
	add := func(name string, port int) netlink.Link {
		t.Helper()
		l := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: name}, VxlanId: port, Port: port}
		check(t, netlink.LinkAdd(l))
		check(t, netlink.LinkSetUp(l))
		return l
	}
	add("before", 7001)
	p := policy.Default()
	h.mustAttach(p, "a")
	if closed := h.closedPorts(); !closed[7001] || !closed[4789] || closed[7002] {
		t.Errorf("closed: %v, want 7001 and 4789 among them, not 7002", closed)
	}
	if d := h.hostSide(); !d.Active {
		t.Errorf("host side: %+v, want it active", d)
	}
	later := add("later", 7002)
	if d := h.hostSide(); d.Active || !strings.Contains(d.Reason, "7002") {
		t.Errorf("host side: %+v, want it to tell of port 7002", d)
	}
	check(t, h.CloseTunnels(t.Context()))
	if d := h.hostSide(); !d.Active || !h.closedPorts()[7002] {
		t.Errorf("host side: %+v, want 7002 closed", d)
	}
	check(t, netlink.LinkDel(later))
	h.mustAttach(p)
	if closed := h.closedPorts(); closed[7002] || !closed[7001] {
		t.Errorf("closed: %v, want 7001 among them, not 7002", closed)
	}
	p.HostSide = policy.Off
	h.mustAttach(p)
	if closed := h.closedPorts(); len(closed) > 0 {
		t.Errorf("closed without a host side: %v", closed)
	}
}

// delivers says whether packets to the host itself are judged, by both protocols.
func (h *host) delivers() bool {
	h.t.Helper()
	n := 0
	for _, row := range h.status().Hooks {
		if loader.ForTunnels(row) {
			n++
		}
	}
	if n == 1 {
		h.t.Error("packets of one protocol are judged")
	}
	return n > 0
}

// TestManyTunnels attaches beside more sockets that look like tunnels than ports can be closed: any process in the
// host's network can make them.
func TestManyTunnels(t *testing.T) {
	ownNetwork(t)
	h := newHost(t)
	addBridge(t, "docker0")
	const first, tunnel = 10_000, 60_000
	vxlan := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "before"}, VxlanId: 1, Port: tunnel}
	check(t, netlink.LinkAdd(vxlan))
	check(t, netlink.LinkSetUp(vxlan))
	h.mustAttach(policy.Default(), "a")
	for port := first; port < first+maps.MaxTunnels+100; port++ {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		defer unix.Close(fd)
		check(t, unix.Bind(fd, &unix.SockaddrInet4{Port: port}))
		check(t, unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_ENCAP, unix.UDP_ENCAP_ESPINUDP))
	}
	h.mustAttach(policy.Default(), "a")
	check(t, h.CloseTunnels(t.Context()))
	closed := h.closedPorts()
	if len(closed) != maps.MaxTunnels || !closed[4789] || !closed[first] || !closed[tunnel] {
		t.Errorf("%d ports are closed, want %d; that of the tunnel: %v", len(closed), maps.MaxTunnels, closed[tunnel])
	}
	if d := h.hostSide(); d.Active || !strings.Contains(d.Reason, " more, which is not closed") || !strings.Contains(d.Reason, "ss -uap") || len(d.Reason) > 500 {
		t.Errorf("host side: %+v, want it to tell of open ports", d)
	}
}

// A service keeps nothing of a filter that another process has detached.
func TestFollowAfterDetach(t *testing.T) {
	ownNetwork(t)
	h := newHost(t)
	if !hasNetfilter(t) {
		return
	}
	ctx := t.Context()
	other := loader.New(h.Pins(), h.root)
	p := policy.Default()
	h.mustAttach(p, "a")
	before := h.objects()
	check(t, h.Follow(ctx, true))
	check(t, other.Detach(ctx, nil))
	check(t, h.CloseTunnels(ctx))
	h.nothingLeft(before)

	// Nor if what was left out has come into force meanwhile.
	h.mustAttach(p, "a")
	tunnel := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "vxlan1"}, VxlanId: 1, Port: 7001}
	check(t, netlink.LinkAdd(tunnel))
	check(t, netlink.LinkSetUp(tunnel))
	check(t, h.CloseTunnels(ctx))
	if !h.delivers() {
		t.Error("there is a tunnel, and packets to the host are not judged")
	}
	before = h.objects()
	check(t, other.Detach(ctx, nil))
	check(t, other.Attach(ctx, h.paths("a"), p))
	check(t, h.CloseTunnels(ctx))
	before.gone(t)
}

// TestFollowTunnels judges packets to the host itself while there is a tunnel, and, without a
// process that follows the tunnels, always.
func TestFollowTunnels(t *testing.T) {
	ownNetwork(t)
	h := newHost(t)
	p := policy.Default()
	h.mustAttach(p, "a")
	if !hasNetfilter(t) {
		return // that host side judges all packets in one place
	}
	ctx := t.Context()
	wants := func(what string, delivers bool) {
		t.Helper()
		if got := h.delivers(); got != delivers {
			t.Errorf("%s: packets to the host are judged: %v, want %v", what, got, delivers)
		}
		if d := h.hostSide(); !d.Active {
			t.Errorf("%s: host side: %+v, want it active", what, d)
		}
	}
	wants("without a service", true)
	check(t, h.Follow(ctx, true))
	wants("a service begins", false)
	if d := h.hostSide(); !strings.Contains(d.Reason, "does not run") {
		t.Errorf("nobody serves: got %+v", d)
	}
	served, err := h.Serve()
	check(t, err)
	defer served.Close()
	if d := h.hostSide(); strings.Contains(d.Reason, "does not run") {
		t.Errorf("a service follows tunnels: got %+v", d)
	}
	p.SMTP.Burst++
	h.mustAttach(p)
	wants("it attaches again", false)

	tunnels := []netlink.Link{
		&netlink.Iptun{LinkAttrs: netlink.LinkAttrs{Name: "ipip1"}, Local: net.IPv4(192, 0, 2, 1), Remote: net.IPv4(192, 0, 2, 2)},
		&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "vxlan1"}, VxlanId: 1, Port: 7001},
	}
	for _, tunnel := range tunnels {
		name := tunnel.Attrs().Name
		if err := netlink.LinkAdd(tunnel); errors.Is(err, unix.EOPNOTSUPP) && tunnel.Type() == "ipip" {
			continue // this kernel has no such tunnels
		} else {
			check(t, err)
		}
		if d := h.hostSide(); d.Active {
			t.Errorf("%s appeared: %+v, want it not active", name, d)
		}
		check(t, h.CloseTunnels(ctx))
		wants(name+" is down", true)
		check(t, netlink.LinkSetUp(tunnel))
		check(t, h.CloseTunnels(ctx))
		wants(name+" is up", true)
		h.mustAttach(p)
		wants(name+" is up, and an attach", true)
		check(t, netlink.LinkDel(tunnel))
		check(t, h.CloseTunnels(ctx))
		wants(name+" is gone", false)
	}

	// A failed attach leaves what was in force, and what can come into force.
	h.failAtEachStep(func() error { return h.attach(policy.Default()) })
	wants("after failed attaches", false)
	check(t, netlink.LinkAdd(tunnels[1]))
	check(t, netlink.LinkSetUp(tunnels[1]))
	check(t, h.CloseTunnels(ctx))
	wants("a tunnel after failed attaches", true)
	check(t, netlink.LinkDel(tunnels[1]))
	check(t, h.CloseTunnels(ctx))
	// Another process does not follow tunnels.
	other := loader.New(h.Pins(), h.root)
	check(t, other.Attach(ctx, nil, p))
	wants("another process attaches", true)
	check(t, h.CloseTunnels(ctx))
	wants("the service looks", false)
	check(t, h.Follow(ctx, false))
	wants("the service ends", true)
}

// TestMayBeTunnel looks at devices by what the kernel tells of them.
func TestMayBeTunnel(t *testing.T) {
	up, loopback := net.FlagUp, net.FlagUp|net.FlagLoopback
	for _, tt := range []struct {
		name string
		link netlink.Link
		want bool
	}{
		{"hardware", &netlink.Device{LinkAttrs: netlink.LinkAttrs{Flags: up, ParentDev: "virtio2"}}, false},
		{"loopback", &netlink.Device{LinkAttrs: netlink.LinkAttrs{Flags: loopback}}, false},
		{"L2TP", &netlink.Device{LinkAttrs: netlink.LinkAttrs{Flags: up}}, true},
		{"veth", &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Flags: up}}, false},
		{"tunl0, which is down", &netlink.Iptun{}, true},
		{"VXLAN on its way to another network", &netlink.Vxlan{}, true},
		{"a kind that is not known", &netlink.GenericLink{LinkType: "new"}, true},
	} {
		if got := loader.MayBeTunnel(tt.link); got != tt.want {
			t.Errorf("%s: %t, want %t", tt.name, got, tt.want)
		}
	}
}
