package cgroup_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// inNamespaces says whether the test runs in namespaces of its own. If not, it
// is run once more, in a process that has them, and is done after that.
func inNamespaces(t *testing.T, flags uintptr) bool {
	t.Helper()
	const marker = "CGROUP_TEST_NAMESPACES"
	if os.Getenv(marker) != "" {
		return true
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: flags, Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

func mount(t *testing.T, source, target, fstype string, flags uintptr) {
	t.Helper()
	if err := unix.Mount(source, target, fstype, flags, ""); err != nil {
		t.Fatalf("mount %s on %s: %v", source, target, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", target, err)
		}
	})
}

func TestFindRoot(t *testing.T) {
	if !inNamespaces(t, unix.CLONE_NEWNS) {
		return
	}
	want := func(want cgroup.Root) {
		t.Helper()
		got, err := cgroup.FindRoot()
		if want == "" && !errors.Is(err, cgroup.ErrNoCgroup2) || want != "" && err != nil || got != want {
			t.Fatalf("got %q, %v, want %q", got, err, want)
		}
	}
	host, err := cgroup.FindRoot()
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(string(host)); err != nil || info.Sys().(*syscall.Stat_t).Ino != 1 {
		t.Fatalf("%s is not the root of the hierarchy: %+v, %v", host, info, err)
	}
	if got, err := os.ReadFile(filepath.Join(string(host), "cgroup.procs")); err != nil || len(got) == 0 {
		t.Errorf("%s has no processes: %v", host, err)
	}
	part := t.TempDir()
	sub := testenv.Cgroup(t)
	t.Cleanup(func() { // for its removal; it goes with the namespace
		if err := unix.Mount("cgroup2", string(host), "cgroup2", 0, ""); err != nil {
			t.Error(err)
		}
	})
	mount(t, sub, part, "", unix.MS_BIND)
	for root := host; root != ""; root, _ = cgroup.FindRoot() {
		if err := unix.Unmount(string(root), unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}
	want("") // a part of the hierarchy is not the whole

	odd := filepath.Join(t.TempDir(), "a b\tc\\d\ne")
	if err := os.Mkdir(odd, 0o755); err != nil {
		t.Fatal(err)
	}
	mount(t, "cgroup2", odd, "cgroup2", 0)
	want(cgroup.Root(odd))
	second := t.TempDir()
	mount(t, "cgroup2", second, "cgroup2", 0)
	t.Run("hidden", func(t *testing.T) {
		mount(t, "tmpfs", odd, "tmpfs", 0)
		if got, err := cgroup.FindRoot(); err != nil || got != cgroup.Root(second) {
			t.Errorf("got %q, %v, want %q", got, err, second)
		}
	})
	want(cgroup.Root(odd))
}

func TestOnCgroup2(t *testing.T) {
	root := testenv.Root(t)
	for path, want := range map[string]bool{
		string(root):             true,
		testenv.Cgroup(t):        true,
		root.Path("/does-not"):   false,
		"/":                      false,
		t.TempDir():              false,
		"/proc/self/mountinfo":   false,
		root.Path("/../../proc"): false,
	} {
		if got := cgroup.OnCgroup2(path); got != want {
			t.Errorf("%s: got %v, want %v", path, got, want)
		}
	}
}

func TestCheckNamespace(t *testing.T) {
	if os.Getenv("CGROUP_TEST_NAMESPACES") == "" {
		if err := cgroup.CheckNamespace(); err != nil {
			t.Error(err)
		}
	}
	if inNamespaces(t, unix.CLONE_NEWCGROUP) {
		if err := cgroup.CheckNamespace(); !errors.Is(err, cgroup.ErrNotInitialNamespace) {
			t.Errorf("got %v, want %v", err, cgroup.ErrNotInitialNamespace)
		}
		// The first process is the host's, so there is a way back.
		if err := cgroup.JoinHosts(); err != nil {
			t.Error(err)
		}
		if err := cgroup.CheckNamespace(); err != nil {
			t.Error(err)
		}
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				runtime.LockOSThread() // each a thread of its own
				if ns, err := os.Readlink("/proc/thread-self/ns/cgroup"); err != nil || ns != "cgroup:[4026531835]" {
					t.Errorf("a thread is in %s, %v", ns, err)
				}
			})
		}
		all.Wait()
	}
}

