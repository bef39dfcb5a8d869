package loader_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/loader"
	statemaps "github.com/egressbpf/egressbpf/internal/maps"
)

// lastIDs makes a program, a map and a link, and returns their ids: each kind is numbered in
// the order in which they are made.
func lastIDs(t *testing.T, h *host) (ids [3]uint32) {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetIngress, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	check(t, err)
	defer prog.Close()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	check(t, err)
	defer m.Close()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: h.base, Attach: ebpf.AttachCGroupInetIngress, Program: prog})
	check(t, err)
	defer l.Close()
	progInfo, err := prog.Info()
	check(t, err)
	mapInfo, err := m.Info()
	check(t, err)
	linkInfo, err := l.Info()
	check(t, err)
	progID, _ := progInfo.ID()
	mapID, _ := mapInfo.ID()
	return [3]uint32{uint32(progID), uint32(mapID), uint32(linkInfo.ID)}
}

// Reading the status makes nothing in the kernel, also where defences are missing and it
// has to say why.
func TestStatusMakesNothing(t *testing.T) {
	lockHost(t)
	h := newHost(t)
	failDefences(h.Filter)
	h.mustAttach(withDefences(5), "a")
	h.SetFault(func(step string) error {
		t.Errorf("step %s", step)
		return nil
	})
	lastIDs(t, h) // the library probes, the first time
	before := lastIDs(t, h)
	status := h.status()
	check(t, h.AddState(status))
	_, err := h.Elsewhere()
	check(t, err)
	after := lastIDs(t, h)
	for i, kind := range []string{"program", "map", "link"} {
		if n := after[i] - before[i] - 1; n != 0 {
			t.Errorf("%d of kind %s were made", n, kind)
		}
	}
	for _, d := range status.Defences {
		if (d.Name == loader.SocketFamilies || d.Name == loader.HostSide) && (d.Active || !strings.Contains(d.Reason, errInjected.Error())) {
			t.Errorf("got %+v, want the reason that the attach has found", d)
		}
	}
	h.SetFault(nil)
}

// Nor do readers of the state make a map in the place of one that is missing, or that
// another version has made: they do without.
func TestReadingMakesNoMap(t *testing.T) {
	lockHost(t)
	for name, replace := range map[string]func(t *testing.T, pin string){
		"missing": func(*testing.T, string) {},
		"incompatible": func(t *testing.T, pin string) {
			pinMap(t, pin, ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.mustAttach(withDefences(5), "a")
			// Those of the state that no pinned program keeps in reach are gone with their pins.
			kept := []string{bpf.EgressMapContainers, bpf.EgressMapStateless, bpf.EgressMapRetired, bpf.EgressMapTotals}
			for _, pin := range h.pinned() {
				if !strings.HasSuffix(pin, "/") && pin != h.pins && !slices.Contains(kept, pin) && !strings.HasSuffix(pin, "/"+bpf.EgressProgConnect4) {
					check(t, os.Remove(filepath.Join(h.pins, pin)))
				}
			}
			for _, m := range statemaps.StateNames() {
				if !slices.Contains(kept, m) {
					replace(t, filepath.Join(h.pins, m))
				}
			}
			state, err := h.State()
			check(t, err)
			if _, ok := state.ByName()[bpf.EgressMapDevices]; ok {
				t.Error("the map is still within reach")
			}
			check(t, state.Close())
			before := lastIDs(t, h)
			check(t, h.AddState(h.status()))
			h.counters()
			check(t, h.ForgetDevices())
			check(t, h.CloseTunnels(t.Context()))
			after := lastIDs(t, h)
			if n := after[1] - before[1] - 1; n != 0 {
				t.Errorf("%d maps were made", n)
			}
		})
	}
}
