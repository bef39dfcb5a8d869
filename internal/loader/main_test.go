package loader_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	statemaps "github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func TestMain(m *testing.M) {
	if os.Getenv(victimVar) != "" {
		os.Exit(victim(os.Args[1:]))
	}
	os.Exit(m.Run())
}

// hasNetfilter says whether the kernel has BPF netfilter programs.
func hasNetfilter(t *testing.T) bool {
	t.Helper()
	err := features.HaveProgramType(ebpf.Netfilter)
	if err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
		t.Fatal(err)
	}
	return err == nil
}

// host is a filter with a pin path and a cgroup base of its own.
type host struct {
	*loader.Filter
	t    *testing.T
	root cgroup.Root
	pins string
	base string
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, root: testenv.Root(t), base: testenv.Cgroup(t), pins: testenv.PinPath(t)}
	h.Filter = loader.New(h.pins, h.root)
	t.Cleanup(func() {
		h.SetFault(nil)
		check(t, h.Detach(context.Background(), nil))
	})
	return h
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// lockHost is for tests whose containers others would take for Docker's.
func lockHost(t *testing.T) {
	t.Helper()
	unlock, err := testenv.LockHost()
	check(t, err)
	t.Cleanup(unlock)
}

// paths returns where the cgroups with names below the base are.
func (h *host) paths(names ...string) (paths []string) {
	for _, name := range names {
		paths = append(paths, filepath.Join(h.base, name))
	}
	return paths
}

func (h *host) attach(p policy.Policy, names ...string) error {
	return h.Attach(h.t.Context(), h.paths(names...), p)
}

// mustAttach attaches and returns the status, which has to be in force.
func (h *host) mustAttach(p policy.Policy, names ...string) *loader.Status {
	h.t.Helper()
	check(h.t, h.attach(p, names...))
	s := h.status()
	if !s.Enforcing {
		h.t.Fatalf("attached and not enforcing: %+v", s)
	}
	return s
}

func (h *host) mustDetach(names ...string) {
	h.t.Helper()
	check(h.t, h.Detach(h.t.Context(), h.paths(names...)))
}

func (h *host) status() *loader.Status {
	h.t.Helper()
	s, err := h.Status()
	check(h.t, err)
	return s
}

