// Package cri asks the container runtime of a Kubernetes node about pods and their containers,
// through the Container Runtime Interface (CRI), and changes nothing.
//
// The runtime is trusted to say which container is of which pod, since only the runtime knows, and
// for nothing that could be checked. Whatever it answers, or if it does not, each call takes a
// bounded time and a bounded amount of memory, and returns no id or name that is not one.
package cri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/egressbpf/egressbpf/internal/text"
)

// EndpointVariable names the runtime's endpoint in the environment, as for crictl.
const EndpointVariable = "CONTAINER_RUNTIME_ENDPOINT"

// ErrEndpoint means that Open cannot reach an endpoint of this form.
var ErrEndpoint = errors.New("want unix:///PATH")

// sockets are the usual places of a runtime's socket. Those of distributions come first, and
// containerd's own last, which Docker may have for itself beside another runtime.
var sockets = []string{
	"/run/k3s/containerd/containerd.sock",
	"/run/k0s/containerd.sock",
	"/var/snap/microk8s/common/run/containerd.sock",
	"/run/crio/crio.sock",
	"/run/k3s/cri-dockerd/cri-dockerd.sock",
	"/run/cri-dockerd.sock",
	"/run/containerd/containerd.sock",
}

// Client asks one runtime. Its methods may be called concurrently.
type Client struct {
	// Networks says whether to find out which pods have the host's network, by asking for each pod
	// once. It is set before the Client is used.
	Networks bool

	path string // of the socket; empty to use the first of the usual ones
	pace pace

	mu   sync.Mutex
	conn *grpc.ClientConn
	// to is the path that conn leads to.
	to string
	// networks says which sandboxes have the host's network, by id. It never changes.
	networks map[string]bool
	// unknown are the sandboxes of which it was not told.
	unknown map[string]bool
	// silent is why the runtime did not answer for a status, and until is when Inspect asks for
	// one again.
	silent error
	until  time.Time
}

// pace is how long a Client waits.
type pace struct {
	answer time.Duration // for any answer
	// Between two lists, if the runtime tells events, if it does not, and soon after a pod
	// was made.
	rarely, often, soon time.Duration
	soonFor             time.Duration // how long after it
	retryMin, retryMax  time.Duration // before another attempt to reach the runtime
}

var usualPace = pace{
	answer: 5 * time.Second,
	rarely: 10 * time.Second, often: time.Second, soon: 50 * time.Millisecond, soonFor: 3 * time.Second,
	retryMin: 100 * time.Millisecond, retryMax: time.Second,
}

// maxAnswer is the largest answer that is read, in bytes, as kubelet's own limit.
const maxAnswer = 16 << 20

// Open returns a Client of the runtime at an endpoint, unix:///PATH or a path. If that is empty,
// the Client takes the endpoint from [EndpointVariable], or the first of the usual sockets that
// exists when the runtime is first asked. Nothing is sent to it before. The error wraps
// [ErrEndpoint], and names the variable if that is wrong.
func Open(endpoint string) (*Client, error) {
	c := &Client{pace: usualPace, networks: map[string]bool{}, unknown: map[string]bool{}}
	prefix := ""
	if endpoint == "" {
		if endpoint = os.Getenv(EndpointVariable); endpoint == "" {
			return c, nil
		}
		prefix = EndpointVariable + ": "
	}
	c.path = strings.TrimPrefix(endpoint, "unix://")
	if !filepath.IsAbs(c.path) {
		return nil, fmt.Errorf("%s%q: %w", prefix, endpoint, ErrEndpoint)
	}
	return c, nil
}

// Named says whether the user has named the endpoint.
func (c *Client) Named() bool { return c.path != "" }

// Endpoint returns the endpoint; empty if there is none to be found.
func (c *Client) Endpoint() string {
	if path := c.socket(); path != "" {
		return "unix://" + path
	}
	return ""
}

// Running says whether there is a socket. It sends nothing.
func (c *Client) Running() bool { return isSocket(c.socket()) }

func (c *Client) socket() string {
	if c.path != "" {
		return c.path
	}
	for _, path := range sockets {
		if isSocket(path) {
			return path
		}
	}
	return ""
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().Type() == os.ModeSocket
}

// Close ends the connection.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return nil
	}
	return c.conn.Close()
}

// api returns the runtime's service at the socket that there is now.
func (c *Client) api() (runtime.RuntimeServiceClient, error) {
	path := c.socket()
	if path == "" {
		return nil, fmt.Errorf("no socket of a container runtime: %w", fs.ErrNotExist)
	}
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil && c.to == path {
		return runtime.NewRuntimeServiceClient(c.conn), nil
	}
	conn, err := grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: c.pace.retryMin, Multiplier: 2, Jitter: 0.2, MaxDelay: c.pace.retryMax},
			MinConnectTimeout: c.pace.answer,
		}),
		grpc.WithDisableServiceConfig(), grpc.WithNoProxy())
	if err != nil {
		return nil, err
	}
	if c.conn != nil {
		c.conn.Close()
	}
	c.conn, c.to = conn, path
	return runtime.NewRuntimeServiceClient(conn), nil
}

// ask calls fn, which gets a time limit, and makes its error fit to be shown.
func (c *Client) ask(ctx context.Context, what string, fn func(context.Context, runtime.RuntimeServiceClient) error) error {
	api, err := c.api()
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, c.pace.answer)
		defer cancel()
		err = fn(ctx, api)
	}
	if err == nil || errors.Is(err, ErrNoContainer) {
		return err
	}
	return fmt.Errorf("%s from the container runtime at %s: %w", what, c.socket(), explain(err))
}

// explain says what a runtime's error means. The runtime may have written its text.
func explain(err error) error {
	switch status.Code(err) {
	case codes.Unimplemented:
		return errors.New("it has no CRI of version 1: another socket can be named with --cri-endpoint")
	case codes.DeadlineExceeded:
		return fmt.Errorf("no answer in time: %w", context.DeadlineExceeded)
	case codes.ResourceExhausted:
		return fmt.Errorf("the answer is larger than %d MiB", maxAnswer>>20)
	}
	return text.Tame(err)
}
