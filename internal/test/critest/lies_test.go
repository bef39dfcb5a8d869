package critest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/fakecri"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// newID returns the id of a container.
func newID() string { return fmt.Sprintf("c0ffee%058x", serial.Add(1)) }

// mkdir makes a cgroup by its path below the root, and those above it, and returns its directory.
// It is removed after the test, with the cgroups above it that a pod or a container has made.
func mkdir(t *testing.T, rel string) string {
	t.Helper()
	dir := cgroups + rel
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		removed := func() bool {
			err := unix.Rmdir(dir)
			return err == nil || err == unix.ENOENT
		}
		// A process stays in its cgroup until it is reaped.
		testenv.Eventually(t, "remove "+dir, removed)
		for up := filepath.Dir(dir); up != cgroups; up = filepath.Dir(up) {
			if unix.Rmdir(up) != nil {
				break // there is another one below it
			}
		}
	})
	return dir
}

// startFake starts a runtime without containers.
func startFake(t *testing.T, path string) *fakecri.Runtime {
	t.Helper()
	f, err := fakecri.Start(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Stop(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// claim makes a runtime tell of a container in a pod, and of the pod's sandbox.
func claim(f *fakecri.Runtime, id, namespace, uid string) (sandbox string) {
	sandbox = newID()
	f.Change(func() {
		f.Sandboxes = append(f.Sandboxes, fakecri.Sandbox(sandbox, namespace, "pod", uid, nil))
		f.Containers = append(f.Containers, fakecri.Container(id, sandbox, "main", image))
	})
	return sandbox
}

// expectConnect checks that a process in a cgroup cannot reach the metadata service, or can.
func expectConnect(t *testing.T, a *lab.Agent, name string, want unix.Errno) {
	t.Helper()
	if r := a.Connect(metadataAt); r.Errno != want {
		t.Errorf("%s: %v, want %v", name, r.Errno, want)
	}
}

// TestLies asks a runtime that tells what is not so. Nobody gets an exception that is not due.
func TestLies(t *testing.T) {
	n := lab.New(t)
	path := filepath.Join(t.TempDir(), "s")
	f := startFake(t, path)
	s := startService(t, n, rules, "--cri-endpoint", "unix://"+path)
	host := n.Container(t)
	const ok, refused = unix.Errno(0), unix.ECONNREFUSED

	type liar struct {
		name  string
		want  unix.Errno
		rel   string // of the cgroup
		agent *lab.Agent
	}
	var all []*liar
	add := func(name string, want unix.Errno, rel string) *liar {
		l := &liar{name: name, want: want, rel: rel}
		l.agent = host.Agent(t, mkdir(t, rel))
		all = append(all, l)
		return l
	}
	in := func(uid, id string) string { return podCgroup(uid) + "/" + id }

	uid, other, id := newUID(), newUID(), newID()
	add("another pod's uid", refused, in(uid, id))
	claim(f, id, "kube-system", other)

	uid, id = newUID(), newID()
	add("no uid", refused, in(uid, id))
	claim(f, id, "kube-system", "")

	uid, id = newUID(), newID()
	add("a namespace that cannot be", refused, in(uid, id))
	claim(f, id, "kube-system\n", uid)

	uid, id = newUID(), newID()
	add("a pod that has no sandbox", refused, in(uid, id))
	f.Change(func() { f.Containers = append(f.Containers, fakecri.Container(id, newID(), "main", image)) })

	// In whatever order: the first list has the right one last, the second has it first.
	for i := range 2 {
		uid, other, id = newUID(), newUID(), newID()
		add(fmt.Sprint("two containers with one id ", i), refused, in(uid, id))
		for j := range 2 {
			if i == j {
				claim(f, id, "kube-system", other)
			} else {
				claim(f, id, "shop", uid)
			}
		}
	}

	// There are cgroups of both pods, but the runtime tells only of that of kube-system.
	uid, other, id = newUID(), newUID(), newID()
	add("the same id in another pod", refused, in(uid, id))
	add("the id in its own pod", ok, in(other, id))
	claim(f, id, "kube-system", other)

	uid, id = newUID(), newID()
	add("outside of kubepods", refused, "/docker/"+id)
	claim(f, id, "kube-system", uid)

	uid, id = newUID(), newID()
	outer := newID()
	nested := add("kubepods in a container", refused, "/docker/"+outer+"/kubelet/kubepods/besteffort/pod"+uid+"/"+id)
	claim(f, id, "kube-system", uid)

	uid, id = newUID(), newID()
	add("too deep in a pod", refused, podCgroup(uid)+"/deeper/"+id)
	claim(f, id, "kube-system", uid)

	uid, id = newUID(), newID()
	add("network of the node, as far as nobody tells", refused, in(uid, id))
	claim(f, id, "monitoring", uid)
	uid, id = newUID(), newID()
	add("network of its own", refused, in(uid, id))
	own := claim(f, id, "monitoring", uid)
	uid, id = newUID(), newID()
	add("network of the node", ok, in(uid, id))
	shared := claim(f, id, "monitoring", uid)
	f.Change(func() {
		f.Networks[own], f.Networks[shared] = runtime.NamespaceMode_POD, runtime.NamespaceMode_NODE
	})

	// The last pod of all is what it says. When it has its exception, all others have been
	// looked at.
	good, goodID := newUID(), newID()
	honest := add("the truth", ok, in(good, goodID))
	claim(f, goodID, "kube-system", good)
	testenv.Eventually(t, "exceptions that are due", func() bool {
		return !slices.ContainsFunc(all, func(l *liar) bool { return l.want == ok && flags(t, l.rel) != exception })
	})
	time.Sleep(300 * time.Millisecond) // whatever comes after a list
	seen := n.Capture(t)
	for _, l := range all {
		if l.want == refused {
			expectConnect(t, l.agent, l.name, l.want)
			if pod, _ := filepath.Split(l.rel); podHas(t, filepath.Clean(pod)) {
				t.Errorf("%s: the pod has an exception", l.name)
			}
		}
	}
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	for _, l := range all {
		if l.want == ok {
			expectConnect(t, l.agent, l.name, l.want)
		}
	}
	if row, inner := row(t, n, path, outer), filepath.Base(nested.rel); row.Cgroup != "/docker/"+outer || row.Blocked.Connects != 1 {
		t.Errorf("a container with pods in it: %+v", row)
	} else if rows := rowsOf(t, n, path, inner); len(rows) > 0 {
		t.Errorf("a container in a container has rows of its own: %+v", rows)
	}

	// An empty list: the pods that were known keep what they have.
	f.Change(func() { f.Sandboxes, f.Containers = nil, nil })
	uid, id = newUID(), newID()
	forgotten := add("no pod at all", refused, in(uid, id))
	time.Sleep(1200 * time.Millisecond) // it is asked each second
	expectConnect(t, forgotten.agent, forgotten.name, refused)
	expectConnect(t, honest.agent, "a pod that the runtime does not tell of any more", ok)

	// The runtime stalls while a pod is made.
	f.Change(func() { f.Stalls["*"] = true })
	uid, id = newUID(), newID()
	stalled := add("a runtime that does not answer", refused, in(uid, id))
	claim(f, id, "kube-system", uid)
	s.await(t, silent, 1)
	expectConnect(t, stalled.agent, stalled.name, refused)
	expectConnect(t, honest.agent, "a known pod, of a runtime that does not answer", ok)
	f.Change(func() { f.Stalls["*"] = false })
	s.await(t, answers, 1)
	testenv.Eventually(t, "exception after the runtime answers", func() bool { return flags(t, stalled.rel) == exception })
	expectConnect(t, stalled.agent, "when it answers", ok)
	expectConnect(t, forgotten.agent, forgotten.name, refused)
	if s.said(panicked) > 0 {
		t.Error("the service panicked")
	}
}

// TestExtraLevel has containers whose processes are one level further down, as crun makes them.
func TestExtraLevel(t *testing.T) {
	n := lab.New(t)
	path := filepath.Join(t.TempDir(), "s")
	f := startFake(t, path)
	startService(t, n, rules, "--cri-endpoint", "unix://"+path)
	host := n.Container(t)
	slice := func(uid string) string {
		return "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
	}
	for driver, of := range map[string]func(uid, id string) string{
		"cgroupfs": func(uid, id string) string { return podCgroup(uid) + "/crio-" + id },
		"systemd":  func(uid, id string) string { return slice(uid) + "/crio-" + id + ".scope" },
	} {
		t.Run(driver, func(t *testing.T) {
			system, shop := [2]string{newUID(), newID()}, [2]string{newUID(), newID()}
			allowed := host.Agent(t, mkdir(t, of(system[0], system[1])+"/container"))
			refused := host.Agent(t, mkdir(t, of(shop[0], shop[1])+"/container"))
			claim(f, shop[1], "shop", shop[0])
			claim(f, system[1], "kube-system", system[0])
			testenv.Eventually(t, "exception", func() bool { return flags(t, of(system[0], system[1])) == exception })
			expectConnect(t, refused, "shop", unix.ECONNREFUSED)
			expectConnect(t, allowed, "kube-system", 0)
			for id, want := range map[string]stats.Container{
				shop[1]:   {Blocked: stats.Blocked{Connects: 1}},
				system[1]: {},
			} {
				uid, name := shop[0], "shop/pod/main"
				if id == system[1] {
					uid, name = system[0], "kube-system/pod/main"
				}
				got := row(t, n, path, id)
				if got.Name != name || got.Cgroup != of(uid, id) || got.Blocked != want.Blocked {
					t.Errorf("row of %s: %+v", name, got)
				}
			}
			allowed.End()
			refused.End()
		})
	}
}

// statsOf returns the rows of stats, with names that the runtime at a socket tells.
func statsOf(t *testing.T, n *lab.Network, path string) []stats.Container {
	t.Helper()
	var s stats.Stats
	if err := json.Unmarshal([]byte(n.Egressbpf(t, "stats", "--output", "json", "--cri-endpoint", "unix://"+path)), &s); err != nil {
		t.Fatal(err)
	}
	return s.Containers
}

// rowsOf returns the rows of stats whose id or path has a container's id.
func rowsOf(t *testing.T, n *lab.Network, path, id string) []stats.Container {
	t.Helper()
	return slices.DeleteFunc(statsOf(t, n, path), func(c stats.Container) bool { return !strings.Contains(c.Cgroup, id) && c.ID != id })
}

// row returns the only one of them.
func row(t *testing.T, n *lab.Network, path, id string) stats.Container {
	t.Helper()
	rows := rowsOf(t, n, path, id)
	if len(rows) != 1 {
		t.Fatalf("stats have %d rows of container %s: %+v", len(rows), id, rows)
	}
	return rows[0]
}
