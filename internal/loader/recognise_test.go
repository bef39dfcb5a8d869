package loader_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/loader"
	statemaps "github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/testenv"
)

const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// enrolled returns the names, below the base, of the containers that have state.
func (h *host) enrolled() map[string]bool {
	h.t.Helper()
	state, err := h.State()
	check(h.t, err)
	defer state.Close()
	known, err := state.Containers()
	check(h.t, err)
	names := map[string]bool{}
	for id := range known {
		rel, err := h.root.Find(id)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		check(h.t, err)
		if name, err := filepath.Rel(h.base, h.root.Path(rel)); err == nil && !strings.HasPrefix(name, "..") {
			names[name] = true
		}
	}
	return names
}

// TestRecognise makes cgroups of many names, before and after attach: the kernel and
// the policy agree on which are containers.
func TestRecognise(t *testing.T) {
	h := newHost(t)
	rel, err := h.root.Rel(h.base)
	check(t, err)
	p := policy.Default()
	p.Scopes = append(p.Scopes, "build-*", policy.Scope(rel+"/own.slice/all/*"),
		policy.Scope(strings.Repeat("l", 96)+"*"), policy.Scope("s{id}"+strings.Repeat("s", 16)))
	check(t, p.Validate())

	const build = "0r6mzc6cy0b2zhfsoinq9y6th"
	names := []string{
		"docker-" + id + ".scope", id, "libpod-" + id + ".scope", "libpod-" + id,
		"cri-containerd-" + id + ".scope", "nerdctl-" + id + ".scope", "crio-" + id + ".scope", "crio-" + id, "libpod-payload-" + id, "buildah-buildah123", "crun-buildah-buildah123.scope", "xbuildah-1",
		build, "system.slice:docker:" + build, ":" + build, "docker-" + build, build[1:], build + "0", "X" + build[1:], build + ".scope",
		"docker-" + id, "docker-" + id + ".service", "docker-" + id + ".scope.d", "docker-.scope", "docker-x.scope",
		"xdocker-" + id + ".scope", "docker-" + id[1:] + ".scope", "docker-0" + id + ".scope",
		"docker-" + strings.ToUpper(id) + ".scope", "docker-" + id[:63] + "g.scope", "docker-g" + id[1:] + ".scope",
		"libpod-conmon-" + id + ".scope", "Docker-" + id + ".scope", id + "0", id[1:], "g" + id[1:],
		"build-x", "build-", "build-" + strings.Repeat("x", 249), "rebuild-x", "docker.service", "docker",
		strings.Repeat("l", 97), strings.Repeat("l", 96), strings.Repeat("l", 255),
		"s" + id + strings.Repeat("s", 16), "s" + id + strings.Repeat("s", 15), "s" + id + strings.Repeat("s", 17),
		"all", "all/anything", "all/" + id, "all/deeper/x", "dir.slice", "dir.slice/docker-" + id + ".scope",
		"docker-" + id + ".scope/docker-" + id + ".scope", "docker-" + id + ".scope/init/" + id,
		"dir.service/" + id, "all.slice/x",
	}
	want := func(prefix string) map[string]bool {
		all := map[string]bool{}
		for _, name := range names {
			at := filepath.Join(prefix, name)
			outer := ""
			for part := range strings.SplitSeq(at, "/") {
				outer = filepath.Join(outer, part)
				if p.IsContainer(filepath.Join(rel, outer)) {
					all[outer] = true
					break
				}
			}
		}
		return all
	}
	h.mkdir("own.slice")
	for _, name := range names {
		h.mkdir("own.slice/" + name)
	}
	h.mustAttach(p, "own.slice")
	compare := func(when string, want map[string]bool) {
		t.Helper()
		got := h.enrolled()
		for name := range want {
			if !got[name] {
				t.Errorf("%s: %s is not taken for a container", when, name)
			}
		}
		for name := range got {
			if !want[name] {
				t.Errorf("%s: %s is taken for a container", when, name)
			}
		}
	}
	existing := want("own.slice")
	if len(existing) < 14 {
		t.Fatalf("only %d of the names are containers': %v", len(existing), existing)
	}
	compare("before attach", existing)

	all := want("own.slice/later.slice")
	for _, name := range names {
		h.mkdir("own.slice/later.slice/" + name)
		h.mkdir("beside.slice/" + name)
	}
	for name := range existing {
		all[name] = true
	}
	compare("after attach", all)

	for name := range all {
		check(t, removeAll(h.paths(name)[0]))
	}
	check(t, removeAll(h.base+"/own.slice/later.slice"))
	testenv.Eventually(t, "the containers are forgotten", func() bool {
		state, err := h.State()
		check(t, err)
		defer state.Close()
		known, err := state.Containers()
		check(t, err)
		return len(known) == 0
	})
}

func withAnyScope(p policy.Policy) policy.Policy {
	p.Scopes = []policy.Scope{policy.AnyScope}
	return p
}

