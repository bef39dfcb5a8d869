package cgroup

import (
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
)

// DefaultScopes returns the names that known engines give to the cgroups of their
// containers.
func DefaultScopes() []Scope {
	return []Scope{
		"docker-{id}.scope", "{id}", // Docker, with either cgroup driver
		BuildScope,                                                // BuildKit
		"libpod-{id}.scope", "libpod-{id}", "libpod-payload-{id}", // Podman; the last is Quadlet's
		"buildah-*", "crun-buildah-*", "runc-buildah-*", // builds by Podman
		"cri-containerd-{id}.scope", "nerdctl-{id}.scope", "/default/*", // containerd; the last is ctr's
		"crio-{id}.scope", "crio-{id}", // CRI-O
	}
}

// ContainerID returns the id of the container that a cgroup was made for, which is part of
// the cgroup's name; "" if there is none. It knows the names of the default scopes, with
// either cgroup driver.
func ContainerID(rel string) string {
	name := strings.TrimSuffix(path.Base(rel), ".scope")
	begin := len(name) - idLength
	if begin < 0 || !isID(name[begin:]) {
		return ""
	}
	known := func(s Scope) bool { p := s.Parts(); return p.Kind == ScopeID && p.Prefix == name[:begin] }
	if !slices.ContainsFunc(DefaultScopes(), known) {
		return ""
	}
	return name[begin:]
}

// OutermostContainer returns the first cgroup on the way to rel that was made for a container;
// "" if there is none.
func OutermostContainer(rel string) string {
	for end := 1; end <= len(rel); end++ {
		if (end == len(rel) || rel[end] == '/') && ContainerID(rel[:end]) != "" {
			return rel[:end]
		}
	}
	return ""
}

// System is a container that is run like a machine, by an engine that gives it no id.
type System struct {
	Engine string `json:"engine"`
	Name   string `json:"name"`
	// Cgroup is the cgroup of the container, as [Root.Rel] returns it.
	Cgroup string `json:"cgroup"`
}

// systemScopes are the names that LXC (with Incus and LXD) and systemd-nspawn give to the
// cgroups of their containers. The default policy does not include them.
var systemScopes = []struct {
	engine string
	scope  Scope
}{
	{"LXC", "lxc.payload.*"},
	{"systemd-nspawn", "systemd-nspawn@*.service"},
	{"systemd-nspawn", "machine-*.scope"},
}

// systemOf returns the container of this kind whose cgroup has such a name.
func systemOf(rel string) (System, bool) {
	base := path.Base(rel)
	// libvirt registers virtual machines as systemd-nspawn registers containers.
	if strings.HasPrefix(base, "machine-qemu") {
		return System{}, false
	}
	for _, s := range systemScopes {
		if name, ok := s.scope.Parts().variable(base); ok {
			return System{Engine: s.engine, Name: name, Cgroup: rel}, true
		}
	}
	return System{}, false
}

// Containers returns the cgroups of all running containers, which it knows by name, and the
// running containers that are run like machines, which may hold other containers.
func (r Root) Containers() ([]Cgroup, []System, error) {
	named, systems, err := r.Named()
	return r.Running(named), systems, err
}

// Named is Containers, but also returns the cgroups of containers that do not run.
func (r Root) Named() ([]Cgroup, []System, error) {
	var systems []System
	all, err := r.Outermost("/", func(rel string) bool {
		if s, ok := systemOf(rel); ok {
			systems = append(systems, s)
		}
		return ContainerID(rel) != ""
	})
	systems = slices.DeleteFunc(systems, func(s System) bool { return !r.populated(s.Cgroup) })
	return all, systems, err
}

// Running returns those of the cgroups that Runs holds for.
func (r Root) Running(all []Cgroup) []Cgroup {
	running := make([]Cgroup, 0, len(all))
	for _, c := range all {
		if r.Runs(c) {
			running = append(running, c)
		}
	}
	return running
}

// Runs says whether a process runs in a cgroup, or below it.
func (r Root) Runs(c Cgroup) bool { return r.populated(c.Rel) }

// podParents are the cgroups that a kubelet makes in the root for its pods, with either
// cgroup driver.
var podParents = []string{"kubepods", "kubepods.slice"}

// OfPod says whether a cgroup is in one that a kubelet makes for its pods.
func OfPod(rel string) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(rel, "/"), "/")
	return slices.Contains(podParents, first)
}

// podName is the name of a pod's cgroup, with either cgroup driver. The driver of systemd, in whose
// names a hyphen separates levels, has underscores in uids.
var podName = regexp.MustCompile(`^(?:kubelet-)?(?:kubepods-(?:besteffort-|burstable-)?pod([0-9a-zA-Z_]{1,64})\.slice|pod([-0-9a-zA-Z]{1,64}))$`)

// PodUID returns the uid that [Pod] does.
func PodUID(rel string) string {
	_, uid := Pod(rel)
	return uid
}

// Pod returns the cgroup of the pod that a container's cgroup is in, and the pod's uid; "" if it is
// in none. A kubelet makes the cgroup of a container directly in that of its pod.
func Pod(rel string) (pod, uid string) {
	pod = path.Dir(OutermostContainer(rel))
	m := podName.FindStringSubmatch(path.Base(pod))
	// Others have names that begin with pod too, such as Podman.
	if m != nil && (m[1] != "" || strings.Contains(pod, "/kubepods/")) {
		return pod, strings.ReplaceAll(m[1], "_", "-") + m[2]
	}
	return "", ""
}

// HasPods says whether a kubelet has made a cgroup for pods.
func (r Root) HasPods() bool {
	return slices.ContainsFunc(podParents, func(name string) bool {
		_, err := os.Stat(r.Path("/" + name))
		return err == nil
	})
}

// anID is an arbitrary id.
var anID = strings.Repeat("0", idLength)

// PodContainers returns possible cgroups of a pod's container with the systemd driver:
// containerd's and CRI-O's.
func PodContainers() []string {
	const pod = "/kubepods.slice/kubepods-pod0.slice/"
	return []string{pod + "cri-containerd-" + anID + ".scope", pod + "crio-" + anID + ".scope"}
}

// DockerContainer returns a possible cgroup of a Docker container with a cgroup-parent.
// parent is a path, or a slice with the systemd driver.
func DockerContainer(parent string) string {
	if strings.HasSuffix(parent, ".slice") {
		return path.Join("/", parent, "docker-"+anID+".scope")
	}
	return path.Join("/", parent, anID)
}
