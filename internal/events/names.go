package events

import (
	"net"
	"net/netip"
	"strconv"
	"sync"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/explain"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Names tells what numbers in events stand for.
type Names struct {
	// Node is the host's name.
	Node   string
	Filter *loader.Filter
	Root   cgroup.Root
	// Find returns what is known about the container with an engine's id; nil if nobody knows.
	Find func(id string) (container.Container, bool)

	mu sync.Mutex
	// identities are those of containers, by the ids of their cgroups, which the kernel never
	// uses again.
	identities map[uint64]container.Identity
	devices    map[uint32]string
	// policy is the policy in force; nil if there is none. fingerprint is the filter's when it
	// was read.
	policy      *policy.Policy
	fingerprint string
}

// maxIdentities is how many identities are kept. Finding one again takes microseconds.
const maxIdentities = 4096

// describe writes into a record the container whose cgroup has an id, and its pod, and returns all
// that is known about it. It writes nothing if the id is 0.
func (n *Names) describe(r *Record, id uint64) container.Container {
	if id == 0 {
		return container.Container{}
	}
	is := n.identity(id)
	var known container.Container
	if n.Find != nil {
		known, _ = n.Find(is.ID)
	}
	is.Name = known.Name
	known.Identity = is
	r.Container = &Container{ID: is.ID, Name: is.Name, Image: known.Image, Cgroup: is.Cgroup, CgroupID: id}
	if p := known.Pod; p.Name != "" {
		r.K8s = &K8s{Namespace: p.Namespace, Pod: p.Name, PodUID: p.UID, Container: p.Container}
	}
	return known
}

// Container returns the container whose cgroup has an id, as records show it.
func (n *Names) Container(id uint64) Container {
	var r Record
	n.describe(&r, id)
	if r.Container == nil {
		return Container{}
	}
	return *r.Container
}

func (n *Names) identity(id uint64) container.Identity {
	n.mu.Lock()
	defer n.mu.Unlock()
	is, ok := n.identities[id]
	if ok {
		return is
	}
	is, err := container.Identify(n.Root, id)
	if err != nil {
		return container.Identity{ID: "cgroup-" + strconv.FormatUint(id, 10), CgroupID: id}
	}
	if n.identities == nil || len(n.identities) >= maxIdentities {
		n.identities = map[uint64]container.Identity{}
	}
	n.identities[id] = is
	return is
}

// device returns the name of the network device with an index, or the index if it is gone.
func (n *Names) device(index uint32) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if name, ok := n.devices[index]; ok {
		return name
	}
	name := strconv.FormatUint(uint64(index), 10)
	if device, err := net.InterfaceByIndex(int(index)); err == nil {
		name = device.Name
	}
	if n.devices == nil {
		n.devices = map[uint32]string{}
	}
	n.devices[index] = name
	return name
}

// refresh looks whether another policy is in force, and forgets the names of devices, which can
// be renamed. It returns the filter's fingerprint.
func (n *Names) refresh() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.devices = nil
	fingerprint := n.Filter.Fingerprint()
	if fingerprint == n.fingerprint {
		return fingerprint
	}
	// Without a policy, records only lack the rule.
	if _, p, err := n.Filter.Policed(); err == nil {
		n.policy, n.fingerprint = p, fingerprint
	}
	return fingerprint
}

// rule names the entry of the policy in force by which the container c was refused something.
func (n *Names) rule(state *maps.State, c *container.Container, reason bpf.EgressReason, src, dst netip.AddrPort, proto uint8) string {
	n.mu.Lock()
	p := n.policy
	n.mu.Unlock()
	if p == nil {
		return ""
	}
	var entry maps.Container
	if reason == bpf.EgressReasonREASON_RATE_LIMITED && state != nil {
		entry, _, _ = state.Container(c.CgroupID) // else the policy's limit holds
	}
	return explain.Rule(*p, c, entry, reason, src, dst, proto)
}