// removeAll removes a cgroup and those below it.
func removeAll(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeAll(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(path)
}

// TestRecogniseOtherScopes changes what containers are called, and fails to.
func TestRecogniseOtherScopes(t *testing.T) {
	h := newHost(t)
	h.mkdir("own.slice/docker-"+id+".scope", "own.slice/job-1", "own.slice/job-2")
	p := policy.Default()
	h.mustAttach(p, "own.slice")
	other := p
	other.Scopes = []policy.Scope{"job-*"}

	before := h.enrolled()
	h.SetFault(func(step string) error {
		if strings.HasPrefix(step, "egress of") {
			return errInjected
		}
		return nil
	})
	if err := h.attach(other, "own.slice"); !errors.Is(err, errInjected) {
		t.Fatalf("got %v, want %v", err, errInjected)
	}
	h.SetFault(nil)
	h.mkdir("own.slice/" + id)
	if got := h.enrolled(); len(before) != 1 || len(got) != 2 || !got["own.slice/"+id] {
		t.Errorf("after a failed exchange: got %v, want the containers of before, and the new one", got)
	}

	h.mustAttach(other, "own.slice")
	if got := h.enrolled(); len(got) != 2 || !got["own.slice/job-1"] || !got["own.slice/job-2"] {
		t.Errorf("got containers %v, want the jobs", got)
	}
	h.mustAttach(withAnyScope(other), "own.slice")
	h.mkdir("own.slice/job-4")
	if got := h.enrolled(); got["own.slice/job-4"] {
		t.Errorf("got %v: nothing is to be recognised", got)
	}
}

// TestRecogniseOverflow fills the map: what is new counts as a container, until there
// is room again and attach has found all.
func TestRecogniseOverflow(t *testing.T) {
	h := newHost(t)
	h.mkdir("own.slice/old.service")
	h.mustAttach(policy.Default(), "own.slice")
	state, err := h.State()
	check(t, err)
	defer state.Close()
	containers := state.ByName()[bpf.EgressMapContainers]
	ids := make([]uint64, containers.MaxEntries())
	for i := range ids {
		ids[i] = 1<<60 + uint64(i) // of no cgroup
	}
	_, err = containers.BatchUpdate(ids, make([]statemaps.Container, len(ids)), nil)
	check(t, err)

	name := "own.slice/docker-" + id + ".scope"
	h.mkdir(name)
	if first, err := state.Overflow(); err != nil || first != h.id(name) {
		t.Errorf("overflow: got %d, %v, want %d", first, err, h.id(name))
	}
	if err := h.attach(policy.Default()); err == nil {
		t.Error("attach found no room, and said nothing")
	}
	_, err = containers.BatchDelete(ids, nil)
	check(t, err)
	h.mustAttach(policy.Default())
	if first, err := state.Overflow(); err != nil || first != 0 || !h.enrolled()[name] {
		t.Errorf("with room again: got overflow %d, %v, containers %v", first, err, h.enrolled())
	}
}

// There can be more policed cgroups than the programs that follow containers know of, but
// not more slices.
func TestManyPlaces(t *testing.T) {
	h := newHost(t)
	var names []string
	for i := range 9 {
		names = append(names, fmt.Sprint("c", i))
	}
	h.mustAttach(policy.Default(), names...)
	for i := range 9 {
		names[i] += ".slice"
	}
	before := h.snapshot()
	if err := h.attach(policy.Default(), names...); err == nil || !strings.Contains(err.Error(), "9 policed slices") {
		t.Errorf("got %v, want that there are too many slices", err)
	}
	h.unchanged(before, "too many slices")
	h.mustAttach(policy.Default(), names[:8]...)
	h.mkdir("c7.slice/" + id)
	if !h.enrolled()["c7.slice/"+id] {
		t.Error("the container in the last slice is not enrolled")
	}
}

// TestRefusedSocketsOfRecognised makes packet sockets in a slice: a container's is
// refused, where the kernel refuses any, and no service's.
func TestRefusedSocketsOfRecognised(t *testing.T) {
	h := newHost(t)
	scope := "own.slice/sub.slice/docker-" + id + ".scope"
	h.mkdir("own.slice/tcpdump.service", "own.slice/sub.slice")
	h.mustAttach(policy.Default(), "own.slice")
	h.mkdir(scope + "/nested")
	refuses := h.defence("socket_families").Active
	for _, tt := range []struct {
		in      string
		refused bool
	}{{scope, refuses}, {scope + "/nested", refuses}, {"own.slice/tcpdump.service", false}, {"own.slice/sub.slice", false}, {"own.slice", false}} {
		t.Run(tt.in, func(t *testing.T) {
			testenv.Enter(t, h.paths(tt.in)[0])
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				unix.Close(fd)
			}
			if errors.Is(err, unix.EPERM) != tt.refused || !tt.refused && err != nil {
				t.Errorf("got %v, want it refused: %v", err, tt.refused)
			}
		})
	}
	if n := h.denied(scope); n != uint64(2*btoi(refuses)) {
		t.Errorf("%d refused sockets are counted", n)
	}
}

// TestTooDeep makes a container deeper than any is looked for: it is not covered, as status
// says, and nothing else is taken for a container because of it.
func TestTooDeep(t *testing.T) {
	lockHost(t)
	h := newHost(t)
	deep := func(depth int) string {
		return "own.slice/" + strings.Repeat("d/", depth-1) + "docker-" + id + ".scope"
	}
	h.mkdir(deep(17))
	h.mustAttach(policy.Default(), "own.slice")
	h.mkdir(strings.Replace(deep(17), "d/", "e/", 1), strings.Replace(deep(16), "d/", "f/", 1))
	got := h.enrolled()
	if want := strings.Replace(deep(16), "d/", "f/", 1); len(got) != 1 || !got[want] {
		t.Errorf("enrolled %v, want %s alone", got, want)
	}
	state, err := h.State()
	check(t, err)
	defer state.Close()
	if first, err := state.Overflow(); first != 0 || err != nil {
		t.Errorf("cgroups from %d on are taken for containers: %v", first, err)
	}
	cmd := testenv.Command(t, filepath.Join(h.base, deep(17)), "sleep", "60")
	check(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if s := h.status(); !slices.ContainsFunc(s.Uncovered, func(u loader.Uncovered) bool { return h.root.Path(u.Cgroup) == filepath.Join(h.base, deep(17)) }) {
		t.Errorf("uncovered: %+v", s.Uncovered)
	}
}
