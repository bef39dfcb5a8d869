// Package fakecri is a container runtime without containers, for tests: it answers what it is told
// to.
package fakecri

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Runtime is a runtime that listens at a socket. Its fields may be changed within [Runtime.Change].
type Runtime struct {
	runtime.UnimplementedRuntimeServiceServer

	// Sandboxes and Containers are what it lists, whatever filter it is asked for, but for ids.
	Sandboxes  []*runtime.PodSandbox
	Containers []*runtime.Container
	// Networks are the network modes of sandboxes, by id; without one, it does not tell.
	Networks map[string]runtime.NamespaceMode
	// Pids are first processes, by id.
	Pids map[string]string
	// Stalls makes calls of a method wait until their callers give up; "*" all of them.
	Stalls map[string]bool
	// Delay is how long it takes for each list.
	Delay time.Duration
	// HasEvents says whether it tells events.
	HasEvents bool
	// Is is what it says it is.
	Is *runtime.VersionResponse

	mu     sync.Mutex
	asked  map[string]int
	events map[chan *runtime.ContainerEventResponse]bool
	conns  int
	server *grpc.Server
	path   string
	served chan error
}

// Start returns a Runtime that listens at path.
func Start(path string) (*Runtime, error) {
	r := &Runtime{
		path: path, asked: map[string]int{}, events: map[chan *runtime.ContainerEventResponse]bool{},
		Networks: map[string]runtime.NamespaceMode{}, Pids: map[string]string{}, Stalls: map[string]bool{},
	}
	return r, r.Restart()
}

// Restart listens again, after Stop.
func (r *Runtime) Restart() error {
	l, err := net.Listen("unix", r.path)
	if err != nil {
		return err
	}
	server, served := grpc.NewServer(grpc.UnaryInterceptor(r.intercept)), make(chan error, 1)
	runtime.RegisterRuntimeServiceServer(server, r)
	r.server, r.served = server, served
	go func() { served <- server.Serve(counting{l, r}) }()
	return nil
}

// Stop ends all connections, and removes the socket.
func (r *Runtime) Stop() error {
	r.server.Stop()
	if err := <-r.served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	if err := os.Remove(r.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Change calls fn, which may change the Runtime, and then tells an event if it has any.
func (r *Runtime) Change(fn func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fn()
	for to := range r.events {
		select {
		case to <- &runtime.ContainerEventResponse{}:
		default:
		}
	}
}

// Asked returns how often a method was called.
func (r *Runtime) Asked(method string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asked[method]
}

// Connections returns how many connections were made to it.
func (r *Runtime) Connections() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.conns
}

// counting is a listener that counts connections.
type counting struct {
	net.Listener
	of *Runtime
}

// Accept implements net.Listener.
func (l counting) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.of.mu.Lock()
		defer l.of.mu.Unlock()
		l.of.conns++
	}
	return c, err
}

// Following returns how many follow its events.
func (r *Runtime) Following() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.events)
}

func (r *Runtime) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	method := info.FullMethod[len("/runtime.v1.RuntimeService/"):]
	r.mu.Lock()
	r.asked[method]++
	stalls, delay := r.Stalls[method] || r.Stalls["*"], r.Delay
	r.mu.Unlock()
	if strings.HasPrefix(method, "List") {
		time.Sleep(delay)
	}
	if stalls {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return handle(ctx, req)
}

// Version implements the service.
func (r *Runtime) Version(context.Context, *runtime.VersionRequest) (*runtime.VersionResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.Is == nil {
		return &runtime.VersionResponse{RuntimeName: "fake"}, nil
	}
	return r.Is, nil
}

// ListPodSandbox implements the service.
func (r *Runtime) ListPodSandbox(_ context.Context, req *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	answer := &runtime.ListPodSandboxResponse{}
	for _, s := range r.Sandboxes {
		if id := req.GetFilter().GetId(); id == "" || id == s.GetId() {
			answer.Items = append(answer.Items, s)
		}
	}
	return answer, nil
}

// ListContainers implements the service.
func (r *Runtime) ListContainers(_ context.Context, req *runtime.ListContainersRequest) (*runtime.ListContainersResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	answer := &runtime.ListContainersResponse{}
	for _, c := range r.Containers {
		if id := req.GetFilter().GetId(); id == "" || id == c.GetId() {
			answer.Containers = append(answer.Containers, c)
		}
	}
	return answer, nil
}

// PodSandboxStatus implements the service.
func (r *Runtime) PodSandboxStatus(_ context.Context, req *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.Sandboxes {
		if s.GetId() != req.GetPodSandboxId() {
			continue
		}
		answer := &runtime.PodSandboxStatusResponse{Status: &runtime.PodSandboxStatus{Id: s.GetId()}, Info: r.info(req.GetVerbose(), s.GetId())}
		if mode, ok := r.Networks[s.GetId()]; ok {
			answer.Status.Linux = &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{Options: &runtime.NamespaceOption{Network: mode}}}
		}
		return answer, nil
	}
	return nil, status.Error(codes.NotFound, "not found")
}

// ContainerStatus implements the service.
func (r *Runtime) ContainerStatus(_ context.Context, req *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.Containers {
		if c.GetId() == req.GetContainerId() {
			return &runtime.ContainerStatusResponse{Status: &runtime.ContainerStatus{Id: c.GetId()}, Info: r.info(req.GetVerbose(), c.GetId())}, nil
		}
	}
	return nil, status.Error(codes.NotFound, "not found")
}

func (r *Runtime) info(verbose bool, id string) map[string]string {
	if !verbose {
		return nil
	}
	return map[string]string{"info": `{"pid":` + r.Pids[id] + `}`}
}

// GetContainerEvents implements the service.
func (r *Runtime) GetContainerEvents(_ *runtime.GetEventsRequest, to grpc.ServerStreamingServer[runtime.ContainerEventResponse]) error {
	r.mu.Lock()
	r.asked["GetContainerEvents"]++
	has, events := r.HasEvents, make(chan *runtime.ContainerEventResponse, 1)
	if has {
		r.events[events] = true
	}
	r.mu.Unlock()
	if !has {
		return status.Error(codes.Unimplemented, "method GetContainerEvents not implemented")
	}
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.events, events)
	}()
	for {
		select {
		case <-to.Context().Done():
			return to.Context().Err()
		case e := <-events:
			if err := to.Send(e); err != nil {
				return err
			}
		}
	}
}

// Sandbox returns a ready sandbox.
func Sandbox(id, namespace, pod, uid string, labels map[string]string) *runtime.PodSandbox {
	return &runtime.PodSandbox{Id: id, Metadata: &runtime.PodSandboxMetadata{Name: pod, Namespace: namespace, Uid: uid}, Labels: labels}
}

// Container returns a running container in a sandbox.
func Container(id, sandbox, name, image string) *runtime.Container {
	return &runtime.Container{
		Id: id, PodSandboxId: sandbox, Metadata: &runtime.ContainerMetadata{Name: name},
		Image: &runtime.ImageSpec{Image: image}, State: runtime.ContainerState_CONTAINER_RUNNING,
	}
}
