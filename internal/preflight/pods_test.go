package preflight

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/fakecri"
)

// A Kubernetes node: whether system pods keep what they need, and whether pods have names.
func TestPods(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "cri.sock")
	pods, err := container.OpenCRI(socket, cgroup.Root(dir), false)
	if err != nil {
		t.Fatal(err)
	}
	defer pods.Close()
	check := func(rules ...policy.ContainerRule) string {
		t.Helper()
		p := policy.Default()
		p.Containers = rules
		r := &Report{Ready: true}
		Host{Root: cgroup.Root(dir), Pods: pods, Config: policy.Config{Policy: p}}.pods(t.Context(), r)
		var text strings.Builder
		for _, c := range r.Checks {
			text.WriteString(c.Name + " " + string(c.Result) + " " + c.Detail + "\n")
		}
		return text.String()
	}
	if got := check(); got != "" {
		t.Errorf("no node: got %s", got)
	}
	if err := os.Mkdir(dir+"/kubepods", 0o755); err != nil {
		t.Fatal(err)
	}
	if got := check(); !strings.Contains(got, "kubernetes warn") || !strings.Contains(got, "container runtime warn not asked") {
		t.Errorf("without a runtime: got %s", got)
	}
	r, err := fakecri.Start(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Stop() }()
	r.Sandboxes = []*runtime.PodSandbox{fakecri.Sandbox(strings.Repeat("1", 64), "kube-system", "a", "u", nil)}
	spared := policy.ContainerRule{Namespace: "kube-system", Metadata: policy.Allowed}
	if got := check(spared); got != "container runtime ok unix://"+socket+", 1 containers and sandboxes of pods\n" {
		t.Errorf("got %s", got)
	}
	// No rule for pods, or none that gives anything.
	for _, rule := range []policy.ContainerRule{{Name: "agent", Metadata: policy.Allowed}, {Namespace: "kube-system", Metadata: policy.Denied}} {
		if got := check(rule); !strings.Contains(got, "kubernetes warn") {
			t.Errorf("%+v: got %s", rule, got)
		}
	}
	// The second rule holds for pods of every namespace.
	if got := check(spared, policy.ContainerRule{Label: "app=agent", Families: "packet"}); !strings.Contains(got, "rule 2 of containers names no namespace") {
		t.Errorf("got %s", got)
	}
}
