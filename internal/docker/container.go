package docker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"github.com/egressbpf/egressbpf/internal/text"
)

// ErrNoContainer means that the daemon has no container with an id.
var ErrNoContainer = errors.New("no such container")

// Container is a container of the daemon. Whoever starts the container chooses its name and
// labels, within what the daemon accepts.
type Container struct {
	// ID is 64 hexadecimal digits, as in the name of its cgroup.
	ID string
	// Name is the name that Docker shows, without a slash; empty if the container has
	// none, or one with characters that Docker never accepts in a name.
	Name string
	// Names are all names, including links from other containers (web/db).
	Names []string
	// Labels are as their author wrote them: any characters, any length.
	Labels map[string]string
	// Image is the reference that the container was started from, and ImageID the image
	// that it stood for then.
	Image, ImageID string
	// Networks are the networks that the container is in, ordered by name.
	Networks []Network

	// Pid is the container's first process, as the daemon sees it. It is 0 if the
	// container does not run, and in the results of Containers. The process may have
	// ended since.
	Pid int
	// CgroupParent is the parent that the container was started with; empty if the
	// daemon chose it, and in the results of Containers.
	CgroupParent string
}

// Network is a network that a container is in.
type Network struct {
	Name string
	// ID is the daemon's id of the network; empty if it is not known yet. The bridge of
	// a network is called br- and the first 12 digits of the ID, unless it was given
	// another name.
	ID string
}

var (
	hexID     = regexp.MustCompile(`^[0-9a-f]{64}$`)
	plainName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)
	// Networks of a swarm have ids that are not hexadecimal.
	networkID = regexp.MustCompile(`^[0-9a-z]{12,64}$`)
)

// Containers asks for all running containers.
func (c *Client) Containers(ctx context.Context) ([]Container, error) {
	var found []Container
	err := c.ask(ctx, "containers", func(ctx context.Context, api *client.Client) error {
		answer, err := api.ContainerList(ctx, client.ContainerListOptions{})
		if err != nil {
			return err
		}
		found = make([]Container, 0, len(answer.Items))
		for i := range answer.Items {
			s := &answer.Items[i]
			if err := checkID(s.ID); err != nil {
				return err
			}
			one := Container{ID: s.ID, Labels: s.Labels, Image: text.Clean(s.Image), ImageID: text.Clean(s.ImageID)}
			one.setNames(s.Names)
			if s.NetworkSettings != nil {
				one.setNetworks(s.NetworkSettings.Networks)
			}
			found = append(found, one)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// Inspect asks for a container by its whole id. The error wraps ErrNoContainer if there is
// none.
func (c *Client) Inspect(ctx context.Context, id string) (Container, error) {
	found := Container{ID: id}
	if err := checkID(id); err != nil {
		return found, err
	}
	err := c.ask(ctx, "container "+id[:12], func(ctx context.Context, api *client.Client) error {
		answer, err := api.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
		if errdefs.IsNotFound(err) {
			return ErrNoContainer
		}
		if err != nil {
			return err
		}
		return found.fill(&answer.Container)
	})
	return found, err
}

func (c *Container) fill(from *container.InspectResponse) error {
	if from.ID != c.ID {
		return fmt.Errorf("the answer is about another container: %.64q", from.ID)
	}
	c.ImageID = text.Clean(from.Image)
	c.setNames([]string{from.Name})
	if from.Config != nil {
		c.Image, c.Labels = text.Clean(from.Config.Image), from.Config.Labels
	}
	if from.NetworkSettings != nil {
		c.setNetworks(from.NetworkSettings.Networks)
	}
	if from.HostConfig != nil {
		c.CgroupParent = text.Clean(from.HostConfig.CgroupParent)
	}
	if from.State != nil {
		if from.State.Pid < 0 {
			return fmt.Errorf("process id %d", from.State.Pid)
		}
		c.Pid = from.State.Pid
	}
	return nil
}

func checkID(id string) error {
	if !hexID.MatchString(id) {
		return fmt.Errorf("%.64q is not the id of a container: want 64 hexadecimal digits", id)
	}
	return nil
}

// nameOf returns a name as users know it; "" if it is not a valid name.
func nameOf(name string) string {
	name = strings.TrimPrefix(name, "/")
	if text.Clean(name) == "" || !plainName.MatchString(name) {
		return ""
	}
	return name
}

func (c *Container) setNames(names []string) {
	for _, name := range names {
		name = strings.TrimPrefix(name, "/")
		link, alias, linked := strings.Cut(name, "/")
		switch {
		case linked && nameOf(link) != "" && nameOf(alias) != "":
			c.Names = append(c.Names, name)
		case !linked && nameOf(name) != "":
			c.Name = cmp.Or(c.Name, name)
			c.Names = append(c.Names, name)
		}
	}
}

func (c *Container) setNetworks(networks map[string]*network.EndpointSettings) {
	for name, endpoint := range networks {
		if name = text.Clean(name); name == "" || endpoint == nil {
			continue
		}
		n := Network{Name: name}
		if networkID.MatchString(endpoint.NetworkID) {
			n.ID = endpoint.NetworkID
		}
		c.Networks = append(c.Networks, n)
	}
	slices.SortFunc(c.Networks, func(a, b Network) int { return strings.Compare(a.Name, b.Name) })
}
