package critest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

const agentImage = "test.invalid/egressbpf:1"

// daemonSet is what a kubelet reads of the DaemonSet in dist/kubernetes/egressbpf.yaml.
type daemonSet struct {
	Spec struct {
		Template struct {
			Spec struct {
				HostPID     bool `yaml:"hostPID"`
				HostNetwork bool `yaml:"hostNetwork"`
				Containers  []struct {
					Args            []string
					Env             []struct{ Name, Value string }
					SecurityContext struct {
						ReadOnlyRootFilesystem bool `yaml:"readOnlyRootFilesystem"`
						Capabilities           struct{ Add, Drop []string }
						SeccompProfile         struct{ Type string } `yaml:"seccompProfile"`
					} `yaml:"securityContext"`
					VolumeMounts []struct {
						Name             string
						MountPath        string `yaml:"mountPath"`
						ReadOnly         bool   `yaml:"readOnly"`
						MountPropagation string `yaml:"mountPropagation"`
					} `yaml:"volumeMounts"`
				}
				Volumes []struct {
					Name     string
					HostPath struct{ Path string } `yaml:"hostPath"`
				}
			}
		}
	}
}

// manifests returns the DaemonSet and the config file of the committed manifests.
func manifests(t *testing.T) (ds daemonSet, config string) {
	t.Helper()
	f, err := os.Open("../../../dist/kubernetes/egressbpf.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for in := yaml.NewDecoder(f); ; {
		var o yaml.Node
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		var about struct {
			Kind string
			Data map[string]string
		}
		err := o.Decode(&about)
		switch {
		case about.Kind == "DaemonSet" && err == nil:
			err = o.Decode(&ds)
		case about.Kind == "ConfigMap":
			config = about.Data["config.yaml"]
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(ds.Spec.Template.Spec.Containers) != 1 || config == "" {
		t.Fatalf("got %+v and the config\n%s", ds, config)
	}
	return ds, config
}

// importAgent gives containerd an image with egressbpf.
func (k *node) importAgent(t *testing.T) {
	t.Helper()
	content, err := os.ReadFile(lab.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	layer := archive(t, "egressbpf", content)
	sum := sha256.Sum256(layer)
	tarball := k.write(t, "agent.tar", string(archive(t, "layer.tar", layer, "config.json", encode(t, map[string]any{
		"architecture": goruntime.GOARCH, "os": "linux", "config": map[string]any{"Entrypoint": []string{"/egressbpf"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(sum[:])}},
	}), "manifest.json", encode(t, []any{map[string]any{"Config": "config.json", "RepoTags": []string{agentImage}, "Layers": []string{"layer.tar"}}}))))
	exit := lab.Run(t, exec.Command("ctr", "--address", socket, "--namespace", "k8s.io", "images", "import", tarball))
	if exit.Code != 0 {
		t.Fatalf("ctr images import: %s", exit.Stderr)
	}
}

// agent runs a pod of the DaemonSet, with its arguments or others, as a kubelet does.
func (k *node) agent(t *testing.T, ds daemonSet, config string, args ...string) (*pod, *container) {
	t.Helper()
	spec := ds.Spec.Template.Spec
	c := spec.Containers[0]
	if !spec.HostPID || !spec.HostNetwork || c.SecurityContext.SeccompProfile.Type != "RuntimeDefault" {
		t.Fatalf("the DaemonSet has %+v", spec)
	}
	if len(args) == 0 {
		args = c.Args
	}
	options := &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_NODE}
	p := k.pod(t, "egressbpf", "egressbpf-x7k2p", onHost, func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = options })
	seccomp := &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}
	cc := &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: "egressbpf"}, Image: &runtime.ImageSpec{Image: agentImage},
		Args: args, LogPath: "agent.log",
		Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{
			NamespaceOptions: options, NoNewPrivs: true, RunAsUser: &runtime.Int64Value{}, Seccomp: seccomp,
			ReadonlyRootfs: c.SecurityContext.ReadOnlyRootFilesystem,
			Capabilities:   &runtime.Capability{AddCapabilities: c.SecurityContext.Capabilities.Add, DropCapabilities: c.SecurityContext.Capabilities.Drop},
		}},
	}
	for _, e := range c.Env {
		cc.Envs = append(cc.Envs, &runtime.KeyValue{Key: e.Name, Value: []byte(e.Value)})
	}
	paths := map[string]string{}
	for _, v := range spec.Volumes {
		paths[v.Name] = v.HostPath.Path
	}
	for _, m := range c.VolumeMounts {
		path, ok := paths[m.Name]
		if !ok || m.MountPropagation != "" {
			t.Fatalf("mount %+v", m)
		}
		if path == "" { // of the ConfigMap
			path = filepath.Dir(config)
		}
		cc.Mounts = append(cc.Mounts, &runtime.Mount{HostPath: path, ContainerPath: m.MountPath, Readonly: m.ReadOnly})
	}
	made, err := k.api.CreateContainer(t.Context(), &runtime.CreateContainerRequest{PodSandboxId: p.id, Config: cc, SandboxConfig: p.config})
	if err == nil {
		_, err = k.api.StartContainer(t.Context(), &runtime.StartContainerRequest{ContainerId: made.GetContainerId()})
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, k.log())
	}
	return p, &container{p, made.GetContainerId(), filepath.Join(p.config.LogDirectory, cc.LogPath)}
}

