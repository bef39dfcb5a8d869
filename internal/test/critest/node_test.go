// Package critest tests the real command on a node of Kubernetes without its kubelet: a real
// containerd, with CNI and the cgroupfs driver, runs pods that the tests ask it for as a kubelet
// does. The node is in a network with no way out, and has /run and /var/lib for itself.
//
// Pods in cgroups of the systemd driver need systemd, and are not tried here.
package critest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

const (
	cgroups = "/sys/fs/cgroup"
	// socket is where containerd has its socket by default.
	socket   = "/run/containerd/containerd.sock"
	endpoint = "unix://" + socket
	image    = "test.invalid/inpod:1"
	pause    = "test.invalid/pause:1" // for sandboxes
	hasty    = "test.invalid/hasty:1" // for sandboxes that try to reach the metadata service first
	plugins  = "/usr/lib/cni"
	inpod    = "/inpod" // the program of inpod/main.go, in the image
)

func TestMain(m *testing.M) {
	lab.Main(m, prepare, "/kubepods", "/kubepods.slice", "/docker")
}

// prepare makes any layout look like cgroup v2 alone, and hides what the machine's own engines
// have at the paths that this one uses.
func prepare() error {
	if err := unix.Unmount(cgroups, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", cgroups, err)
	}
	if err := unix.Mount("none", cgroups, "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", cgroups, err)
	}
	for _, dir := range []string{"/run", "/var/lib"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	return nil
}

// withoutShares is a runc that does not divide the CPU between pods: where cgroup v1 has the
// controllers, as in the hybrid layout, the unified hierarchy has none.
//
//go:embed runc-without-shares
var withoutShares string

// node is a machine with containerd.
type node struct {
	*lab.Network
	dir    string
	daemon *exec.Cmd  // nil when it does not run
	ended  chan error // takes what it ended with
	api    runtime.RuntimeServiceClient
}

// The networks of pods: behind a bridge, or routed to veths whose names tell nothing.
const (
	bridged = `"type": "bridge", "bridge": "cni0", "isGateway": true`
	routed  = `"type": "ptp"`
)

// startNode starts containerd on the host of a network, with an image for sandboxes. It ends with
// the test.
func startNode(t *testing.T, n *lab.Network, sandbox string) *node {
	t.Helper()
	return startNodeWith(t, n, sandbox, bridged)
}

// startNodeWith is startNode with a network of pods.
func startNodeWith(t *testing.T, n *lab.Network, sandbox, network string) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "node-") // Main removes it, mounts and all
	if err != nil {
		t.Fatal(err)
	}
	k := &node{Network: n, dir: dir}
	for path, pkg := range map[string]string{plugins + "/bridge": "containernetworking-plugins", plugins + "/ptp": "containernetworking-plugins", plugins + "/host-local": "containernetworking-plugins"} {
		if _, err := os.Stat(path); err != nil {
			t.Fatalf("%v: install the Debian package %s", err, pkg)
		}
	}
	k.Server.IP(t, "route add 172.30.0.0/16 via 10.91.0.1")
	// Virtual machines can lack the capability to lower the score of the OOM killer, which
	// sandboxes have otherwise.
	k.write(t, "config.toml", fmt.Sprintf(`version = 2
root = %q
state = "/run/containerd"
[grpc]
  address = %q
[plugins."io.containerd.internal.v1.opt"]
  path = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = %q
`, k.path("root"), socket, k.path("opt"), sandbox, plugins, k.path("cni"), k.path("runc")))
	k.write(t, "runc", withoutShares)
	if err := os.Chmod(k.path("runc"), 0o755); err != nil {
		t.Fatal(err)
	}
	k.write(t, "cni/pods.conflist", fmt.Sprintf(`{
	"cniVersion": "0.4.0", "name": "pods",
	"plugins": [{
		%s,
		"ipam": {
			"type": "host-local", "dataDir": %q,
			"ranges": [[{"subnet": "172.30.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]
		}
	}]
}`, network, k.path("ipam")))
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	k.api = runtime.NewRuntimeServiceClient(conn)
	t.Cleanup(func() {
		k.stop(t, unix.SIGTERM)
		for _, parent := range []string{"/kubepods/besteffort", "/kubepods"} {
			if err := unix.Rmdir(cgroups + parent); err != nil && err != unix.ENOENT {
				t.Errorf("remove %s: %v", parent, err)
			}
		}
	})
	k.start(t)
	k.importImages(t)
	return k
}