func TestWatchPods(t *testing.T) {
	base := testenv.Cgroup(t)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Mkdir(base+"/kubepods", 0o755))
	made, stop := cgroup.Root(base).WatchPods()
	defer stop()
	for _, at := range []string{"podone", "besteffort", "besteffort/podtwo"} {
		check(os.Mkdir(base+"/kubepods/"+at, 0o755))
		select {
		case <-made:
		case <-time.After(20 * time.Second):
			t.Fatalf("nothing told of %s", at)
		}
	}
	check(os.Mkdir(base+"/other", 0o755))
	select {
	case <-made:
		t.Error("told of what is no pod's")
	default:
	}
}

func TestRel(t *testing.T) {
	root := testenv.Root(t)
	path := testenv.Cgroup(t)
	base := filepath.Base(path)
	testenv.Child(t, path, "web")
	links := t.TempDir()
	link := func(name, to string) string {
		name = filepath.Join(links, name)
		if err := os.Symlink(to, name); err != nil {
			t.Fatal(err)
		}
		return name
	}
	toRoot, toWeb := link("root", string(root)), link("web", path+"/web")
	dangling := link("dangling", path+"/nothing")
	linkedRoot := cgroup.Root(toRoot)
	t.Chdir(path)

	for _, tt := range []struct {
		name string
		root cgroup.Root
		path string
		want string // "" if refused
	}{
		{"cgroup", root, path, "/" + base},
		{"child", root, path + "/web", "/" + base + "/web"},
		{"unclean", root, path + "//web/./../web/", "/" + base + "/web"},
		{"relative", root, "web", "/" + base + "/web"},
		{"working directory", root, ".", "/" + base},
		{"missing", root, path + "/new", "/" + base + "/new"},
		{"missing, deep", root, path + "/new/a b/c", "/" + base + "/new/a b/c"},
		{"begins with dots", root, path + "/..web", "/" + base + "/..web"},
		{"link", root, toWeb, "/" + base + "/web"},
		{"missing behind a link", root, toWeb + "/a/b", "/" + base + "/web/a/b"},
		{"link to the mount", root, toRoot + "/" + base, "/" + base},
		{"root is a link", linkedRoot, path + "/web", "/" + base + "/web"},
		{"both are links", linkedRoot, toWeb, "/" + base + "/web"},
		{"root", root, string(root), "/"},
		{"root by link", root, toRoot, "/"},
		{"root by dots", root, path + "/web/../..", "/"},
		{"outside", root, links, ""},
		{"outside and missing", root, links + "/a/b", ""},
		{"outside by dots", root, path + "/../../x", ""},
		{"above", root, "/", ""},
		{"next to the mount", root, string(root) + "x", ""},
		{"empty root", "", path, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.root.Rel(tt.path)
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("Rel(%q): got %q, %v, want %q", tt.path, got, err, tt.want)
			}
			if tt.want == "" && tt.root != "" && !errors.Is(err, cgroup.ErrNotBelowRoot) {
				t.Errorf("Rel(%q): got %v, want %v", tt.path, err, cgroup.ErrNotBelowRoot)
			}
		})
	}
	// What would be made of these is not what was meant.
	for _, path := range []string{dangling, dangling + "/a", path + "/cgroup.procs/a"} {
		if got, err := root.Rel(path); err == nil {
			t.Errorf("Rel(%q): got %q, want an error", path, got)
		}
	}
}

// A file is neither a directory nor to be made one.
func TestRelOfFile(t *testing.T) {
	file := testenv.Cgroup(t) + "/cgroup.procs"
	if got, err := testenv.Root(t).Rel(file); !errors.Is(err, cgroup.ErrNotBelowRoot) {
		t.Errorf("got %q, %v, want %v", got, err, cgroup.ErrNotBelowRoot)
	}
}

func TestLevel(t *testing.T) {
	for rel, want := range map[string]uint32{"/": 0, "/a": 1, "/a/b": 2, "/a/b/": 2, "/a b/c.d/e": 3} {
		if got := cgroup.Level(rel); got != want {
			t.Errorf("%s: got %d, want %d", rel, got, want)
		}
	}
}

func TestWithin(t *testing.T) {
	for _, tt := range []struct {
		rel, of string
		want    bool
	}{
		{"/a", "/a", true},
		{"/a/b", "/a", true},
		{"/a/b/c", "/a", true},
		{"/a", "/a/b", false},
		{"/ab", "/a", false},
		{"/a-b", "/a", false},
		{"/b/a", "/a", false},
	} {
		if got := cgroup.Within(tt.rel, tt.of); got != tt.want {
			t.Errorf("%s within %s: got %v, want %v", tt.rel, tt.of, got, tt.want)
		}
	}
}

