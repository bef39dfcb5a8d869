package critest

import (
	"fmt"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// TestExempt gives the pods of a namespace an exception, and takes it back.
func TestExempt(t *testing.T) {
	n := lab.New(t)
	k := startNode(t, n, pause)
	s := startService(t, n, rules, "--cri-endpoint", endpoint)
	blocked := blocked(t, n)
	seen := k.Capture(t)

	// Who has no exception comes first: when a later pod is known, these are.
	shop := k.pod(t, "shop", "web-0", onHost)
	pretender := k.pod(t, "shop", "kube-proxy", onHost, func(c *runtime.PodSandboxConfig) {
		c.Labels["io.kubernetes.pod.namespace"] = "kube-system"
		c.Labels["namespace"] = "kube-system"
		c.Annotations = map[string]string{"io.kubernetes.pod.namespace": "kube-system"}
	})
	narrow := k.pod(t, "monitoring", "exporter")
	prefixed := k.pod(t, "kube-system-2", "web-0", onHost)
	var without []*container
	for _, p := range []*pod{shop, pretender, narrow, prefixed} {
		c := p.container(t, "main", metadata)
		if got := c.said(t, 2); got != blocked {
			t.Errorf("%s: %s, want %s", p.config.Metadata, got, blocked)
		}
		without = append(without, c)
	}
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}

	proxy := k.pod(t, "kube-system", "kube-proxy", onHost)
	dns := k.pod(t, "kube-system", "dns")
	exporter := k.pod(t, "monitoring", "node-exporter", onHost)
	for _, p := range []*pod{proxy, dns, exporter} {
		begun := time.Now()
		awaitPod(t, podCgroup(p.uid))
		t.Logf("%s is known after %v", p.config.Metadata.Name, time.Since(begun))
		for i := range 2 {
			if got := p.attempt(t, fmt.Sprint("main-", i)); got != allowed {
				t.Errorf("container %d of %s: %s, want %s", i, p.config.Metadata, got, allowed)
			}
		}
	}
	for _, c := range without {
		if got := c.again(t); got != blocked {
			t.Errorf("%s, when it is known: %s, want %s", c.pod.config.Metadata, got, blocked)
		}
		if f := flags(t, podCgroup(c.pod.uid)+"/"+c.id); f != 0 || podHas(t, podCgroup(c.pod.uid)) {
			t.Errorf("%s has flags %x", c.pod.config.Metadata, f)
		}
	}

	// A kubelet does not wait between a sandbox and its containers. Until the pod is known, a
	// container has the defaults; it gets what its rule gives soon after.
	late := 0
	const pods = 2
	for i := range pods {
		p := k.pod(t, "kube-system", fmt.Sprint("hasty-", i))
		c := p.container(t, "main", metadata)
		if c.said(t, 2) != allowed {
			late++
		}
		awaitPod(t, podCgroup(p.uid))
		for deadline := time.Now().Add(30 * time.Second); c.again(t) != allowed; {
			if time.Now().After(deadline) {
				t.Fatalf("%s has no exception", p.config.Metadata)
			}
		}
	}
	t.Logf("%d of %d containers that were started at once had the defaults at first", late, pods)

	old := dns.container(t, "old", metadata)
	if got := old.said(t, 2); got != allowed {
		t.Errorf("before the rule is removed: %s, want %s", got, allowed)
	}
	before := s.said(applied)
	s.configure(t, noRules)
	// The policy is in force before what rules gave is taken back.
	s.await(t, applied, before+1)
	for name, got := range map[string]string{
		"new container": dns.attempt(t, "new"), "new container with the host's network": proxy.attempt(t, "new"), "old container": old.again(t),
	} {
		if got != blocked {
			t.Errorf("%s without the rule: %s, want %s", name, got, blocked)
		}
	}
	for _, p := range []*pod{proxy, dns, exporter} {
		if podHas(t, podCgroup(p.uid)) {
			t.Errorf("%s keeps its exception", p.config.Metadata)
		}
	}
}

// TestExemptOfRouted makes a pod whose device the service does not know, so that it attaches again.
// What a rule gives to another pod is there again soon after, before the periodic check.
func TestExemptOfRouted(t *testing.T) {
	n := lab.New(t)
	k := startNodeWith(t, n, pause, routed)
	s := startService(t, n, rules, "--cri-endpoint", endpoint)
	dns := k.pod(t, "kube-system", "dns")
	awaitPod(t, podCgroup(dns.uid))
	before := s.said(attachesAgain)
	k.pod(t, "shop", "web-0")
	s.await(t, attachesAgain, before+1)
	s.await(t, inForce, before+2)
	awaitPod(t, podCgroup(dns.uid))
	if got := dns.attempt(t, "main"); got != allowed {
		t.Errorf("a container of the exempt pod: %s, want %s", got, allowed)
	}
}
