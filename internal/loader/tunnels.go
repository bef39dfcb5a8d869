package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/bpf"
	statemaps "github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// Where the host itself unpacks packets from others, a container could hide what is not to
// pass in an innocent one. So the UDP ports of the host's tunnels are closed to containers.

// usualTunnels are closed whether or not there is a tunnel yet: VXLAN (IANA's port and that
// of Linux), VXLAN-GPE, GENEVE, GTP, GUE and MPLS.
var usualTunnels = []uint16{4789, 8472, 4790, 6081, 2152, 6080, 6635}

// attachTunnels closes the ports of the tunnels that there are, in the network namespace of
// this process. Kernels without BTF cannot tell them: there the usual ones are closed.
func (f *Filter) attachTunnels(state *statemaps.State, why *found, change *pins.Change) error {
	if prog, err := loadTunnels(); err == nil {
		defer prog.Close()
		err := change.ReplaceLink(f.pins.Pin(pins.Tunnels), func() (link.Link, error) {
			return link.AttachIter(link.IterOptions{Program: prog})
		})
		if err != nil {
			return fmt.Errorf("find tunnels: %w", err)
		}
		why.Tunnels = true
	}
	found, err := f.findTunnels()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return f.setTunnels(state, withUsual(found), change)
}

// setTunnels closes those ports to containers and opens all others.
func (f *Filter) setTunnels(state *statemaps.State, ports map[uint16]bool, change *pins.Change) error {
	before, err := state.Tunnels()
	if err != nil {
		return err
	}
	if err := change.Step("close tunnels"); err != nil {
		return err
	}
	change.Back(func() error { return state.SetTunnels(before) })
	return state.SetTunnels(ports)
}

// withUsual returns the ports to be closed where tunnels were found at some.
func withUsual(found []uint16) map[uint16]bool {
	ports := map[uint16]bool{}
	for _, port := range usualTunnels {
		ports[port] = false
	}
	for _, port := range found {
		ports[port] = true
	}
	return ports
}

func loadTunnels() (*ebpf.Program, error) {
	spec, err := bpf.LoadTunnels()
	if err != nil {
		return nil, err
	}
	var loaded struct {
		Program *ebpf.Program `ebpf:"udp_tunnels"`
	}
	if err := spec.LoadAndAssign(&loaded, nil); err != nil {
		return nil, fmt.Errorf("load program %s: %w", bpf.TunnelsProgUdpTunnels, err)
	}
	return loaded.Program, nil
}

// CloseTunnels closes the ports of the tunnels that the host has now to containers, and
// opens those of tunnels that are gone. That there is no host side is no error.
func (f *Filter) CloseTunnels() error {
	found, err := f.findTunnels()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.withState(func(state *statemaps.State) error { return state.SetTunnels(withUsual(found)) })
}

// findTunnels returns the UDP ports at which this network namespace unpacks packets. The
// error wraps fs.ErrNotExist if the kernel cannot tell.
func (f *Filter) findTunnels() ([]uint16, error) {
	text, err := os.ReadFile(f.pins.Pin(pins.Tunnels))
	if err != nil {
		return nil, fmt.Errorf("find tunnels: %w", err)
	}
	found := map[uint16]bool{}
	for line := range strings.Lines(string(text)) {
		port, err := strconv.ParseUint(strings.TrimSpace(line), 10, 16)
		if err != nil {
			return nil, fmt.Errorf("find tunnels: %w", err)
		}
		if port != 0 { // not bound
			found[uint16(port)] = true
		}
	}
	return slices.Sorted(maps.Keys(found)), nil
}

// tunnelsStatus tells of tunnels that are not closed to containers.
func (f *Filter) tunnelsStatus(d *Defence, why *found) {
	if !d.Active {
		return
	}
	found, err := f.findTunnels()
	if errors.Is(err, fs.ErrNotExist) && why != nil && why.Tunnels {
		d.Active, d.Reason = false, "where the host's tunnels end cannot be read, since "+f.pins.Pin(pins.Tunnels)+" is gone; attach again"
		return
	}
	if errors.Is(err, fs.ErrNotExist) {
		if d.Reason == "" {
			d.Reason = "this kernel does not tell where its tunnels end: only the usual UDP ports are closed to containers, and what is sent to others is read as far as it can be"
		}
		return
	}
	var closed map[uint16]bool
	if err == nil {
		var state *statemaps.State
		if state, err = f.State(); err == nil {
			closed, err = state.Tunnels()
			state.Close()
		}
	}
	if err != nil {
		d.Active, d.Reason = false, err.Error()
		return
	}
	var open []string
	for _, port := range found {
		if _, ok := closed[port]; !ok {
			open = append(open, strconv.Itoa(int(port)))
		}
	}
	if len(open) > 0 {
		d.Active = false
		d.Reason = fmt.Sprintf("a tunnel of this host ends at UDP port %s, which is not closed to containers yet: attach again, or run the service", strings.Join(open, ", "))
	}
}
