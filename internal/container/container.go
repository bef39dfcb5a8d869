// Package container keeps an inventory of the containers on this host. That they run, and
// in which cgroups, the kernel tells; what they are called, and of which image they are,
// only the engines that run them can tell, each of which is a [Source].
//
// The filter needs no source: what none tells of has no name, and gets the defaults.
package container

import (
	"errors"
	"fmt"
	"io/fs"
	"path"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Identity is what one container is told from others by.
type Identity struct {
	// ID is the engine's, 64 hexadecimal digits, or else the name of the cgroup.
	ID string `json:"id"`
	// Name is what users call the container; empty if that is not known.
	Name string `json:"name"`
	// CgroupID is the number of the cgroup, unique until the next boot; 0 if it is not
	// known.
	CgroupID uint64 `json:"cgroup_id"`
	// Cgroup is the path below the cgroup2 mount; empty if it is gone or not known.
	Cgroup string `json:"cgroup"`
}

// Container is what is known of a container. Whoever starts it chooses its names and labels.
type Container struct {
	Identity
	// Source is the name of the [Source] that has told of it; empty if none has, and then
	// so is what follows.
	Source string
	// Names are all that are its own.
	Names []string
	// Image is the reference that it was started from.
	Image string
	// Labels are as they were given: any characters, any length.
	Labels map[string]string
	// Pod is the one that it is in, if its source tells. Docker does not.
	Pod Pod
	// Pid is its first process, as the source sees it; 0 if it does not run, and from
	// [Source.List]. The process can have ended since.
	Pid int
}

// Pod is one of Kubernetes'; all is empty outside of pods.
type Pod struct{ Namespace, Name, UID string }

// Subject returns the container as rules see it.
func (c Container) Subject() policy.Subject {
	return policy.Subject{Names: c.Names, Image: c.Image, Labels: c.Labels}
}

// Identify returns the container whose cgroup has an id, without a name. One whose cgroup is
// gone is called after that id.
func Identify(root cgroup.Root, id uint64) (Identity, error) {
	rel, err := root.Find(id)
	if errors.Is(err, fs.ErrNotExist) {
		return Identity{ID: fmt.Sprint("cgroup-", id), CgroupID: id}, nil
	}
	if err != nil {
		return Identity{}, err
	}
	return identity(rel, id), nil
}

// identity returns that of the container in a cgroup, by the name of that.
func identity(rel string, id uint64) Identity {
	name := cgroup.ContainerID(rel)
	if name == "" {
		name = path.Base(rel)
	}
	return Identity{ID: name, CgroupID: id, Cgroup: rel}
}
