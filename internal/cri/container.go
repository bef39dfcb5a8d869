package cri

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"regexp"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/egressbpf/egressbpf/internal/text"
)

// ErrNoContainer means that the runtime has no running container or sandbox with an id.
var ErrNoContainer = errors.New("no such container")

// Container is a container of a pod, or the pod's sandbox. Whoever makes the pod chooses the
// names, the labels, the image and the network, and, as far as the cluster permits, the namespace.
type Container struct {
	// ID is 64 hexadecimal digits, as in the name of its cgroup.
	ID string
	// Name is the container's name in its pod; empty for a sandbox.
	Name string
	// Image is the reference that the pod has, or an id with older kubelets; empty for a
	// sandbox.
	Image string
	// Pod is the pod; zero if the runtime says of it what cannot be.
	Pod Pod
	// Sandbox is whether this is the sandbox, which exists before the pod's containers.
	Sandbox bool
	// Pid is the first process, as the runtime sees it; 0 if it does not say, and in the
	// results of Containers. The process may have ended since.
	Pid int
}

// Pod is what a runtime knows of a pod.
type Pod struct {
	Namespace, Name, UID string
	// Labels are the pod's when it was made.
	Labels map[string]string
	// HostNetwork is whether the pod is in the node's network namespace. NetworkUnknown is whether
	// the runtime has not said, or Client.Networks is not set; if it is, Watch tells when the
	// runtime has.
	HostNetwork, NetworkUnknown bool
}