// exec runs egressbpf in the agent's container.
func (c *container) exec(args ...string) (code int32, stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	answer, err := c.pod.node.api.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: c.id, Cmd: append([]string{"/egressbpf"}, args...), Timeout: 20})
	return answer.GetExitCode(), string(answer.GetStdout()), string(answer.GetStderr()), err
}

// TestAgent runs the DaemonSet's pod as the manifests describe it: with a cgroup namespace of its own,
// and without privileges. What it has put in force stays when it is gone, and the next one takes over.
func TestAgent(t *testing.T) {
	n := lab.New(t)
	t.Cleanup(func() { n.Egressbpf(t, "detach") })
	k := startNode(t, n, pause)
	k.importAgent(t)
	ds, text := manifests(t)
	config := k.write(t, "config/config.yaml", text)

	start := func() (*pod, *container) {
		t.Helper()
		p, c := k.agent(t, ds, config)
		// That the filter is in force does not tell that this agent has attached.
		testenv.Eventually(t, "the agent is ready", func() bool {
			log, _ := os.ReadFile(c.log)
			if strings.Contains(string(log), "level=ERROR") || strings.Contains(string(log), "egressbpf: ") {
				t.Fatalf("the agent: %s", log)
			}
			if !strings.Contains(string(log), inForce) {
				return false
			}
			code, _, _, err := c.exec("status")
			return err == nil && code == 0
		})
		return p, c
	}
	expect := func(when string, p *pod, name, want string) {
		t.Helper()
		if got := p.attempt(t, name); got != want {
			t.Errorf("%s: %s/%s: %s, want %s", when, p.config.Metadata.Namespace, name, got, want)
		}
	}
	agent, c := start()
	blocked := blocked(t, n)
	seen := k.Capture(t)
	shop := k.pod(t, "shop", "web-0", onHost)
	expect("the agent runs", shop, "first", blocked)
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	system := k.pod(t, "kube-system", "cni-0", onHost)
	awaitPod(t, podCgroup(system.uid))
	expect("the agent runs", system, "first", allowed)
	if code, stdout, stderr, err := c.exec("stats"); err != nil || code != 0 || !strings.Contains(stdout, "shop/web-0/first") || !strings.Contains(stdout, "egressbpf/egressbpf-x7k2p/egressbpf") {
		t.Errorf("stats: %d, %v\n%s%s", code, err, stdout, stderr)
	}
	if code, stdout, _, err := c.exec("status"); err != nil || code != 0 || strings.Contains(stdout, "EXPOSED") {
		t.Errorf("status: %d, %v\n%s", code, err, stdout)
	}

	if err := agent.remove(); err != nil {
		t.Fatal(err)
	}
	n.Egressbpf(t, "status")
	expect("the agent is gone", shop, "second", blocked)
	start()
	expect("the next agent runs", shop, "third", blocked)
	awaitPod(t, podCgroup(system.uid))
	expect("the next agent runs", system, "second", allowed)
}
