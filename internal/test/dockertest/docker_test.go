// Package dockertest tests the real command with a real Docker Engine. The tests start an
// engine of their own, with cgroup v2 and the cgroupfs driver, in a network with no way
// out.
package dockertest

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

const (
	cgroups = "/sys/fs/cgroup"
	outside = "/egressbpf-dockertest" // a parent of containers that is not policed
	image   = "egressbpf-dockertest"
	program = "/dockertest" // this program, in the image
)

func TestMain(m *testing.M) {
	lab.Main(m, unifiedCgroups, "/docker", outside)
}

// unifiedCgroups makes the hybrid layout look like cgroup v2 alone.
func unifiedCgroups() error {
	if err := unix.Unmount(cgroups, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", cgroups, err)
	}
	if err := unix.Mount("none", cgroups, "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", cgroups, err)
	}
	return nil
}

// engine is a Docker Engine on the host of a network.
type engine struct {
	*lab.Network
	client, dir        string
	daemon, containerd *service // nil when they do not run

	// For an engine in a container of another engine: that engine, and the container's name.
	outer *engine
	name  string
}

// startEngine starts an engine on the host of a network. It ends with the test.
func startEngine(t *testing.T, n *lab.Network) *engine {
	t.Helper()
	dir, err := os.MkdirTemp("", "engine-") // Main removes it, mounts and all
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{Network: n, client: "/usr/bin/docker", dir: dir}
	if _, err := os.Stat(e.client); err != nil {
		if e.client, err = exec.LookPath("docker"); err != nil {
			t.Fatal("docker not found: install the Debian package docker.io, or docker-cli where that is apart")
		}
	}
	if _, err := exec.LookPath("iptables"); err != nil {
		t.Fatal("iptables not found: install the Debian package iptables")
	}
	e.Server.IP(t, "route add 172.30.0.0/24 via 10.91.0.1", "route add fd00:d0c::/64 via fd91::1")
	for name, text := range map[string]string{
		"daemon.json": "{}",
		"containerd.toml": fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = %q
`, e.path("root"), e.path("state"), e.path("containerd.sock")),
	} {
		if err := os.WriteFile(e.path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { e.stopDaemon(t) })
	e.startDaemon(t)
	busybox, err := exec.LookPath("busybox")
	if err != nil || !static(t, busybox) {
		t.Fatal("no static busybox found: install the Debian package busybox-static")
	}
	e.importImage(t, image, executable(t, "bin/busybox", busybox), executable(t, program[1:], e.program(t)),
		file{Header: tar.Header{Name: "bin/sh", Linkname: "busybox", Typeflag: tar.TypeSymlink}})
	return e
}

// startDaemon starts the daemon, and a containerd for it, and waits until it answers. dockerd gives a containerd
// of its own 15 s to start, which on an emulated machine can be too little.
func (e *engine) startDaemon(t *testing.T) {
	t.Helper()
	e.containerd = e.start(t, "containerd", "containerd", "--config", e.path("containerd.toml"))
	e.daemon = e.start(t, "dockerd", "docker.io", "--containerd", e.path("containerd.sock"),
		"--config-file", e.path("daemon.json"), "--data-root", e.path("data"), "--exec-root", e.path("exec"),
		"-p", e.path("pid"), "-H", "unix://"+e.path("socket"), "--exec-opt", "native.cgroupdriver=cgroupfs",
		"--bip", "172.30.0.1/24", "--ipv6", "--fixed-cidr-v6", "fd00:d0c::/64")
}

// stopDaemon ends the daemon, if it runs, and the containers with it.
func (e *engine) stopDaemon(t *testing.T) {
	t.Helper()
	for _, s := range []**service{&e.daemon, &e.containerd} {
		if *s != nil {
			(*s).stop(t)
			*s = nil
		}
	}
}

// service is a process that says by sd_notify(3) when it is ready.
type service struct {
	*os.Process
	ended chan error // takes what it ended with
	log   string     // the path of what it wrote
}

// start starts a program of a Debian package as a service on the host.
func (e *engine) start(t *testing.T, name, pkg string, args ...string) *service {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s not found: install the Debian package %s", name, pkg)
	}
	s := &service{log: e.path(name + ".log"), ended: make(chan error, 1)}
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	ready := listenNotify(t, e.path(name+".notify"))
	defer ready.Close()
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+e.path(name+".notify"))
	cmd.Stdout, cmd.Stderr = log, log
	e.Host.Do(func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	s.Process = cmd.Process
	go func() {
		s.ended <- cmd.Wait()
		ready.Close()
	}()
	if err := awaitReady(ready); err != nil {
		s.stop(t)
		t.Fatalf("%s is not ready: %v\n%s", name, err, s.said())
	}
	return s
}

func (s *service) stop(t *testing.T) {
	t.Helper()
	_ = s.Signal(unix.SIGTERM)
	if err := <-s.ended; err != nil {
		t.Errorf("%v\n%s", err, s.said())
	}
}

func (s *service) said() string {
	text, _ := os.ReadFile(s.log)
	return string(text)
}

// listenNotify makes a socket for sd_notify(3).
func listenNotify(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	_ = os.Remove(path)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// awaitReady waits until the service says that it is ready.
func awaitReady(conn *net.UnixConn) error {
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Minute)); err != nil {
		return err
	}
	for buf := make([]byte, 4096); ; {
		n, err := conn.Read(buf)
		if err != nil || bytes.Contains(buf[:n], []byte("READY=1")) {
			return err
		}
	}
}

func (e *engine) path(name string) string { return filepath.Join(e.dir, name) }

// command returns a command of the Docker client.
func (e *engine) command(args ...string) *exec.Cmd {
	if e.outer != nil {
		return e.outer.command(append([]string{"exec", "-i", e.name, "docker", "-H", "unix://" + innerSocket}, args...)...)
	}
	cmd := exec.Command(e.client, args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+e.path("socket"), "DOCKER_CONFIG="+e.dir, "DOCKER_CONTEXT=")
	return cmd
}

// docker runs a command of the Docker client, and returns its output. The command must succeed.
func (e *engine) docker(t *testing.T, args ...string) string {
	t.Helper()
	exit := lab.Run(t, e.command(args...))
	if exit.Code != 0 {
		t.Fatalf("docker %s: exit code %d\n%s%s", strings.Join(args, " "), exit.Code, exit.Stdout, exit.Stderr)
	}
	return strings.TrimSpace(exit.Stdout)
}

// file is a file of an image.
type file struct {
	tar.Header
	content []byte
}

// executable is a file of this machine.
func executable(t *testing.T, name, from string) file {
	t.Helper()
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	return file{tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))}, content}
}

// importImage makes an image from files.
func (e *engine) importImage(t *testing.T, name string, files ...file) {
	t.Helper()
	e.importChanged(t, name, nil, files...)
}

// importChanged makes an image from files, with instructions of a Dockerfile.
func (e *engine) importChanged(t *testing.T, name string, instructions []string, files ...file) {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, f := range files {
		err := w.WriteHeader(&f.Header)
		if err == nil {
			_, err = w.Write(f.content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	args := []string{"import"}
	for _, i := range instructions {
		args = append(args, "--change", i)
	}
	cmd := e.command(append(args, "-", name)...)
	cmd.Stdin = &archive
	if exit := lab.Run(t, cmd); exit.Code != 0 {
		t.Fatalf("docker import: %s", exit.Stderr)
	}
}

// program returns this program, linked statically.
func (e *engine) program(t *testing.T) string {
	t.Helper()
	own := "/proc/self/exe"
	if static(t, own) {
		return own
	}
	own = e.path("program")
	if _, err := os.Stat(own); err == nil {
		return own
	}
	build := exec.Command("go", "test", "-c", "-buildvcs=false", "-o", own, "-ldflags", "-s -w", ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", build, err, out)
	}
	return own
}

func static(t *testing.T, path string) bool {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return true
}

// container is a running container with an agent in it.
type container struct {
	*lab.Agent
	id string
}

// run starts a container that is an agent. It ends with the test.
func (e *engine) run(t *testing.T, name string, flags ...string) *container {
	t.Helper()
	args := append([]string{"run", "-i", "--name", name}, flags...)
	c := &container{Agent: lab.StartAgent(t, e.command(append(args, image, program, lab.AgentArg)...))}
	e.removeAfter(t, name)
	c.Ping()
	c.id = e.id(t, name)
	return c
}

// exec starts one more agent in a container.
func (e *engine) exec(t *testing.T, name string) *lab.Agent {
	t.Helper()
	return lab.StartAgent(t, e.command("exec", "-i", name, program, lab.AgentArg))
}

// sleeper starts a container that does nothing.
func (e *engine) sleeper(t *testing.T, name string, flags ...string) (id string) {
	t.Helper()
	args := append([]string{"run", "-d", "--name", name}, flags...)
	e.removeAfter(t, name)
	return e.docker(t, append(args, image, "/bin/busybox", "sleep", "1000000")...)
}

func (e *engine) removeAfter(t *testing.T, name string) {
	t.Cleanup(func() { e.docker(t, "rm", "-f", name) })
}

func (e *engine) id(t *testing.T, name string) string {
	t.Helper()
	return e.docker(t, "inspect", "-f", "{{.Id}}", name)
}

// readUntil reads until a line has arrived.
func readUntil(t *testing.T, r io.Reader, line string) string {
	t.Helper()
	var all strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(all.String(), line+"\n") {
		n, err := r.Read(buf)
		all.Write(buf[:n])
		if err != nil {
			t.Fatalf("%v before %q, after %q", err, line, all.String())
		}
	}
	return all.String()
}