func TestFindByID(t *testing.T) {
	root := testenv.Root(t)
	path := testenv.Cgroup(t)
	seen := map[uint64]string{}
	for _, name := range []string{"web", "a b\tc", "ünïcode", "gone (deleted)", strings.Repeat("x", 255)} {
		rel := "/" + filepath.Base(path) + "/" + name
		testenv.Child(t, path, name)
		f, id, err := root.Open(rel)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if again, err := root.ID(rel); err != nil || again != id {
			t.Errorf("%s: got id %d, %v, then %d", rel, id, err, again)
		}
		if other := seen[id]; other != "" {
			t.Errorf("%s and %s have the same id", rel, other)
		}
		seen[id] = rel
		if got, err := root.Find(id); err != nil || got != rel {
			t.Errorf("id %d: got %q, %v, want %q", id, got, err, rel)
		}

		// The open directory keeps it from going altogether.
		if err := os.Remove(root.Path(rel)); err != nil {
			t.Fatal(err)
		}
		if got, err := root.Find(id); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was removed: got %q, %v, want %v", rel, got, err, fs.ErrNotExist)
		}
		if id, err := root.ID(rel); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was removed: got id %d, %v, want %v", rel, id, err, fs.ErrNotExist)
		}
		testenv.Child(t, path, name)
		if again, err := root.ID(rel); err != nil || again == id {
			t.Errorf("%s was made again: got id %d, %v, want another than %d", rel, again, err, id)
		}
	}
	for _, id := range []uint64{0, math.MaxUint64} {
		if got, err := root.Find(id); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("id %d: got %q, %v, want %v", id, got, err, fs.ErrNotExist)
		}
	}
	if f, _, err := root.Open("/" + filepath.Base(path) + "/cgroup.procs"); err == nil {
		f.Close()
		t.Error("opened a file as a cgroup")
	}
}

// hex is a container's id.
const hex = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestContainerID(t *testing.T) {
	for rel, want := range map[string]string{
		"/docker/" + hex:                         hex,
		"/system.slice/docker-" + hex + ".scope": hex,
		hex:                                      hex,
		"/docker":                                "",
		"/docker/" + hex + "/init":               "",
		"/docker/" + hex[1:]:                     "",
		"/docker/0" + hex:                        "",
		"/docker/" + strings.ToUpper(hex):        "",
		"/docker/g" + hex[1:]:                    "",
		"/system.slice/docker-" + hex + ".scope.d":   "",
		"/system.slice/docker-" + hex[1:] + ".scope": "",
		"/system.slice/docker-" + hex + "\n.scope":   "",
		"/system.slice/docker-" + hex + ".service":   "",
		"/system.slice/xdocker-" + hex + ".scope":    "",
		"":  "",
		"/": "",
	} {
		if got := cgroup.ContainerID(rel); got != want {
			t.Errorf("%q: got %q, want %q", rel, got, want)
		}
	}
}

func TestOutermostContainer(t *testing.T) {
	for rel, want := range map[string]string{
		"/docker/" + hex:                 "/docker/" + hex,
		"/docker/" + hex + "/init.scope": "/docker/" + hex,
		"/a.slice/docker-" + hex + ".scope/b/crio-" + hex + ".scope": "/a.slice/docker-" + hex + ".scope",
		"/" + hex + "/" + hex: "/" + hex,
		"/docker/" + hex[1:]:  "",
		"/docker":             "",
		"/":                   "",
		"":                    "",
	} {
		if got := cgroup.OutermostContainer(rel); got != want {
			t.Errorf("%q: got %q, want %q", rel, got, want)
		}
	}
}

