// Package docker asks Docker's daemon about its containers, and changes nothing.
//
// The daemon is trusted to say which container has which name, since only the daemon knows,
// and for nothing that could be checked. Whatever it answers, or if it does not, each call
// takes a bounded time and a bounded amount of memory, and returns no id or name that is
// not one.
package docker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/docker/go-connections/tlsconfig"
	"github.com/moby/moby/client"

	"github.com/egressbpf/egressbpf/internal/text"
)

// ErrHost means that Open cannot reach a host of this form.
var ErrHost = errors.New("want unix:///PATH or tcp://HOST:PORT")

// sockets are the usual places of the daemon's socket; the second is for hosts whose
// /var/run is not /run.
var sockets = []string{"/var/run/docker.sock", "/run/docker.sock"}

// Client asks one daemon. Its methods may be called concurrently.
type Client struct {
	host string
	tls  *tls.Config // nil without TLS
	pace pace
	// connection is replaced whenever the daemon may have been replaced, so that the
	// version of the API is negotiated anew.
	connection atomic.Pointer[connection]
}

// connection is the library's client with the transport below it.
type connection struct {
	*client.Client
	transport *http.Transport
}

// pace is how long a Client waits.
type pace struct {
	answer   time.Duration // for any answer
	ping     time.Duration // between two pings, which find out that a stream has stalled
	retryMin time.Duration // before the first attempt to reconnect
	retryMax time.Duration // before any attempt to reconnect, at most
	steady   time.Duration // how long a stream has to last before the wait starts again at retryMin
}

var usualPace = pace{
	answer:   10 * time.Second,
	ping:     15 * time.Second,
	retryMin: 100 * time.Millisecond,
	retryMax: 5 * time.Second,
	steady:   10 * time.Second,
}

// Open returns a Client of the daemon at host, unix:///PATH or tcp://HOST:PORT. The Client
// connects when it is first asked something, so the daemon need not run.
//
// If host is empty, Open takes the host from DOCKER_HOST, or the daemon's usual socket. As
// with Docker's own client, DOCKER_CERT_PATH and DOCKER_TLS_VERIFY say whether to use TLS
// over TCP, and DOCKER_API_VERSION sets the version instead of negotiating it. The error
// can wrap ErrHost; it names the variable if a variable is wrong.
func Open(host string) (*Client, error) {
	var prefix string
	if host == "" {
		if host = os.Getenv(client.EnvOverrideHost); host != "" {
			prefix = client.EnvOverrideHost + ": "
		} else {
			host = "unix://" + usualSocket()
		}
	}
	c := &Client{host: host, pace: usualPace}
	proto, err := checkHost(host)
	if err != nil {
		return nil, fmt.Errorf("%s%w", prefix, err)
	}
	if proto == "tcp" {
		if c.tls, err = tlsFromEnv(); err != nil {
			return nil, err
		}
	}
	if err := c.connect(); err != nil {
		return nil, fmt.Errorf("%s%q: %w", prefix, host, text.Tame(err))
	}
	return c, nil
}

// Local says whether the daemon is reached through a socket of this machine.
func (c *Client) Local() bool { return strings.HasPrefix(c.host, "unix:") }

// pidFiles are the usual places of the daemon's process id.
var pidFiles = []string{"/var/run/docker.pid", "/run/docker.pid"}

// Running says whether a daemon runs, as far as its usual files tell. It does not connect
// to the socket, since that could start the daemon.
func Running() bool {
	for _, path := range pidFiles {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			continue
		}
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err == nil && strings.TrimSpace(string(name)) == "dockerd" {
			return true
		}
	}
	return false
}

func usualSocket() string {
	for _, path := range sockets {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return sockets[0]
}

func checkHost(host string) (proto string, err error) {
	u, err := url.Parse(host)
	if err != nil || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("%q: %w", host, ErrHost)
	}
	switch u.Scheme {
	case "unix":
		if u.Host == "" && filepath.IsAbs(u.Path) {
			return u.Scheme, nil
		}
	case "tcp":
		if port, err := strconv.ParseUint(u.Port(), 10, 16); err == nil && port > 0 && u.Hostname() != "" {
			return u.Scheme, nil
		}
	case "ssh":
		return "", fmt.Errorf("%q: %w: ssh is not supported, the containers are on this machine", host, ErrHost)
	}
	return "", fmt.Errorf("%q: %w", host, ErrHost)
}

