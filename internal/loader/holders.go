package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Holder is a container that has sockets open which it could not make any more: they
// were made before the policy was in force, or handed in from outside.
type Holder struct {
	// Cgroup is the container's, as cgroup.Root.Rel returns it.
	Cgroup string
	// Families of the sockets, in order.
	Families []string
}

// protocols are the names that the kernel gives to sockets of families that send by a
// road of their own (struct proto), and what the policy calls these families.
var protocols = map[string]string{
	"PACKET": "packet", "XDP": "xdp", "RDS": "rds", "AF_VSOCK": "vsock", "TIPC": "tipc", "SMC": "smc", "SMC6": "smc",
	"RXRPC": "rxrpc", "KCM": "kcm", "LLC": "llc", "CAN_RAW": "can", "CAN_BCM": "can", "MCTP": "mctp",
}

// Holders returns the containers that have sockets open which their policy refuses,
// in the order of their cgroups. Sockets that no process has open, such as one on its
// way to another process, are not found.
func (f *Filter) Holders() ([]Holder, error) {
	all, err := f.installed()
	if err != nil {
		return nil, err
	}
	defer closeAll(all)
	found := map[string][]string{}
	state, err := f.State()
	if errors.Is(err, ErrNotAttached) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer state.Close()
	known, err := state.Containers()
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		if p.gone || p.doc == nil {
			continue
		}
		recognises := p.doc.Policy.Recognises(p.rel)
		rels, err := f.containersIn(p.rel, p.doc.Policy)
		if err != nil {
			return nil, err
		}
		for _, rel := range rels {
			err := f.root.Processes(rel, func(pid int) {
				for _, family := range refusedSockets(pid, p.doc.Policy.Families) {
					container := rel
					if !recognises {
						container = containerOf(pid, rel)
					}
					if container != "" && !slices.Contains(found[container], family) {
						found[container] = append(found[container], family)
					}
				}
			})
			if err != nil {
				return nil, fmt.Errorf("look for open sockets: %w", err)
			}
		}
	}
	var holders []Holder
	for container, families := range found {
		id, err := f.root.ID(container)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has ended
		}
		if err != nil {
			return nil, err
		}
		own := maps.FamiliesOf(known[id].Flags)
		families = slices.DeleteFunc(families, own.Allows)
		if len(families) == 0 {
			continue
		}
		slices.Sort(families)
		holders = append(holders, Holder{container, families})
	}
	slices.SortFunc(holders, func(a, b Holder) int { return strings.Compare(a.Cgroup, b.Cgroup) })
	return holders, nil
}

// refusedSockets returns the families of a process's open sockets that are refused. It
// asks for a name and never has the socket open itself: whoever closes a socket last
// may have to wait for as long as its owner says (SO_LINGER). A process that has ended
// has none.
func refusedSockets(pid int, allowed policy.Families) (families []string) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	name := make([]byte, 32)
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		if target, err := os.Readlink(path); err != nil || !strings.HasPrefix(target, "socket:") {
			continue
		}
		n, err := unix.Getxattr(path, "system.sockprotoname", name)
		if err != nil {
			continue
		}
		family, ok := protocols[unix.ByteSliceToString(name[:n])]
		if ok && !allowed.Allows(family) && !slices.Contains(families, family) {
			families = append(families, family)
		}
	}
	return families
}

// containerOf returns the cgroup one level below the policed one that a process is in,
// or the policed one if that is where it is; "" if it has ended or moved out.
func containerOf(pid int, policed string) string {
	rel, err := cgroup.OfProcess(pid)
	if err != nil || !cgroup.Within(rel, policed) {
		return ""
	}
	below := strings.TrimPrefix(rel, policed)
	name, _, _ := strings.Cut(strings.TrimPrefix(below, "/"), "/")
	return strings.TrimSuffix(policed+"/"+name, "/")
}