// A directory is looked at only if there are others in it.
func TestOutermost(t *testing.T) {
	root := testenv.Root(t)
	top := testenv.Cgroup(t)
	base, err := root.Rel(top)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{}
	add := func(rel string, is bool) {
		testenv.Child(t, top, rel)
		if is {
			want[base+"/"+rel] = true
		}
	}
	add("a", false)
	add("a/is", true)
	add("a/is/is", false)
	add("a/b", false)
	add("a/b/c", false)
	add("a/b/c/is", true)
	add("is", true)
	add("many", false)
	for n := range 300 { // more than are read at once
		add(fmt.Sprintf("many/%s-%03d", hex, n), false)
	}
	add("many/is", true)
	found, err := root.Outermost(base, func(rel string) bool { return filepath.Base(rel) == "is" })
	if err != nil {
		t.Fatal(err)
	}
	if len(found) != len(want) || !slices.IsSortedFunc(found, func(a, b cgroup.Cgroup) int { return strings.Compare(a.Rel, b.Rel) }) {
		t.Errorf("got %v, want %v", found, want)
	}
	for _, c := range found {
		if id, err := root.ID(c.Rel); err != nil || id != c.ID || !want[c.Rel] {
			t.Errorf("got %+v, want id %d, %v", c, id, err)
		}
	}
	if found, err := root.Outermost(base+"/gone", func(string) bool { return true }); err != nil || len(found) > 0 {
		t.Errorf("got %v, %v below a cgroup that does not exist", found, err)
	}
}

// Cgroups that are nested too deeply for a path do not hide the others.
func TestOutOfReach(t *testing.T) {
	root, top := testenv.Root(t), testenv.Cgroup(t)
	base, err := root.Rel(top)
	if err != nil {
		t.Fatal(err)
	}
	nest(t, testenv.Child(t, top, "a"))
	testenv.Child(t, top, "is")
	found, err := root.Outermost(base, func(rel string) bool { return filepath.Base(rel) == "is" })
	if err != nil || len(found) != 1 {
		t.Errorf("got %v, %.200v", found, err)
	}
	if err := root.Processes(base, func(int) {}); err != nil {
		t.Errorf("look for processes: %.200v", err)
	}
}

// nest makes cgroups, each in the one before, whose paths are longer than PATH_MAX at the end.
// They are removed after the test.
func nest(t *testing.T, path string) {
	t.Helper()
	at, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for range 17 {
		if err != nil {
			t.Fatal(err)
		}
		parent, name := at, strings.Repeat("x", 255)
		if err := unix.Mkdirat(parent, name, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := errors.Join(unix.Unlinkat(parent, name, unix.AT_REMOVEDIR), unix.Close(parent)); err != nil {
				t.Error(err)
			}
		})
		at, err = unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	unix.Close(at)
}

