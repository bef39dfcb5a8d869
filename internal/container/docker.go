package container

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/docker"
)

// Docker is the [Source] of the containers of a Docker daemon.
type Docker struct{ client *docker.Client }

// OpenDocker returns the Source for the daemon at a host, as [docker.Open] does. The daemon
// need not run, and nothing is sent to it. The caller closes the Source, or the [Inventory]
// that has it.
func OpenDocker(host string) (*Docker, error) {
	client, err := docker.Open(host)
	if err != nil {
		return nil, err
	}
	return &Docker{client}, nil
}

// Name implements [Source].
func (d *Docker) Name() string { return "Docker" }

// Host implements [Source].
func (d *Docker) Host() string { return d.client.Host() }

// Local implements [Source].
func (d *Docker) Local() bool { return d.client.Local() }

// Started implements [Source].
func (d *Docker) Started() bool { return docker.Running() || d.mounted() }

// Dormant implements [Source].
func (d *Docker) Dormant() bool { return false }

// mounted says whether this process is in a container that has the socket. The daemon's other files
// are not there, and whoever mounts the socket wants the daemon to be asked.
func (d *Docker) mounted() bool {
	path, ok := strings.CutPrefix(d.Host(), "unix://")
	if !ok || cgroup.OwnContainer() == "" {
		return false
	}
	info, err := os.Stat(path)
	return err == nil && info.Mode().Type() == os.ModeSocket
}

// List implements [Source].
func (d *Docker) List(ctx context.Context) ([]Container, error) {
	found, err := d.client.Containers(ctx)
	if err != nil {
		return nil, err
	}
	all := make([]Container, len(found))
	for i, c := range found {
		all[i] = d.container(c)
	}
	return all, nil
}

// Inspect implements [Source].
func (d *Docker) Inspect(ctx context.Context, id string) (Container, error) {
	c, err := d.client.Inspect(ctx, id)
	if errors.Is(err, docker.ErrNoContainer) {
		err = ErrNoContainer
	}
	if err != nil {
		return Container{}, err
	}
	return d.container(c), nil
}

func (d *Docker) container(c docker.Container) Container {
	// A link gives a container a name within another container's; that is not its own
	// name.
	names := slices.DeleteFunc(slices.Clone(c.Names), func(name string) bool { return strings.Contains(name, "/") })
	return Container{
		Identity: Identity{ID: c.ID, Name: c.Name}, Source: d.Name(),
		Names: names, Image: c.Image, Labels: c.Labels, Pid: c.Pid,
	}
}

// Watch implements [Source].
func (d *Docker) Watch(ctx context.Context, fn func(Event)) error {
	return d.client.Watch(ctx, func(e docker.Event) {
		fn(Event{Source: d, Action: actions[e.Action], ID: e.ID, Err: e.Err})
	})
}

// Close implements [Source].
func (d *Docker) Close() error { return d.client.Close() }

var actions = map[docker.Action]Action{
	docker.Resync: Resync, docker.Lost: Lost,
	docker.Start: Changed, docker.Rename: Changed, docker.Update: Changed,
	docker.Die: Gone, docker.Destroy: Gone,
}
