package container

import (
	"context"
	"errors"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/cri"
)

// CRI is the [Source] of the pods' containers on a Kubernetes node, from its container runtime. On
// a host without pods nobody is asked, and there is no connection, unless the user names the
// runtime.
type CRI struct {
	client *cri.Client
	root   cgroup.Root
}

// OpenCRI returns the Source for the runtime at an endpoint, as [cri.Open] does. The runtime need
// not run, and nothing is sent to it. networks says whether to find out which pods have the host's
// network, as only rules need it. The caller closes the Source, or the [Inventory] that has it.
func OpenCRI(endpoint string, root cgroup.Root, networks bool) (*CRI, error) {
	client, err := cri.Open(endpoint)
	if err != nil {
		return nil, err
	}
	client.Networks = networks
	return &CRI{client, root}, nil
}

// Name implements [Source].
func (c *CRI) Name() string { return "the container runtime" }

// Host implements [Source].
func (c *CRI) Host() string { return c.client.Endpoint() }

// Local implements [Source]. The runtime has a socket of this machine.
func (c *CRI) Local() bool { return true }

// Started implements [Source].
func (c *CRI) Started() bool {
	return (c.client.Named() || c.root != "" && c.root.HasPods()) && c.client.Running()
}

// Dormant implements [Source].
func (c *CRI) Dormant() bool { return !c.client.Named() }

// List implements [Source].
func (c *CRI) List(ctx context.Context) ([]Container, error) {
	if !c.client.Named() && !c.Started() {
		return nil, nil
	}
	found, err := c.client.Containers(ctx)
	if err != nil {
		return nil, err
	}
	all := make([]Container, len(found))
	for i := range found {
		all[i] = c.container(&found[i])
	}
	return all, nil
}

// Inspect implements [Source].
func (c *CRI) Inspect(ctx context.Context, id string) (Container, error) {
	if !c.client.Named() && !c.Started() {
		return Container{}, ErrNoContainer
	}
	found, err := c.client.Inspect(ctx, id)
	if errors.Is(err, cri.ErrNoContainer) {
		err = ErrNoContainer
	}
	return c.container(&found), err
}

func (c *CRI) container(from *cri.Container) Container {
	to := Container{Identity: Identity{ID: from.ID}, Source: c.Name(), Image: from.Image, Labels: from.Pod.Labels, Pid: from.Pid}
	name := from.Name
	if from.Sandbox {
		name = Sandbox
	} else if name != "" {
		to.Names = []string{name}
	}
	if from.Pod.Name != "" && name != "" {
		to.Pod = Pod{Namespace: from.Pod.Namespace, Name: from.Pod.Name, UID: from.Pod.UID, Container: name, HostNetwork: from.Pod.HostNetwork, NetworkUnknown: from.Pod.NetworkUnknown}
		to.Name = to.Pod.fullName()
	}
	return to
}

// Watch implements [Source].
func (c *CRI) Watch(ctx context.Context, fn func(Event)) error {
	made, stop := c.root.WatchPods()
	defer stop()
	return c.client.Watch(ctx, made, func(e cri.Event) {
		fn(Event{Source: c, Action: criActions[e.Action], ID: e.ID, Err: e.Err})
	})
}

// Close implements [Source].
func (c *CRI) Close() error { return c.client.Close() }

var criActions = map[cri.Action]Action{
	cri.Resync: Resync, cri.Lost: Lost, cri.Start: Changed, cri.Stop: Gone,
}
