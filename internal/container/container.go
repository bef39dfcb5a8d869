// Package container keeps an inventory of the containers on this host. The kernel tells
// which containers run and in which cgroups. Only the engines that run them know their
// names and images; each engine is a [Source].
//
// The filter needs no source. A container that no source knows has no name, and gets the
// defaults.
package container

import (
	"errors"
	"fmt"
	"io/fs"
	"path"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Identity tells a container from all others.
type Identity struct {
	// ID is the engine's id, 64 hexadecimal digits, or otherwise the name of the
	// cgroup.
	ID string `json:"id"`
	// Name is the name that users know; empty if it is not known.
	Name string `json:"name"`
	// CgroupID is the number of the cgroup, unique until the next boot; 0 if it is not
	// known.
	CgroupID uint64 `json:"cgroup_id"`
	// Cgroup is the path below the cgroup2 mount; empty if the cgroup is gone or not
	// known.
	Cgroup string `json:"cgroup"`
}

// Container is what is known about a container. Whoever starts the container chooses its
// names and labels.
type Container struct {
	Identity
	// Source is the name of the [Source] that knows the container. If no source does,
	// Source is empty, and so are the fields below.
	Source string
	// Names are the container's own names; of a container in a pod, its name in the pod.
	Names []string
	// Image is the reference that the container was started from.
	Image string
	// Labels are as their author wrote them: any characters, any length. Those of a container
	// in a pod are the pod's.
	Labels map[string]string
	// Pod is the container's pod, if its source knows pods. Docker does not.
	Pod Pod
	// Pid is the container's first process, as the source sees it. It is 0 if the
	// container does not run, and in the results of [Source.List]. The process may have
	// ended since.
	Pid int
}

// Pod is a pod of Kubernetes; empty for a container outside of pods.
type Pod struct {
	Namespace, Name, UID string
	// Container is the name of the container in the pod; [Sandbox] for the pod's sandbox.
	Container string
	// HostNetwork is whether the pod is in the network namespace of its node; false if
	// NetworkUnknown.
	HostNetwork, NetworkUnknown bool
}

// Sandbox stands for the name of a sandbox, which has none. It cannot be that of a container.
const Sandbox = "POD"

// fullName returns the name that users know.
func (p Pod) fullName() string { return p.Namespace + "/" + p.Name + "/" + p.Container }

// Subject returns the container in the form that rules match.
func (c Container) Subject() policy.Subject {
	s := policy.Subject{Names: c.Names, Image: c.Image, Labels: c.Labels}
	// Names of cgroups are made by the kubelet, and those that a source tells have to fit.
	if c.Pod.UID != "" && cgroup.PodUID(c.Cgroup) == c.Pod.UID {
		s.Namespace, s.Pod = c.Pod.Namespace, c.Pod.Name
		s.HostNetwork, s.NetworkUnknown = c.Pod.HostNetwork, c.Pod.NetworkUnknown
	} else {
		// Another source than that of pods may know the container, and be quicker.
		s.PodUnknown = c.Pod.UID != "" || cgroup.PodUID(c.Cgroup) != ""
	}
	return s
}

// Identify returns the container whose cgroup has an id, without its name. If the cgroup is
// gone, the ID is made from the cgroup's id.
func Identify(root cgroup.Root, id uint64) (Identity, error) {
	rel, err := root.Find(id)
	if errors.Is(err, fs.ErrNotExist) {
		return Identity{ID: fmt.Sprint("cgroup-", id), CgroupID: id}, nil
	}
	if err != nil {
		return Identity{}, err
	}
	return IdentityOf(rel, id), nil
}

// IdentityOf returns the identity of the container in a cgroup, by the cgroup's name.
func IdentityOf(rel string, id uint64) Identity {
	name := cgroup.ContainerID(rel)
	if name == "" {
		name = path.Base(rel)
	}
	return Identity{ID: name, CgroupID: id, Cgroup: rel}
}
