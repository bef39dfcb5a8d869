package loader_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	statemaps "github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
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

// TestNoRoom fills the map: containers that find no room are judged all the same, and
// services are none, until there is room again and attach has run.
func TestNoRoom(t *testing.T) {
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

	made, existing := "own.slice/docker-"+id+".scope", "own.slice/sub/docker-"+id+".scope"
	h.mkdir(made, "own.slice/new.service", "own.slice/sub")
	recognised := func(name string) bool {
		t.Helper()
		known, err := state.Recognised(h.id(name))
		check(t, err)
		return known
	}
	room := func() statemaps.Room {
		t.Helper()
		known, err := state.Containers()
		check(t, err)
		r, err := state.Room(known)
		check(t, err)
		return r
	}
	if !recognised(made) || recognised("own.slice/new.service") || h.enrolled()[made] {
		t.Error("without room, the container is to be known for one, and the service not")
	}
	if r := room(); r.Containers != len(ids) || r.Without != 1 || !r.Short() {
		t.Errorf("room: %+v", r)
	}
	t.Run("service", func(t *testing.T) {
		testenv.Enter(t, filepath.Join(h.base, "own.slice/new.service"))
		if !connects(t, blockedAddress) {
			t.Error("a service is refused what is for containers alone")
		}
	})
	t.Run("container", func(t *testing.T) {
		testenv.Enter(t, filepath.Join(h.base, made))
		if connects(t, blockedAddress) {
			t.Error("a container without state reaches a blocked address")
		}
	})
	// Those that exist, too; and what is full of containers that are gone is full no more.
	_, err = containers.BatchDelete(ids[:1], nil)
	check(t, err)
	check(t, containers.Put(h.id("own.slice/old.service"), statemaps.Container{}))
	h.mkdir(existing)
	check(t, state.Forget(h.id(existing)))
	h.mustAttach(policy.Default())
	if !recognised(existing) || !recognised(made) {
		t.Error("attach did not recognise what found no room")
	}
	if r := room(); r.Containers != 0 || r.Removed != len(ids)-1 || r.Without != 2 {
		t.Errorf("after attach: room %+v", r)
	}
	h.mustAttach(policy.Default())
	if r := room(); r.Without != 0 || !h.enrolled()[made] || !h.enrolled()[existing] {
		t.Errorf("with room again: %+v, containers %v", r, h.enrolled())
	}
	h.rmdir(made)
	if h.enrolled()[made] {
		t.Error("the removed container has an entry")
	}
}

