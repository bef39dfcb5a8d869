package loader

import (
	"errors"
	"fmt"
	"io/fs"
	gomaps "maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// tunnels is the part of the host side that closes the UDP ports of the host's tunnels to
// containers. The host itself unpacks packets there, so a container could hide a blocked
// packet in an innocent one.
type tunnels struct{ site }

// usualTunnels are closed even if there is no tunnel yet: VXLAN (IANA's port and Linux's),
// VXLAN-GPE, GENEVE, GTP, GUE and MPLS.
var usualTunnels = []uint16{4789, 8472, 4790, 6081, 2152, 6080, 6635}

// attach closes the ports of the tunnels in the network namespace of this process. Kernels
// without BTF cannot list them: there attach closes the usual ports.
func (t tunnels) attach(a *attachment) error {
	if prog, err := loadTunnels(); err == nil {
		defer prog.Close()
		err := a.change.ReplaceLink(t.pins.Pin(pins.Tunnels), func() (link.Link, error) {
			return link.AttachIter(link.IterOptions{Program: prog})
		})
		if err != nil {
			return fmt.Errorf("find tunnels: %w", err)
		}
		a.found.Tunnels = true
	}
	found, err := t.find()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return t.set(withUsual(found), a)
}

// set closes these ports to containers and opens all others.
func (t tunnels) set(ports map[uint16]bool, a *attachment) error {
	before, err := a.state.Tunnels()
	if err != nil {
		return err
	}
	if err := a.change.Step("close tunnels"); err != nil {
		return err
	}
	a.change.Back(func() error { return a.state.SetTunnels(before) })
	return a.state.SetTunnels(ports)
}

// detach removes the program that lists tunnels.
func (t tunnels) detach(change *pins.Change) error { return change.DropLink(t.pins.Pin(pins.Tunnels)) }

// withUsual returns the ports to close: those at which tunnels were found, and the usual
// ones.
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

// CloseTunnels closes the ports of the host's present tunnels to containers, and opens the
// ports of tunnels that are gone. It is no error if there is no host side.
func (f *Filter) CloseTunnels() error {
	found, err := f.host.tunnels.find()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.withState(func(state *maps.State) error { return state.SetTunnels(withUsual(found)) })
}

// find returns the UDP ports at which this network namespace unpacks packets. The error
// wraps fs.ErrNotExist if the kernel cannot list them.
func (t tunnels) find() ([]uint16, error) {
	text, err := os.ReadFile(t.pins.Pin(pins.Tunnels))
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
	return slices.Sorted(gomaps.Keys(found)), nil
}

// read reports tunnels that are not closed to containers.
func (t tunnels) read(d *Defence, why *found) {
	if !d.Active {
		return
	}
	found, err := t.find()
	if errors.Is(err, fs.ErrNotExist) && why != nil && why.Tunnels {
		d.Active, d.Reason = false, "the ports of the host's tunnels cannot be read, since "+t.pins.Pin(pins.Tunnels)+" is gone; attach again"
		return
	}
	if errors.Is(err, fs.ErrNotExist) {
		if d.Reason == "" {
			d.Reason = "this kernel does not list the ports of its tunnels: only the usual UDP ports are closed to containers, and datagrams to other ports are read as far as possible"
		}
		return
	}
	var closed map[uint16]bool
	if err == nil {
		var state *maps.State
		if state, err = t.state(); err == nil {
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