func (k *node) path(name string) string { return filepath.Join(k.dir, name) }

func (k *node) write(t *testing.T, name, text string) string {
	t.Helper()
	path := k.path(name)
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte(text), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// start starts containerd and waits until it can make pods.
func (k *node) start(t *testing.T) {
	t.Helper()
	daemon, err := exec.LookPath("containerd")
	if err != nil {
		t.Fatal("containerd not found: install the Debian package containerd")
	}
	log, err := os.OpenFile(k.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(daemon, "--config", k.path("config.toml"))
	cmd.Stdout, cmd.Stderr = log, log
	k.Host.Do(func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	k.daemon, k.ended = cmd, ended
	go func() { ended <- cmd.Wait() }()
	var last string
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		answer, err := k.api.Status(ctx, &runtime.StatusRequest{}, grpc.WaitForReady(true))
		cancel()
		ready := err == nil
		for _, c := range answer.GetStatus().GetConditions() {
			ready = ready && c.GetStatus()
		}
		if ready {
			return
		}
		last = fmt.Sprint(answer, err)
		select {
		case err := <-ended:
			k.daemon = nil
			t.Fatalf("containerd: %v\n%s", err, k.log())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("containerd is not ready: %s\n%s", last, k.log())
		}
	}
}

func (k *node) log() string {
	text, _ := os.ReadFile(k.path("log"))
	return string(text)
}

// stop ends containerd, if it runs. Its pods go on.
func (k *node) stop(t *testing.T, sig unix.Signal) {
	t.Helper()
	if k.daemon == nil {
		return
	}
	_ = k.daemon.Process.Signal(sig)
	k.daemon = nil
	if err := <-k.ended; err != nil && sig == unix.SIGTERM {
		t.Errorf("containerd: %v\n%s", err, k.log())
	}
	if t.Failed() && testing.Verbose() {
		t.Logf("containerd:\n%s", k.log())
	}
}

// importImages gives containerd its images, which differ in their commands.
func (k *node) importImages(t *testing.T) {
	t.Helper()
	program, err := buildInpod()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	layer := archive(t, inpod[1:], content)
	sum := sha256.Sum256(layer)
	files, manifests := []any{"layer.tar", layer}, []any{}
	for name, tags := range map[string][]string{"waits.json": {image, pause}, "hurries.json": {hasty}} {
		command := []string{inpod}
		if tags[0] == hasty {
			command = append(command, metadata)
		}
		files = append(files, name, encode(t, map[string]any{
			"architecture": goruntime.GOARCH, "os": "linux", "config": map[string]any{"Entrypoint": command},
			"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(sum[:])}},
		}))
		manifests = append(manifests, map[string]any{"Config": name, "RepoTags": tags, "Layers": []string{"layer.tar"}})
	}
	files = append(files, "manifest.json", encode(t, manifests))
	tarball := k.write(t, "images.tar", string(archive(t, files...)))
	exit := lab.Run(t, exec.Command("ctr", "--address", socket, "--namespace", "k8s.io", "images", "import", tarball))
	if exit.Code != 0 {
		t.Fatalf("ctr images import: %s", exit.Stderr)
	}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// archive makes a tar file of names and contents.
func archive(t *testing.T, files ...any) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		content := files[i+1].([]byte)
		err := w.WriteHeader(&tar.Header{Name: files[i].(string), Mode: 0o755, Size: int64(len(content))})
		if err == nil {
			_, err = w.Write(content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

var buildInpod = sync.OnceValues(func() (string, error) {
	path := filepath.Join(os.TempDir(), "inpod") // Main removes it
	cmd := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-s -w", "-o", path, "./inpod")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return path, nil
})

var serial atomic.Uint32

// newUID returns a pod's uid.
func newUID() string { return fmt.Sprintf("%08x-5afe-4c0d-8bad-0123456789ab", serial.Add(1)) }

// pod is a pod that runs.
type pod struct {
	node   *node
	id     string // of the sandbox
	uid    string
	config *runtime.PodSandboxConfig
}

// podCgroup returns the path of a pod's cgroup below the root, as a kubelet calls it.
func podCgroup(uid string) string { return "/kubepods/besteffort/pod" + uid }

// podConfig describes a pod as a kubelet does.
func (k *node) podConfig(namespace, name string) *runtime.PodSandboxConfig {
	uid := newUID()
	return &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Namespace: namespace, Name: name, Uid: uid},
		Hostname: name, LogDirectory: k.path("logs/" + uid),
		Labels: map[string]string{
			"io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.name": name, "io.kubernetes.pod.uid": uid,
		},
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent:    podCgroup(uid),
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}},
		},
	}
}