// policed returns the names of the policed cgroups, in order.
func (h *host) policed() (names []string) {
	h.t.Helper()
	for _, path := range h.status().Cgroups {
		name, err := filepath.Rel(h.base, path)
		check(h.t, err)
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// hook returns the row of a hook of the policed cgroup with a name, but for its
// time, which the kernel's clocks tell a little differently each time.
func (h *host) hook(name, cgroup string) loader.Hook {
	h.t.Helper()
	path := filepath.Join(h.base, cgroup)
	for _, row := range h.status().Hooks {
		if row.Name == name && (row.Cgroup == path || row.Cgroup == "" && cgroup == "") {
			row.Since = time.Time{}
			return row
		}
	}
	h.t.Fatalf("status shows no hook %s of %s", name, path)
	return loader.Hook{}
}

func (h *host) mkdir(names ...string) {
	h.t.Helper()
	for _, path := range h.paths(names...) {
		check(h.t, os.MkdirAll(path, 0o755))
	}
}

func (h *host) rmdir(names ...string) {
	h.t.Helper()
	for _, path := range h.paths(names...) {
		testenv.Eventually(h.t, "remove "+path, func() bool { return !errors.Is(unix.Rmdir(path), unix.EBUSY) })
	}
}

func (h *host) id(name string) uint64 {
	h.t.Helper()
	rel, err := h.root.Rel(filepath.Join(h.base, name))
	check(h.t, err)
	id, err := h.root.ID(rel)
	check(h.t, err)
	return id
}

// pin opens what is pinned with a name below the pin path.
func (h *host) pin(name string) (*ebpf.Map, link.Link) {
	h.t.Helper()
	path := filepath.Join(h.pins, name)
	if slices.Contains(statemaps.StateNames(), name) {
		m, err := ebpf.LoadPinnedMap(path, nil)
		check(h.t, err)
		return m, nil
	}
	l, err := link.LoadPinnedLink(path, nil)
	check(h.t, err)
	return nil, l
}

// linkOf opens the pinned link of a hook.
func (h *host) linkOf(hook, cgroup string) link.Link {
	h.t.Helper()
	_, l := h.pin(fmt.Sprintf("cgroup-%d/%s", h.id(cgroup), hook))
	h.t.Cleanup(func() { l.Close() })
	return l
}

// pinned lists what is at the pin path: names that end in a slash are folders.
func (h *host) pinned() (names []string) {
	h.t.Helper()
	check(h.t, filepath.WalkDir(h.pins, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		name := strings.TrimPrefix(path, h.pins+"/")
		if d.IsDir() {
			name += "/"
		}
		names = append(names, name)
		return err
	}))
	return names
}

// objects are things of ours in the kernel, by their ids.
type objects struct {
	links    map[link.ID]bool
	programs map[ebpf.ProgramID]bool
	maps     map[ebpf.MapID]bool
}

// snapshot tells all that a filter has made, as the kernel knows it: what is
// pinned, which programs the links run, and the cgroups.
func (h *host) snapshot() map[string]string {
	h.t.Helper()
	text, _ := h.inventory()
	return text
}

func (h *host) objects() objects {
	h.t.Helper()
	_, o := h.inventory()
	return o
}

func (h *host) inventory() (map[string]string, objects) {
	h.t.Helper()
	text := map[string]string{}
	o := objects{map[link.ID]bool{}, map[ebpf.ProgramID]bool{}, map[ebpf.MapID]bool{}}
	for _, name := range h.pinned() {
		if strings.HasSuffix(name, "/") {
			text["pin "+name] = ""
			continue
		}
		m, l := h.pin(name)
		if m != nil {
			info, err := m.Info()
			check(h.t, err)
			check(h.t, m.Close())
			id, _ := info.ID()
			o.maps[id] = true
			text["pin "+name] = fmt.Sprint("map ", id)
			continue
		}
		info, err := l.Info()
		check(h.t, err)
		check(h.t, l.Close())
		o.links[info.ID] = true
		o.programs[info.Program] = true
		text["pin "+name] = fmt.Sprintf("link %d, program %d", info.ID, info.Program)
		if c := info.Cgroup(); c != nil {
			text["pin "+name] += fmt.Sprintf(", cgroup %d", c.CgroupId)
		}
		for _, id := range mapsOf(h.t, info.Program) {
			o.maps[id] = true
		}
	}
	check(h.t, filepath.WalkDir(h.base, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			text["cgroup "+strings.TrimPrefix(path, h.base)] = ""
		}
		return err
	}))
	return text, o
}

func mapsOf(t *testing.T, id ebpf.ProgramID) []ebpf.MapID {
	t.Helper()
	prog, err := ebpf.NewProgramFromID(id)
	check(t, err)
	defer prog.Close()
	info, err := prog.Info()
	check(t, err)
	ids, _ := info.MapIDs()
	return ids
}

// unchanged fails the test if anything differs from a snapshot.
func (h *host) unchanged(before map[string]string, after string) {
	h.t.Helper()
	if diff := difference(before, h.snapshot()); diff != "" {
		h.t.Errorf("after %s, something has changed:\n%s", after, diff)
	}
}

func difference(before, after map[string]string) string {
	var diff strings.Builder
	for _, key := range slices.Sorted(maps.Keys(before)) {
		if text, ok := after[key]; !ok || text != before[key] {
			fmt.Fprintf(&diff, "- %s %s\n", key, before[key])
		}
	}
	for _, key := range slices.Sorted(maps.Keys(after)) {
		if text, ok := before[key]; !ok || text != after[key] {
			fmt.Fprintf(&diff, "+ %s %s\n", key, after[key])
		}
	}
	return diff.String()
}

// without returns the objects that are not among others.
func (o objects) without(others objects) objects {
	o = objects{maps.Clone(o.links), maps.Clone(o.programs), maps.Clone(o.maps)}
	maps.DeleteFunc(o.links, func(id link.ID, _ bool) bool { return others.links[id] })
	maps.DeleteFunc(o.programs, func(id ebpf.ProgramID, _ bool) bool { return others.programs[id] })
	maps.DeleteFunc(o.maps, func(id ebpf.MapID, _ bool) bool { return others.maps[id] })
	return o
}

