package loader_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egressbpf/egressbpf/internal/loader"
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
	check(t, h.CloseTunnels())
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