// There can be so many policed cgroups as the programs that follow containers know of.
func TestManyPlaces(t *testing.T) {
	h := newHost(t)
	names := []string{"plain"}
	for i := range 7 {
		names = append(names, fmt.Sprintf("c%d.slice", i))
	}
	before := h.snapshot()
	if err := h.attach(policy.Default(), append(names, "one-more")...); !errors.Is(err, loader.ErrTooMany) {
		t.Errorf("got %v, want %v", err, loader.ErrTooMany)
	}
	h.unchanged(before, "too many cgroups")
	h.mustAttach(policy.Default(), names...)
	before = h.snapshot()
	if err := h.attach(policy.Default(), "one-more"); !errors.Is(err, loader.ErrTooMany) {
		t.Errorf("got %v, want %v", err, loader.ErrTooMany)
	}
	h.unchanged(before, "one more cgroup")
	h.mkdir("c6.slice/" + id)
	if !h.enrolled()["c6.slice/"+id] {
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
	spared, otherwise := h.sparedScope("1", "packet"), h.sparedScope("2", "xdp,vsock")
	h.mkdir(scope + "/nested")
	refuses := h.defence("socket_families").Active
	for _, tt := range []struct {
		in      string
		refused bool
	}{
		{scope, refuses}, {scope + "/nested", refuses}, {spared, false}, {otherwise, refuses},
		{"own.slice/tcpdump.service", false}, {"own.slice/sub.slice", false}, {"own.slice", false},
	} {
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

// sparedScope makes a container in own.slice that a rule opens families to.
func (h *host) sparedScope(digit string, families policy.Families) string {
	h.t.Helper()
	scope := "own.slice/docker-" + strings.Repeat(digit, 64) + ".scope"
	h.mkdir(scope)
	state, err := h.State()
	check(h.t, err)
	defer state.Close()
	check(h.t, state.Configure(h.id(scope), statemaps.Change{Mask: statemaps.AnyFamily, Flags: statemaps.FlagsOf(families)}))
	return scope
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

// TestRemovedContainers removes many containers whose cgroups the kernel keeps, for a
// socket that lives on or a page that is cached: they have no rows, take no room from
// others, and are forgotten when the kernel lets go of them.
func TestRemovedContainers(t *testing.T) {
	n := 300
	if text := os.Getenv("EGRESSBPF_REMOVED"); text != "" {
		_, err := fmt.Sscan(text, &n)
		check(t, err)
	}
	h := newHost(t)
	h.mkdir("own.slice")
	paged := h.withMemory("own.slice")
	h.mustAttach(policy.Default(), "own.slice")
	state, err := h.State()
	check(t, err)
	defer state.Close()
	room := func() statemaps.Room {
		t.Helper()
		known, err := state.Containers()
		check(t, err)
		r, err := state.Room(known)
		check(t, err)
		return r
	}

	home, err := cgroup.OfProcess(os.Getpid())
	check(t, err)
	enter := func(path string) { check(t, os.WriteFile(path+"/cgroup.procs", []byte("0"), 0)) }
	defer enter(h.root.Path(home))
	var (
		sockets held
		pages   = t.TempDir()
	)
	defer sockets.close()
	for i := range n {
		path := filepath.Join(h.base, fmt.Sprintf("own.slice/docker-%064x.scope", i))
		check(t, os.Mkdir(path, 0o755))
		enter(path)
		if paged && i%2 == 0 {
			check(t, os.WriteFile(filepath.Join(pages, fmt.Sprint(i)), make([]byte, 4096), 0o600))
		} else {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			check(t, err)
			sockets.add(t, fd)
		}
		enter(h.root.Path(home))
		check(t, os.Remove(path))
	}
	// Linux 7 lets go of a cgroup of which only cached pages are left.
	least := n
	if paged {
		least = n / 2
	}
	if r := room(); r.Containers != 0 || r.Removed < least || r.Removed > n || r.Without != 0 {
		t.Errorf("with %d removed containers: %+v (cached pages: %v)", n, r, paged)
	}
	start := time.Now()
	if got := h.enrolled(); len(got) != 0 {
		t.Errorf("rows of removed containers: %d", len(got))
	}
	t.Logf("%d removed containers are left out in %v", n, time.Since(start))

	h.mustAttach(policy.Default())
	h.mkdir("own.slice/docker-"+id+".scope", "own.slice/new.service")
	if got := h.enrolled(); len(got) != 1 || !got["own.slice/docker-"+id+".scope"] {
		t.Errorf("got containers %v, want the new one", got)
	}
	sockets.close()
	check(t, os.RemoveAll(pages))
	left := 0
	if paged {
		left = 8 * runtime.NumCPU() // each keeps some for the next page
	}
	for now := room().Removed; now > left; now = room().Removed {
		testenv.Eventually(t, "forget what the kernel has let go", func() bool { return room().Removed < now })
	}
}

// held are sockets that stay alive, in the queues of others: a process may have fewer open
// than there are.
type held struct {
	queues []int
	last   []int
	queued int
}

func (h *held) add(t *testing.T, fd int) {
	t.Helper()
	const (
		perMessage = 200 // SCM_MAX_FD is 253
		perQueue   = 8   // net.unix.max_dgram_qlen is 10 or more
	)
	h.last = append(h.last, fd)
	if len(h.last) < perMessage {
		return
	}
	if h.queued%perQueue == 0 {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		h.queues = append(h.queues, pair[0], pair[1])
	}
	check(t, unix.Sendmsg(h.queues[len(h.queues)-1], []byte{0}, unix.UnixRights(h.last...), nil, 0))
	h.queued++
	h.closeLast()
}

func (h *held) closeLast() {
	for _, fd := range h.last {
		_ = unix.Close(fd)
	}
	h.last = nil
}

func (h *held) close() {
	h.closeLast()
	for _, fd := range h.queues {
		_ = unix.Close(fd)
	}
	h.queues = nil
}

// withMemory has the kernel charge the memory of the cgroups in one to them, if it can.
func (h *host) withMemory(name string) bool {
	h.t.Helper()
	path := string(h.root)
	for _, part := range append([]string{""}, strings.Split(strings.TrimPrefix(filepath.Join(h.base, name), path+"/"), "/")...) {
		path = filepath.Join(path, part)
		if err := os.WriteFile(path+"/cgroup.subtree_control", []byte("+memory"), 0); err != nil {
			h.t.Logf("no memory controller: %v", err)
			return false
		}
	}
	return true
}

// A container that is run like a machine is named until a scope has it policed.
func TestSystemContainer(t *testing.T) {
	lockHost(t)
	h := newHost(t)
	name := "own.slice/lxc.payload.c1"
	h.mkdir(name)
	cmd := testenv.Command(t, filepath.Join(h.base, name), "sleep", "60")
	check(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	named := func() bool {
		s := h.status()
		if !s.InForce() {
			t.Errorf("not in force: %+v", s)
		}
		return slices.ContainsFunc(s.Systems, func(c cgroup.System) bool {
			return c.Engine == "LXC" && c.Name == "c1" && h.root.Path(c.Cgroup) == filepath.Join(h.base, name)
		})
	}
	h.mustAttach(policy.Default(), "own.slice")
	if !named() {
		t.Error("it is not named")
	}
	p := policy.Default()
	var err error
	p.Scopes, err = policy.ParseScopes([]string{"default", "lxc.payload.*"})
	check(t, err)
	h.mustAttach(p)
	if named() {
		t.Error("it is named, and policed")
	}
}
