package critest

import (
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

var metadataAt = netip.MustParseAddrPort(metadata)

// TestRestart kills containerd and starts it again beside the service.
func TestRestart(t *testing.T) {
	n := lab.New(t)
	k := startNode(t, n, pause)
	s := startService(t, n, rules, "--cri-endpoint", endpoint)
	blocked := blocked(t, n)
	web, dns := k.pod(t, "shop", "web-0"), k.pod(t, "kube-system", "dns")
	c := web.container(t, "main", metadata)
	if got := c.said(t, 2); got != blocked {
		t.Errorf("before: %s, want %s", got, blocked)
	}
	awaitPod(t, podCgroup(dns.uid))

	silences, replies := s.said(silent), s.said(answers)
	k.stop(t, unix.SIGKILL)
	s.await(t, silent, silences+1)
	// Only its agents can be reached now. One comes as in a container of a pod that nobody
	// knows.
	seen := k.Capture(t)
	unknown := podCgroup(newUID())
	made := mkdir(t, unknown+"/"+newID())
	for name, dir := range map[string]string{"shop": cgroups + podCgroup(web.uid) + "/" + c.id, "unknown": made} {
		agent := n.Container(t).Agent(t, dir)
		if r := agent.Connect(metadataAt); r.Errno != unix.ECONNREFUSED {
			t.Errorf("%s, without containerd: %v, want ECONNREFUSED", name, r.Errno)
		}
		agent.End()
	}
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	if status, code := n.Status(t); code != 0 {
		t.Errorf("status: exit code %d: %+v", code, status)
	}

	k.start(t)
	s.await(t, answers, replies+1)
	// On a slow machine it may say so again when containerd has much to do.
	if got := s.said(silent) - silences; got != 1 {
		t.Errorf("the service said %d times that containerd does not answer", got)
	}
	if got := dns.attempt(t, "after"); got != allowed {
		t.Errorf("the old pod: %s, want %s", got, allowed)
	}
	if got := c.again(t); got != blocked {
		t.Errorf("shop: %s, want %s", got, blocked)
	}
	proxy := k.pod(t, "kube-system", "kube-proxy", onHost)
	awaitPod(t, podCgroup(proxy.uid))
	if got := proxy.attempt(t, "main"); got != allowed {
		t.Errorf("a new pod: %s, want %s", got, allowed)
	}
	if got := k.pod(t, "shop", "web-1").attempt(t, "main"); got != blocked {
		t.Errorf("a new pod of shop: %s, want %s", got, blocked)
	}
	if _, err := os.Stat(socket); err != nil {
		t.Error(err)
	}
}