// tlsFromEnv does what client.WithTLSClientConfigFromEnv does, except that it does not go
// without TLS if DOCKER_TLS_VERIFY is set.
func tlsFromEnv() (*tls.Config, error) {
	dir, verify := os.Getenv(client.EnvOverrideCertPath), os.Getenv(client.EnvTLSVerify)
	if dir == "" {
		if verify != "" {
			return nil, fmt.Errorf("%s is set: name the directory of the certificates in %s", client.EnvTLSVerify, client.EnvOverrideCertPath)
		}
		return nil, nil
	}
	config, err := tlsconfig.Client(tlsconfig.Options{
		CAFile:             filepath.Join(dir, "ca.pem"),
		CertFile:           filepath.Join(dir, "cert.pem"),
		KeyFile:            filepath.Join(dir, "key.pem"),
		InsecureSkipVerify: verify == "",
		MinVersion:         tls.VersionTLS12,
	})
	if err != nil {
		return nil, fmt.Errorf("%s=%s: %w", client.EnvOverrideCertPath, dir, err)
	}
	return config, nil
}

// connect sets up the connection that is used from now on. It sends nothing.
func (c *Client) connect() error {
	t := &http.Transport{
		TLSClientConfig:        c.tls,
		MaxIdleConns:           2,
		IdleConnTimeout:        30 * time.Second,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
	}
	dialer := &net.Dialer{Timeout: c.pace.answer}
	if path, ok := strings.CutPrefix(c.host, "unix://"); ok {
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		}
	} else {
		t.Proxy, t.DialContext = http.ProxyFromEnvironment, dialer.DialContext
	}
	scheme := "http"
	if c.tls != nil {
		scheme = "https"
	}
	// WithHost comes first, since it requires the library's own transport.
	api, err := client.New(client.WithHost(c.host), client.WithAPIVersionFromEnv(), client.WithScheme(scheme),
		client.WithHTTPClient(&http.Client{Transport: bounds{t}, CheckRedirect: client.CheckRedirect}))
	if err != nil {
		return err
	}
	if old := c.connection.Swap(&connection{api, t}); old != nil {
		old.transport.CloseIdleConnections()
	}
	return nil
}

// Host returns the address of the daemon.
func (c *Client) Host() string { return c.host }

// Close closes idle connections. It does not end calls in progress.
func (c *Client) Close() error {
	c.connection.Load().transport.CloseIdleConnections()
	return nil
}

// ask calls do with a context that ends when an answer is overdue.
func (c *Client) ask(ctx context.Context, what string, do func(context.Context, *client.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, c.pace.answer)
	defer cancel()
	if err := do(ctx, c.connection.Load().Client); err != nil {
		return fmt.Errorf("%s from Docker at %s: %w", what, c.host, text.Tame(err))
	}
	return nil
}

// Info is what the daemon says about itself.
//
// It does not include the cgroup of containers that name no parent: see ReadConfig.
type Info struct {
	// Version is the daemon's version, such as 29.1.3.
	Version string
	// CgroupDriver is cgroupfs, systemd or none.
	CgroupDriver string
	// CgroupVersion is 1 or 2; 0 if the daemon does not say.
	CgroupVersion int
	// Rootless says whether the daemon puts containers into cgroups of a user.
	Rootless bool
}

// Info asks the daemon about itself.
func (c *Client) Info(ctx context.Context) (Info, error) {
	var info Info
	err := c.ask(ctx, "information", func(ctx context.Context, api *client.Client) error {
		answer, err := api.Info(ctx, client.InfoOptions{})
		if err != nil {
			return err
		}
		info = Info{
			Version:      text.Clean(answer.Info.ServerVersion),
			CgroupDriver: text.Clean(answer.Info.CgroupDriver),
			Rootless:     slices.Contains(answer.Info.SecurityOptions, "name=rootless"),
		}
		switch answer.Info.CgroupVersion {
		case "1":
			info.CgroupVersion = 1
		case "2":
			info.CgroupVersion = 2
		}
		return nil
	})
	return info, err
}
