package critest

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// TestDormant has a runtime at a usual place, on a host without pods until a kubelet makes some.
func TestDormant(t *testing.T) {
	for _, parent := range []string{"/kubepods", "/kubepods.slice"} {
		if _, err := os.Stat(cgroups + parent); !os.IsNotExist(err) {
			t.Fatalf("an earlier test has left %s: %v", parent, err)
		}
	}
	n := lab.New(t)
	const usual = "/run/crio/crio.sock"
	if err := os.MkdirAll(filepath.Dir(usual), 0o755); err != nil {
		t.Fatal(err)
	}
	f := startFake(t, usual)
	s := startService(t, n, rules)
	n.Stats(t)
	agent := n.Container(t).Agent(t, mkdir(t, "/docker/"+newID()))
	expectConnect(t, agent, "before there are pods", unix.ECONNREFUSED)
	n.Stats(t)
	time.Sleep(1500 * time.Millisecond) // the service looks around each second
	if got := f.Connections(); got != 0 {
		t.Errorf("the runtime of a host without pods had %d connections", got)
	}

	uid, id := newUID(), newID()
	rel := podCgroup(uid) + "/" + id
	pod := n.Container(t).Agent(t, mkdir(t, rel))
	claim(f, id, "kube-system", uid)
	testenv.Eventually(t, "exception", func() bool { return flags(t, rel) == exception })
	expectConnect(t, pod, "kube-system", 0)
	expectConnect(t, agent, "a container outside of pods", unix.ECONNREFUSED)
	if f.Connections() == 0 || s.said(panicked) > 0 {
		t.Errorf("%d connections", f.Connections())
	}
}
