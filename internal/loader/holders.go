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

// Holder is a container that has sockets open which it could not open now: they were opened
// before the policy was in force, or passed in from outside.
type Holder struct {
	// Cgroup is the container's cgroup, as cgroup.Root.Rel returns it.
	Cgroup string
	// Families are the families of the sockets, in order.
	Families []string
}

// protocols maps the kernel's names for sockets that bypass the filter (struct proto) to
// the policy's names for their families.
var protocols = map[string]string{
	"PACKET": "packet", "XDP": "xdp", "RDS": "rds", "AF_VSOCK": "vsock", "TIPC": "tipc", "SMC": "smc", "SMC6": "smc",
	"RXRPC": "rxrpc", "KCM": "kcm", "LLC": "llc", "CAN_RAW": "can", "CAN_BCM": "can", "MCTP": "mctp",
}

// Holders returns the containers that have sockets open which the policy refuses them,
// ordered by their cgroups. It does not find sockets that no process has open, such as one
// on its way to another process.
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
			continue // it is gone
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

// refusedSockets returns the families of a process's open sockets that the policy refuses;
// none if the process has ended. It asks for a name and never opens the socket itself,
// because the last to close a socket may have to wait as long as its owner demands
// (SO_LINGER).
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

// containerOf returns the cgroup one level below the policed one that a process is in, or
// the policed one if the process is in that itself; "" if the process has ended or moved
// out.
func containerOf(pid int, policed string) string {
	rel, err := cgroup.OfProcess(pid)
	if err != nil || !cgroup.Within(rel, policed) {
		return ""
	}
	below := strings.TrimPrefix(rel, policed)
	name, _, _ := strings.Cut(strings.TrimPrefix(below, "/"), "/")
	return strings.TrimSuffix(policed+"/"+name, "/")
}
