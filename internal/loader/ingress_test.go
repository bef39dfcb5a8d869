package loader_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// without64 makes the kernel one without BPF netfilter programs, and any step whose
// name contains fail an error.
func without64(f *loader.Filter, fail string) {
	f.SetFault(func(step string) error {
		if step == "try netfilter" {
			return fmt.Errorf("netfilter: %w", ebpf.ErrNotSupported)
		}
		if fail != "" && strings.Contains(step, fail) {
			return errInjected
		}
		return nil
	})
}

// ownNetwork moves the test into a network namespace of its own.
func ownNetwork(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	check(t, unix.Unshare(unix.CLONE_NEWNET))
}

func addBridge(t *testing.T, name string) netlink.Link {
	t.Helper()
	l := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
	check(t, netlink.LinkAdd(l))
	return l
}

// judgedBy returns the programs of the filters at a device by their names; nil without
// what holds filters.
func judgedBy(t *testing.T, device netlink.Link) map[string]int {
	t.Helper()
	qdiscs, err := netlink.QdiscList(device)
	check(t, err)
	if !slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "clsact" }) {
		return nil
	}
	filters, err := netlink.FilterList(device, netlink.HANDLE_MIN_INGRESS)
	check(t, err)
	found := map[string]int{}
	for _, f := range filters {
		name := f.(*netlink.BpfFilter).Name
		if _, twice := found[name]; twice {
			t.Errorf("two filters %q", name)
		}
		found[name] = f.(*netlink.BpfFilter).Id
	}
	return found
}

// ingressHooks returns the devices that status shows, with their programs.
func ingressHooks(s *loader.Status) map[string]int {
	found := map[string]int{}
	for _, h := range s.Hooks {
		if h.Name == "host_ingress" && h.Attached {
			found[h.Device] = int(h.Program)
		}
	}
	return found
}

// TestHostSideBefore64 is about kernels that have no BPF netfilter programs: each bridge
// gets a filter.
func TestHostSideBefore64(t *testing.T) {
	ownNetwork(t)
	h := newHost(t)
	ours := "egressbpf " + h.pins
	without64(h.Filter, "")
	p := withDefences(5)
	p.HostDevices = []policy.Device{"cali*"}

	if d := func() loader.Defence { h.mustAttach(p, "a"); return h.defence("host_side") }(); !d.Active || !strings.Contains(d.Reason, "6.4") {
		t.Errorf("without any bridge: got %+v, want it active, with a remark", d)
	}
	docker0, network := addBridge(t, "docker0"), addBridge(t, "br-0123456789ab")
	others := []netlink.Link{addBridge(t, "br-lan"), &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cali1", MasterIndex: docker0.Attrs().Index}, PeerName: "peer"}}
	check(t, netlink.LinkAdd(others[1]))
	routed := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cali2"}, PeerName: "peer2"}
	check(t, netlink.LinkAdd(routed))
	if d := h.defence("host_side"); d.Active || !strings.Contains(d.Reason, "not judged: attach again") {
		t.Errorf("with new bridges: got %+v, want it to say that they are not judged", d)
	}

	// Somebody else's filter at the same place.
	stranger, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	check(t, err)
	defer stranger.Close()
	hold(t, docker0, &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: docker0.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: 1, Protocol: unix.ETH_P_ALL},
		Fd:          stranger.FD(), Name: "stranger", DirectAction: true,
	})

	wanted := map[string]netlink.Link{"docker0": docker0, "br-0123456789ab": network, "cali2": routed}
	before := ingressHooks(h.mustAttach(p, "a"))
	if d := h.defence("host_side"); !d.Active {
		t.Errorf("got %+v, want it active", d)
	}
	expect := func(what string, programs map[string]int) {
		t.Helper()
		if now := ingressHooks(h.status()); fmt.Sprint(now) != fmt.Sprint(programs) {
			t.Errorf("%s: status shows %v, want %v", what, now, programs)
		}
		for name, device := range wanted {
			if id := judgedBy(t, device)[ours]; id != programs[name] {
				t.Errorf("%s: %s is judged by program %d, want %d", what, name, id, programs[name])
			}
		}
		for _, device := range others {
			if found := judgedBy(t, device); found != nil {
				t.Errorf("%s: %s has filters: %v", what, device.Attrs().Name, found)
			}
		}
		if judgedBy(t, docker0)["stranger"] == 0 {
			t.Errorf("%s: the filter of another is gone", what)
		}
	}
	if len(before) != len(wanted) {
		t.Errorf("status shows %v, want %d devices", before, len(wanted))
	}
	expect("attached", before)

	// What fails leaves all as it was.
	without := p
	without.HostSide = policy.Off
	for _, change := range []struct {
		p    policy.Policy
		step string
	}{{p, "judge docker0"}, {p, "judge br-0123456789ab"}, {p, "judge cali2"}, {without, "judge docker0 no more"}, {without, "judge cali2 no more"}} {
		without64(h.Filter, change.step)
		if err := h.attach(change.p, "a"); err == nil {
			t.Errorf("%s: no error", change.step)
		}
		expect("failed at "+change.step, before)
	}
	without64(h.Filter, "")

	after := ingressHooks(h.mustAttach(p, "a"))
	for name, id := range before {
		if after[name] == id || after[name] == 0 {
			t.Errorf("%s has program %d after another attach, and had %d", name, after[name], id)
		}
	}
	expect("attached again", after)

	h.mustAttach(without, "a")
	expect("turned off", map[string]int{})
	if found := judgedBy(t, network); found != nil {
		t.Errorf("turned off: something is left: %v", found)
	}
	h.mustAttach(p, "a")
	check(t, netlink.LinkDel(network))
	delete(wanted, "br-0123456789ab")
	if d := h.defence("host_side"); !d.Active {
		t.Errorf("with a bridge removed: got %+v, want it active", d)
	}
	h.mustDetach()
	for name, device := range wanted {
		if found := judgedBy(t, device); found[ours] != 0 || name != "docker0" && found != nil {
			t.Errorf("detached: %s has filters: %v", name, found)
		}
	}
	if _, err := os.Stat(h.pins); err == nil {
		t.Errorf("detached: %s is left", filepath.Base(h.pins))
	}

	// Filters need no pins, and go without them too.
	h.mustAttach(p, "a")
	check(t, os.RemoveAll(h.pins))
	h.mustDetach()
	expect("detached without pins", map[string]int{})

	// Where the kernel accepts none, the others are there, and status says why.
	taken := addBridge(t, "br-0123456789ac")
	hold(t, taken, &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: taken.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: 1, Protocol: unix.ETH_P_IP},
		Fd:          stranger.FD(), Name: "stranger", DirectAction: true,
	})
	after = ingressHooks(h.mustAttach(p, "a"))
	expect("attached beside one that is taken", after)
	if d := h.defence("host_side"); d.Active || !strings.Contains(d.Reason, "accepts no filter") || len(after) != len(wanted) {
		t.Errorf("got %+v with %v, want it to say that one device has none, and why", d, after)
	}
}

// hold adds a filter to a device that has none.
func hold(t *testing.T, device netlink.Link, filter netlink.Filter) {
	t.Helper()
	check(t, netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: device.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}))
	check(t, netlink.FilterAdd(filter))
}
