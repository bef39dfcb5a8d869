package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	gomaps "maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

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
	before, err := a.state.Tunnels()
	if err != nil {
		return err
	}
	return t.set(toClose(found, before), a)
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

// toClose returns the ports to close: those at which tunnels were found, and the usual ones. If there are more than
// can be closed, those that are closed already come first: any process in the host's network can make a socket that
// looks like a tunnel.
func toClose(found []uint16, before map[uint16]bool) map[uint16]bool {
	ports := map[uint16]bool{}
	for _, port := range usualTunnels {
		ports[port] = false
	}
	for _, again := range []bool{true, false} {
		for _, port := range found {
			_, usual := ports[port]
			if before[port] == again && (usual || len(ports) < maps.MaxTunnels) {
				ports[port] = true
			}
		}
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
	if err := maps.Cause(spec.LoadAndAssign(&loaded, nil)); err != nil {
		return nil, fmt.Errorf("load program %s: %w", bpf.TunnelsProgUdpTunnels, err)
	}
	return loaded.Program, nil
}

// Follow says whether this process follows the host's tunnels: whether it calls CloseTunnels
// as soon as a device appears or changes of which MayBeTunnel is true. Before it ends, it has
// to say that it no longer does.
func (f *Filter) Follow(ctx context.Context, follows bool) error {
	f.host.netfilter.follows = follows
	return f.judgeDelivered(ctx)
}

// CloseTunnels closes the ports of the host's present tunnels to containers, opens the ports
// of tunnels that are gone, and has packets to the host itself judged if there is a tunnel
// that could unpack them. It is no error if there is no host side.
func (f *Filter) CloseTunnels(ctx context.Context) error {
	found, err := f.host.tunnels.find()
	if errors.Is(err, fs.ErrNotExist) {
		return f.judgeDelivered(ctx)
	}
	if err != nil {
		return err
	}
	err = f.withState(func(state *maps.State) error {
		before, err := state.Tunnels()
		if err != nil {
			return err
		}
		return state.SetTunnels(toClose(found, before))
	})
	return errors.Join(err, f.judgeDelivered(ctx))
}

func (f *Filter) judgeDelivered(ctx context.Context) (err error) {
	unlock, err := f.pins.LockExisting(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return f.host.netfilter.forget() // nothing is attached
	}
	if err != nil {
		return err
	}
	defer unlock()
	change := pins.NewChange(f.fault)
	defer func() { err = change.End(err) }()
	return f.host.netfilter.judgeDelivered(change)
}

// MayBeTunnel says whether a device could unpack IP packets from packets that the host
// receives: true of every kind that is not known to do nothing of the sort. A device that is
// down counts too. It can be moved to another network namespace before it is set up there, and
// the host does not see it then, but unpacks its packets. Of tunnels by IP protocols the host
// still sees the device that the kernel makes for each kind, such as tunl0.
func MayBeTunnel(l netlink.Link) bool {
	switch a := l.Attrs(); l.Type() {
	case "bond", "bridge", "dummy", "ifb", "ipvlan", "ipvtap", "macvlan", "macvtap", "nlmon", "team", "tuntap", "veth", "vlan", "vrf":
		return false
	case "device": // of no kind: hardware, which has a parent; the loopback device; or L2TP
		return a.ParentDev == "" && a.Flags&net.FlagLoopback == 0
	}
	return true
}

// exist says whether something in this network namespace could unpack IP packets from
// packets that the host receives.
func (t tunnels) exist() (bool, error) {
	ports, err := t.find()
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil // the kernel does not tell
	}
	if err != nil || len(ports) > 0 || kindsHidden() {
		return true, err
	}
	links, err := links()
	if err != nil || slices.ContainsFunc(links, MayBeTunnel) {
		return true, err
	}
	return compressed()
}

// kindsHidden says whether the kernel makes no device for each kind of tunnel. Then nobody can
// tell whether there is a tunnel whose device is in another network namespace.
func kindsHidden() bool {
	value, err := os.ReadFile("/proc/sys/net/core/fb_tunnels_only_for_init_net")
	return err == nil && strings.TrimSpace(string(value)) == "2"
}

// compressed says whether the host unpacks compressed packets (IPComp), for which no device
// is needed. It does not ask a part of the kernel that is not loaded, since asking would load
// it: a part that is there has a socket in /proc/net/netlink.
func compressed() (bool, error) {
	if _, err := os.Stat("/proc/thread-self/net/pfkey"); err == nil {
		return true, nil // whoever uses this interface is not asked
	}
	sockets, err := os.ReadFile("/proc/thread-self/net/netlink")
	if err != nil {
		return true, err
	}
	loaded := false
	for line := range strings.Lines(string(sockets)) {
		fields := strings.Fields(line)
		loaded = loaded || len(fields) > 1 && fields[1] == strconv.Itoa(unix.NETLINK_XFRM)
	}
	if !loaded {
		return false, nil
	}
	states, err := netlink.XfrmStateList(netlink.FAMILY_ALL)
	return err != nil || slices.ContainsFunc(states, func(s netlink.XfrmState) bool { return s.Proto == netlink.XFRM_PROTO_COMP }), err
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
	if len(open) == 0 {
		return
	}
	const shown = 3
	which := strings.Join(open[:min(shown, len(open))], ", ")
	if more := len(open) - shown; more > 0 {
		which += fmt.Sprintf(" and %d more", more)
	}
	remedy := "attach again, or run the service"
	if len(closed) >= maps.MaxTunnels {
		remedy = fmt.Sprintf("more sockets look like tunnels than can be closed, which is %d; find who has them with `ss -uap`", maps.MaxTunnels)
	}
	d.Active = false
	d.Reason = fmt.Sprintf("a tunnel of this host ends at UDP port %s, which is not closed to containers yet: %s", which, remedy)
}