// alive lists those of the objects that the kernel still has.
func (o objects) alive() (alive []string) {
	for id := range o.links {
		if l, err := link.NewFromID(id); err == nil {
			l.Close()
			alive = append(alive, fmt.Sprint("link ", id))
		}
	}
	for id := range o.programs {
		if p, err := ebpf.NewProgramFromID(id); err == nil {
			alive = append(alive, "program "+p.String())
			p.Close()
		}
	}
	for id := range o.maps {
		if m, err := ebpf.NewMapFromID(id); err == nil {
			alive = append(alive, "map "+m.String())
			m.Close()
		}
	}
	return alive
}

// gone waits until the kernel has freed the objects, which it does in its own
// time after the last reference.
func (o objects) gone(t *testing.T) {
	t.Helper()
	var alive []string
	defer func() {
		if len(alive) > 0 {
			t.Logf("alive: %q", alive)
		}
	}()
	testenv.Eventually(t, "free what was loaded", func() bool {
		alive = o.alive()
		return len(alive) == 0
	})
}

// nothingLeft fails the test if anything is attached, pinned or loaded; o are
// the objects of when it was.
func (h *host) nothingLeft(o objects) {
	h.t.Helper()
	if pins := h.pinned(); len(pins) != 0 {
		h.t.Errorf("still pinned: %v", pins)
	}
	if h.Attached() {
		h.t.Errorf("%s is still there", h.pins)
	}
	h.noneAttached()
	o.gone(h.t)
	rel, err := h.root.Rel(h.base)
	check(h.t, err)
	testenv.Eventually(h.t, "unload the programs below "+h.base, func() bool {
		for id, err := ebpf.ProgramGetNextID(0); err == nil; id, err = ebpf.ProgramGetNextID(id) {
			if cgroup.Within(loader.ProgramCgroup(id), rel) {
				return false
			}
		}
		return true
	})
}

// noneAttached fails the test if a cgroup at or below the base has programs.
func (h *host) noneAttached() {
	h.t.Helper()
	check(h.t, filepath.WalkDir(h.base, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		dir, err := os.Open(path)
		if err != nil {
			return err
		}
		defer dir.Close()
		for i, attach := range loader.AttachTypes() {
			// A link that lost its last reference is detached a little later.
			testenv.Eventually(h.t, fmt.Sprintf("detach %s of %s", loader.HookNames()[i], path), func() bool {
				result, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: attach})
				check(h.t, err)
				return len(result.Programs) == 0
			})
		}
		return nil
	}))
}

// blockedAddress is in the preset metadata.
const blockedAddress = "169.254.169.254"

// packetTo returns a UDP packet behind an Ethernet header.
func packetTo(dst string) []byte {
	packet := make([]byte, 14+20+8)
	packet[12] = 0x08 // ETH_P_IP
	ip := packet[14:]
	copy(ip, []byte{0: 0x45, 3: 28, 8: 64, 9: unix.IPPROTO_UDP, 12: 192, 0, 2, 1})
	copy(ip[16:], net.ParseIP(dst).To4())
	return packet
}

const packetSize = 28

// sends hands a packet to the program in force for a policed cgroup, as if the
// test's process had sent it, and says whether it passes.
func (h *host) sends(cgroup, dst string) bool {
	h.t.Helper()
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(h.hook("egress", cgroup).Program))
	check(h.t, err)
	defer prog.Close()
	verdict, err := prog.Run(&ebpf.RunOptions{Data: packetTo(dst)})
	check(h.t, err)
	return verdict == 1
}

// connects says whether the test's process may send to an address, which it
// does not: connecting a UDP socket is silent.
func connects(t *testing.T, dst string) bool {
	t.Helper()
	conn, err := net.Dial("udp4", net.JoinHostPort(dst, "9"))
	switch {
	case err == nil:
		conn.Close()
		return true
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		return true
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.EPERM):
		return false
	}
	t.Fatal(err)
	return false
}

// counters returns what is kept about containers, by the ids of their cgroups,
// and the totals.
func (h *host) counters() (map[uint64]statemaps.Container, statemaps.Counters) {
	h.t.Helper()
	state, err := h.State()
	check(h.t, err)
	defer state.Close()
	containers, err := state.Containers()
	check(h.t, err)
	totals, err := state.Totals()
	check(h.t, err)
	return containers, totals
}