func TestContainers(t *testing.T) {
	// Others would take them for Docker's.
	unlock, err := testenv.LockHost()
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	root := testenv.Root(t)
	top := testenv.Cgroup(t)
	// Other tests may have containers too.
	ours := func() (paths []string) {
		t.Helper()
		all, _, err := root.Containers()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			if id, err := root.ID(c.Rel); err != nil && !errors.Is(err, fs.ErrNotExist) || err == nil && id != c.ID {
				t.Errorf("id of %s: got %d, want %d, %v", c.Rel, c.ID, id, err)
			}
			if path := root.Path(c.Rel); cgroup.Within(path, top) {
				paths = append(paths, path)
			}
		}
		return paths
	}
	want := func(paths ...string) {
		t.Helper()
		testenv.Eventually(t, "containers "+strings.Join(paths, " "), func() bool {
			return slices.Equal(ours(), paths)
		})
	}
	start := func(path string) (stop func()) {
		t.Helper()
		cmd := testenv.Command(t, path, "sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	cgroupfs := testenv.Child(t, top, hex)
	nested := testenv.Child(t, cgroupfs, strings.Repeat("a", 64))
	slice := testenv.Child(t, top, "system.slice")
	systemd := testenv.Child(t, slice, "docker-"+hex+".scope")
	service := testenv.Child(t, slice, "mail.service")
	testenv.Child(t, top, strings.Repeat("f", 64)) // stays empty
	want()

	defer start(service)()
	defer start(top)()
	want()
	stop := start(systemd)
	defer start(nested)()
	want(cgroupfs, systemd)
	stop()
	want(cgroupfs)
}

func TestNetV1(t *testing.T) {
	for line, want := range map[string]bool{
		"31 24 0:27 / /sys/fs/cgroup/net_cls,net_prio rw,nosuid shared:13 - cgroup cgroup rw,net_cls,net_prio": true,
		"31 24 0:27 / /cls rw - cgroup none rw,net_cls":                                                        true,
		"31 24 0:27 / /prio rw - cgroup none rw,net_prio":                                                      true,
		"31 24 0:27 / /net_cls rw - cgroup net_cls rw,cpu,cpuacct":                                             false,
		"31 24 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate":                               false,
		"31 24 0:27 / /tmp/net_cls rw - tmpfs net_cls rw,size=1k":                                              false,
		"": false,
	} {
		if got := cgroup.NetV1In("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + line + "\n"); got != want {
			t.Errorf("%q: got %v", line, got)
		}
	}
	if _, err := cgroup.NetV1(); err != nil {
		t.Error(err)
	}
}

func TestDelegates(t *testing.T) {
	const mounts = `25 30 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
41 31 0:38 / /plain rw,relatime - cgroup2 cgroup2 rw
42 31 0:39 / /with\040space rw - cgroup2 none rw,nsdelegate
43 31 0:40 / /v1 rw - cgroup cgroup rw,nsdelegate
`
	for point, want := range map[string]bool{"/sys/fs/cgroup": true, "/plain": false, "/with space": true, "/v1": false, "/none": false} {
		if got := cgroup.DelegatesIn(mounts, point); got != want {
			t.Errorf("%s: got %v, want %v", point, got, want)
		}
	}
}

// Containers that are run like a machine have names, and others can be within them.
func TestSystemContainers(t *testing.T) {
	unlock, err := testenv.LockHost()
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	root, path := testenv.Root(t), testenv.Cgroup(t)
	inner := "lxc.payload.c1/system.slice/docker-" + strings.Repeat("0123456789abcdef", 4) + ".scope"
	for _, name := range []string{
		inner, "lxc.monitor.c1", "lxc.payload.", "lxc.payload.ended", "machine.slice/machine-m.scope", "machine.slice/systemd-nspawn@n.service/payload",
		`machine.slice/machine-qemu\x2d1\x2dvm.scope`, "machine.slice/libpod-1.scope",
	} {
		if err := os.MkdirAll(filepath.Join(path, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "ended") {
			continue
		}
		cmd := testenv.Command(t, filepath.Join(path, name), "sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
	}
	all, systems, err := root.Containers()
	if err != nil {
		t.Fatal(err)
	}
	rel := func(name string) string {
		rel, err := root.Rel(filepath.Join(path, name))
		if err != nil {
			t.Fatal(err)
		}
		return rel
	}
	if !slices.ContainsFunc(all, func(c cgroup.Cgroup) bool { return c.Rel == rel(inner) }) {
		t.Errorf("%s is not among %v", inner, all)
	}
	systems = slices.DeleteFunc(systems, func(s cgroup.System) bool { return !cgroup.Within(root.Path(s.Cgroup), path) })
	want := []cgroup.System{
		{Engine: "LXC", Name: "c1", Cgroup: rel("lxc.payload.c1")},
		{Engine: "systemd-nspawn", Name: "m", Cgroup: rel("machine.slice/machine-m.scope")},
		{Engine: "systemd-nspawn", Name: "n", Cgroup: rel("machine.slice/systemd-nspawn@n.service")},
	}
	if !slices.Equal(systems, want) {
		t.Errorf("got %+v, want %+v", systems, want)
	}
}

// What a container has of the host's cgroups is read off one of its processes.
func TestExposure(t *testing.T) {
	root, path := testenv.Root(t), testenv.Cgroup(t)
	of := func(name string, command ...string) cgroup.Exposure {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(path, name, "nested"), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := testenv.Command(t, filepath.Join(path, name, "nested"), command[0], command[1:]...)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		rel, err := root.Rel(filepath.Join(path, name))
		if err != nil {
			t.Fatal(err)
		}
		e, err := root.Exposure(rel)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	const wait = "echo; read line"
	if got := of("host", "sh", "-c", wait+" </dev/zero"); !got.Namespace || !got.Writable {
		t.Errorf("of the host: %+v", got)
	}
	if got := of("own", "unshare", "--cgroup", "sh", "-c", wait+" </dev/zero"); got.Namespace || !got.Writable {
		t.Errorf("with a cgroup namespace of its own: %+v", got)
	}
	readOnly := "mount -o remount,bind,ro " + string(root) + " && " + wait + " </dev/zero"
	if got := of("read-only", "unshare", "--cgroup", "--mount", "sh", "-c", readOnly); got.Namespace || got.Writable {
		t.Errorf("with the tree to read: %+v", got)
	}
	if got, err := root.Exposure("/none"); err != nil || got != (cgroup.Exposure{}) {
		t.Errorf("of none: %+v, %v", got, err)
	}
}