// onHost gives a pod the network of the node.
func onHost(c *runtime.PodSandboxConfig) {
	c.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	c.Hostname = ""
}

// pod makes a pod, after its cgroup. It ends with the test.
func (k *node) pod(t *testing.T, namespace, name string, changes ...func(*runtime.PodSandboxConfig)) *pod {
	t.Helper()
	config := k.podConfig(namespace, name)
	for _, change := range changes {
		change(config)
	}
	p, err := k.runPod(t.Context(), config)
	if err != nil {
		t.Fatalf("%v\n%s", err, k.log())
	}
	t.Cleanup(func() {
		if err := p.remove(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// runPod makes a pod's cgroup, and its sandbox.
func (k *node) runPod(ctx context.Context, config *runtime.PodSandboxConfig) (*pod, error) {
	p := &pod{node: k, uid: config.Metadata.Uid, config: config}
	for _, dir := range []string{config.LogDirectory, p.cgroup()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	made, err := k.api.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config})
	p.id = made.GetPodSandboxId()
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", config.Metadata.Name, err)
	}
	return p, nil
}

// cgroup is the directory of the pod's cgroup.
func (p *pod) cgroup() string { return cgroups + podCgroup(p.uid) }

// remove removes the pod with its containers, and then its cgroup.
func (p *pod) remove() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if _, err := p.node.api.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.id}); status.Code(err) == codes.NotFound {
		return nil // a test has removed it
	} else if err != nil {
		return fmt.Errorf("stop %s: %w", p.config.Metadata.Name, err)
	}
	if _, err := p.node.api.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("remove %s: %w", p.config.Metadata.Name, err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		err := os.Remove(p.cgroup())
		if err == nil || os.IsNotExist(err) {
			return nil
		}
		if time.Now().After(deadline) {
			return err
		}
	}
}

// container is a container of a pod.
type container struct {
	pod     *pod
	id, log string
}

// container starts a container that runs inpod. It ends with its pod.
func (p *pod) container(t *testing.T, name string, args ...string) *container {
	t.Helper()
	c, err := p.run(t.Context(), name, args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, p.node.log())
	}
	return c
}

func (p *pod) run(ctx context.Context, name string, args ...string) (*container, error) {
	log := name + ".log"
	config := &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: name},
		Image:    &runtime.ImageSpec{Image: image, UserSpecifiedImage: image},
		Command:  append([]string{inpod}, args...), LogPath: log,
		Labels: map[string]string{"io.kubernetes.container.name": name},
		Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{
			NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions,
		}},
	}
	made, err := p.node.api.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: p.id, Config: config, SandboxConfig: p.config})
	if err == nil {
		_, err = p.node.api.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: made.GetContainerId()})
	}
	if err != nil {
		return nil, fmt.Errorf("container %s of %s: %w", name, p.config.Metadata.Name, err)
	}
	return &container{p, made.GetContainerId(), filepath.Join(p.config.LogDirectory, log)}, nil
}

// attempt starts a container that tries to reach the metadata service and to make a packet socket,
// and returns how that went, as allowed and blocked do.
func (p *pod) attempt(t *testing.T, name string) string {
	t.Helper()
	return p.container(t, name, metadata).said(t, 2)
}

var metadata = lab.Metadata4.String() + ":80"

// said waits for a number of lines of output.
func (c *container) said(t *testing.T, lines int) string {
	t.Helper()
	var said []string
	testenv.Eventually(t, "output of a container", func() bool {
		said = nil
		text, _ := os.ReadFile(c.log)
		for line := range strings.Lines(string(text)) {
			// TIME STREAM F TEXT
			if fields := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4); len(fields) == 4 {
				said = append(said, fields[3])
			}
		}
		return len(said) >= lines
	})
	return strings.Join(said, ", ")
}

// again runs inpod once more in a running container.
func (c *container) again(t *testing.T) string {
	t.Helper()
	answer, err := c.pod.node.api.ExecSync(t.Context(), &runtime.ExecSyncRequest{ContainerId: c.id, Cmd: []string{inpod, metadata, "once"}, Timeout: 20})
	if err != nil || answer.GetExitCode() != 0 {
		t.Fatalf("exec: %v, %s", err, answer)
	}
	return strings.ReplaceAll(strings.TrimSpace(string(answer.GetStdout())), "\n", ", ")
}