var (
	hexID = regexp.MustCompile(`^[0-9a-f]{64}$`)
	// Names of objects of Kubernetes: a DNS label, and a DNS subdomain.
	label     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	subdomain = regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$`)
	// The uid of a static pod is a hash, without hyphens.
	uid = regexp.MustCompile(`^[0-9a-zA-Z]([-0-9a-zA-Z]{0,62}[0-9a-zA-Z])?$`)
)

// running holds what the runtime says about all that runs, by id.
type running struct {
	sandboxes  map[string]*runtime.PodSandbox
	containers map[string]*runtime.Container
}

// list asks for all ready sandboxes and running containers, or for the one with an id. What has
// no id of the usual form is left out.
func (c *Client) list(ctx context.Context, id string) (r running, err error) {
	r = running{map[string]*runtime.PodSandbox{}, map[string]*runtime.Container{}}
	err = c.ask(ctx, "pods", func(ctx context.Context, api runtime.RuntimeServiceClient) error {
		ready := &runtime.PodSandboxFilter{Id: id, State: &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_READY}}
		answer, err := api.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{Filter: ready})
		if err != nil {
			return err
		}
		for _, s := range answer.GetItems() {
			if hexID.MatchString(s.GetId()) && s.GetState() == runtime.PodSandboxState_SANDBOX_READY {
				r.sandboxes[s.GetId()] = s
			}
		}
		return nil
	})
	if err != nil {
		return r, err
	}
	err = c.ask(ctx, "containers", func(ctx context.Context, api runtime.RuntimeServiceClient) error {
		runs := &runtime.ContainerFilter{Id: id, State: &runtime.ContainerStateValue{State: runtime.ContainerState_CONTAINER_RUNNING}}
		answer, err := api.ListContainers(ctx, &runtime.ListContainersRequest{Filter: runs})
		if err != nil {
			return err
		}
		for _, one := range answer.GetContainers() {
			if hexID.MatchString(one.GetId()) && one.GetState() == runtime.ContainerState_CONTAINER_RUNNING {
				r.containers[one.GetId()] = one
			}
		}
		return nil
	})
	return r, err
}

// Containers asks for all running containers and sandboxes.
func (c *Client) Containers(ctx context.Context) ([]Container, error) {
	r, err := c.list(ctx, "")
	if err != nil {
		return nil, err
	}
	c.forget(r)
	all := make([]Container, 0, len(r.sandboxes)+len(r.containers))
	pods := make(map[string]Pod, len(r.sandboxes))
	// A runtime that does not answer for one sandbox is not asked for the others.
	var silent error
	for id, s := range r.sandboxes {
		pods[id], _ = c.pod(ctx, s, &silent)
		all = append(all, Container{ID: id, Pod: pods[id], Sandbox: true})
	}
	for _, one := range r.containers {
		all = append(all, container(one, pods[one.GetPodSandboxId()]))
	}
	return all, nil
}

// Inspect asks for a container or a sandbox by its whole id. The error wraps [ErrNoContainer] if
// there is none, or it does not run. If the runtime lists the container, and does not answer for the
// status of it or its sandbox, Inspect returns what the lists say besides the error. For a while it
// does not ask for a status again.
func (c *Client) Inspect(ctx context.Context, id string) (Container, error) {
	if !hexID.MatchString(id) {
		return Container{}, ErrNoContainer
	}
	r, err := c.list(ctx, id)
	if err != nil {
		return Container{}, err
	}
	found, sandbox := Container{ID: id, Sandbox: true}, id
	if one := r.containers[id]; one != nil {
		found, sandbox = container(one, Pod{}), one.GetPodSandboxId()
		if r, err = c.list(ctx, sandbox); err != nil {
			return Container{}, err
		}
	} else if r.sandboxes[id] == nil {
		return Container{}, ErrNoContainer
	}
	silent := c.silence()
	if s := r.sandboxes[sandbox]; s != nil {
		found.Pod, err = c.pod(ctx, s, &silent)
	}
	if err == nil {
		err = silent
	}
	if err == nil {
		found.Pid, err = c.pid(ctx, found)
	}
	c.heard(err)
	return found, err
}

// silence returns why the runtime is not to be asked for a status now; nil if it may be.
func (c *Client) silence() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Now().Before(c.until) {
		return c.silent
	}
	return nil
}

// heard takes in what came of asking for a status: each call that is not answered takes long.
func (c *Client) heard(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if errors.Is(err, context.DeadlineExceeded) && !time.Now().Before(c.until) {
		c.silent, c.until = err, time.Now().Add(c.pace.rarely)
	}
}

// pid returns the first process of a container or a sandbox, which the runtime tells for debugging.
func (c *Client) pid(ctx context.Context, of Container) (pid int, err error) {
	what := "a container"
	if of.Sandbox {
		what = "a sandbox"
	}
	err = c.ask(ctx, what, func(ctx context.Context, api runtime.RuntimeServiceClient) (err error) {
		var info map[string]string
		if of.Sandbox {
			var answer *runtime.PodSandboxStatusResponse
			answer, err = api.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: of.ID, Verbose: true})
			info = answer.GetInfo()
		} else {
			var answer *runtime.ContainerStatusResponse
			answer, err = api.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: of.ID, Verbose: true})
			info = answer.GetInfo()
		}
		pid = pidOf(info)
		return gone(err)
	})
	return pid, err
}

// gone returns ErrNoContainer for the error that says so.
func gone(err error) error {
	if status.Code(err) == codes.NotFound {
		return ErrNoContainer
	}
	return err
}

// pidOf reads the process from what runtimes tell for debugging; 0 if it is not there.
func pidOf(info map[string]string) int {
	var about struct {
		Pid int `json:"pid"`
	}
	if json.Unmarshal([]byte(info["info"]), &about) != nil || about.Pid < 0 {
		return 0
	}
	return about.Pid
}

func container(from *runtime.Container, pod Pod) Container {
	c := Container{ID: from.GetId(), Pod: pod}
	if name := from.GetMetadata().GetName(); label.MatchString(name) {
		c.Name = name
	}
	if c.Image = text.Clean(from.GetImage().GetUserSpecifiedImage()); c.Image == "" {
		c.Image = text.Clean(from.GetImage().GetImage())
	}
	return c
}

// pod returns the pod of a sandbox. Lists do not tell whose network a sandbox has, so the runtime
// is asked for each once it is needed, until it says so. It is asked only while silent is nil, and
// silent becomes the error.
func (c *Client) pod(ctx context.Context, s *runtime.PodSandbox, silent *error) (Pod, error) {
	m := s.GetMetadata()
	p := Pod{Namespace: m.GetNamespace(), Name: m.GetName(), UID: m.GetUid(), Labels: s.GetLabels()}
	if !label.MatchString(p.Namespace) || !subdomain.MatchString(p.Name) || !uid.MatchString(p.UID) {
		return Pod{}, nil
	}
	if !c.Networks {
		p.NetworkUnknown = true
		return p, nil
	}
	c.mu.Lock()
	host, known := c.networks[s.GetId()]
	c.mu.Unlock()
	if known {
		p.HostNetwork = host
		return p, nil
	}
	err := *silent
	if err == nil {
		err = c.ask(ctx, "a sandbox", func(ctx context.Context, api runtime.RuntimeServiceClient) error {
			answer, err := api.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: s.GetId()})
			options := answer.GetStatus().GetLinux().GetNamespaces().GetOptions()
			host, known = options.GetNetwork() == runtime.NamespaceMode_NODE, options != nil
			return gone(err)
		})
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && known {
		c.networks[s.GetId()] = host
		p.HostNetwork = host
		return p, nil
	}
	p.NetworkUnknown = true
	c.unknown[s.GetId()] = true
	if err != nil && !errors.Is(err, ErrNoContainer) {
		*silent = err
	}
	return p, err
}

// learn asks for the networks that could not be had, and returns the sandboxes of r of which they are
// known now, with their containers.
func (c *Client) learn(ctx context.Context, r running) map[string]bool {
	c.mu.Lock()
	unknown := maps.Clone(c.unknown)
	c.mu.Unlock()
	told := map[string]bool{}
	var silent error
	for id := range unknown {
		if r.sandboxes[id] == nil {
			continue
		}
		if p, err := c.pod(ctx, r.sandboxes[id], &silent); err == nil && !p.NetworkUnknown {
			told[id] = true
			c.mu.Lock()
			delete(c.unknown, id)
			c.mu.Unlock()
		}
	}
	if len(told) > 0 {
		for id, one := range r.containers {
			if told[one.GetPodSandboxId()] {
				told[id] = false
			}
		}
	}
	return told
}

// forget drops what is known of sandboxes that do not run any more.
func (c *Client) forget(r running) {
	gone := func(id string, _ bool) bool { return r.sandboxes[id] == nil }
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.networks, gone)
	maps.DeleteFunc(c.unknown, gone)
}
