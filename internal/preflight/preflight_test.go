package preflight

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/docker"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == SelfTestArg {
		if err := SelfTest(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newHost(t *testing.T) Host {
	t.Helper()
	root := testenv.Root(t)
	return Host{
		Filter: loader.New(testenv.PinPath(t), root), Root: root,
		Config: policy.Config{Policy: policy.Default()},
	}
}

// result returns the check with a name.
func (r *Report) result(t *testing.T, name string) Check {
	t.Helper()
	i := slices.IndexFunc(r.Checks, func(c Check) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("no check %s: %+v", name, r.Checks)
	}
	return r.Checks[i]
}

func TestRun(t *testing.T) {
	h := newHost(t)
	entries := func() (names []string) {
		dir, err := os.ReadDir(string(h.Root))
		check(t, err)
		for _, e := range dir {
			if strings.HasPrefix(e.Name(), "egressbpf-check") {
				names = append(names, e.Name())
			}
		}
		return names
	}
	r := h.Run(t.Context())
	if !r.Ready {
		t.Errorf("not ready: %+v", r.Checks)
	}
	for _, name := range []string{"kernel", "cgroup2", "programs", "recognise", "self-test"} {
		if c := r.result(t, name); c.Result != OK {
			t.Errorf("%s: %s: %s", name, c.Result, c.Detail)
		}
	}
	if left := entries(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}

	h.Resolvers = []netip.Addr{netip.MustParseAddr("169.254.169.254")}
	h.Config.Mode, h.Config.Families, h.Config.HostSide = policy.Audit, policy.AnyFamily, policy.Off
	r = h.Run(t.Context())
	if c := r.result(t, "resolvers"); c.Result != Warn || !strings.Contains(c.Detail, "--allow-dns") {
		t.Errorf("resolvers: %+v", c)
	}
	for _, name := range []string{"socket_families", "host_side", "self-test"} {
		if c := r.result(t, name); c.Result != Warn {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

// The self-test must see what is wrong.
func TestSelfTest(t *testing.T) {
	h := newHost(t)
	path := testenv.Cgroup(t)
	rel, err := h.Root.Rel(path)
	check(t, err)
	dir, id, err := h.Root.Open(rel)
	check(t, err)
	defer dir.Close()
	for _, network := range []string{"udp", "tcp"} {
		wrong, err := selfTestIn(t.Context(), dir, network)
		if err != nil || !strings.Contains(wrong, network+" to "+blockedAddress+":1080: got <nil>") || strings.Contains(wrong, openAddress) {
			t.Errorf("%s without a filter: %q, %v", network, wrong, err)
		}
	}
	p := policy.Default()
	p.Block = []policy.Rule{{Prefix: netip.MustParsePrefix(openAddress + "/32")}}
	state, err := maps.CreateState()
	check(t, err)
	defer state.Close()
	progs, err := loader.Load(p, state, rel, id)
	check(t, err)
	defer progs.Close()
	detach, err := progs.AttachFor(dir, loader.AttachTypes())
	check(t, err)
	defer detach()
	for _, network := range []string{"udp", "tcp"} {
		wrong, err := selfTestIn(t.Context(), dir, network)
		if err != nil || !strings.Contains(wrong, network+" to "+openAddress) || strings.Contains(wrong, blockedAddress) {
			t.Errorf("%s with too much blocked: %q, %v", network, wrong, err)
		}
	}
}

func TestVersion(t *testing.T) {
	for _, tt := range []struct {
		release      string
		major, minor int
		ok           bool
	}{
		{"6.1.0-28-amd64", 6, 1, true},
		{"5.10.0", 5, 10, true},
		{"6.18.44-fc-v782", 6, 18, true},
		{"6.18+", 6, 18, true},
		{"6", 0, 0, false},
		{"x.y", 0, 0, false},
		{"", 0, 0, false},
	} {
		major, minor, ok := version(tt.release)
		if ok != tt.ok || ok && (major != tt.major || minor != tt.minor) {
			t.Errorf("%q: got %d.%d, %t", tt.release, major, minor, ok)
		}
	}
}

func TestDocker(t *testing.T) {
	h := newHost(t)
	var info string
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	check(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/_ping") {
			w.Header().Set("Api-Version", "1.47")
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, info)
	})}
	go server.Serve(l)
	defer server.Close()
	h.Docker, err = docker.Open("unix://" + socket)
	check(t, err)
	defer h.Docker.Close()
	unified := cgroup.Root("/sys/fs/cgroup")
	for _, tt := range []struct {
		root cgroup.Root
		info string
		want Result
		text string
	}{
		{unified, `{"ServerVersion":"28.0","CgroupDriver":"systemd","CgroupVersion":"2"}`, OK, "28.0 at unix://"},
		{unified, `{"ServerVersion":"28.0","CgroupDriver":"cgroupfs","CgroupVersion":"1"}`, Fail, "systemd.unified_cgroup_hierarchy=1"},
		{hybridRoot, `{"ServerVersion":"28.0","CgroupDriver":"cgroupfs","CgroupVersion":"1"}`, Warn, "systemd.unified_cgroup_hierarchy=1"},
		{unified, `{"ServerVersion":"28.0","CgroupDriver":"none","CgroupVersion":"2"}`, Fail, "delegation"},
		{unified, `{"ServerVersion":"28.0","CgroupDriver":"systemd","CgroupVersion":"2","SecurityOptions":["name=rootless"]}`, Warn, "rootless"},
		{unified, `{`, Warn, "not asked"},
	} {
		info, h.Root = tt.info, tt.root
		r := &Report{Ready: true}
		h.docker(t.Context(), r)
		if c := r.result(t, "docker"); c.Result != tt.want || !strings.Contains(c.Detail, tt.text) {
			t.Errorf("%s: got %+v, want %s with %q", tt.info, c, tt.want, tt.text)
		}
		if r.Ready == (tt.want == Fail) {
			t.Errorf("%s: ready %t", tt.info, r.Ready)
		}
	}

	for parent, want := range map[string]Result{"/ci": OK, "ci.slice": OK, "docker": OK} {
		r := &Report{}
		if h.parent(r, parent); r.Checks[0].Result != want {
			t.Errorf("cgroup-parent %s: %+v", parent, r.Checks)
		}
	}
	h.Config.Scopes = []policy.Scope{"docker-{id}.scope"}
	r := &Report{}
	if h.parent(r, "/ci"); r.Checks[0].Result != Warn {
		t.Errorf("cgroup-parent of unknown scopes: %+v", r.Checks)
	}
}

// TestCovered makes a cgroup that looks like a running container's.
func TestCovered(t *testing.T) {
	unlock, err := testenv.LockHost()
	check(t, err)
	defer unlock()
	h := newHost(t)
	base := testenv.Cgroup(t)
	scope := testenv.Child(t, base, "docker-"+strings.Repeat("a", 64)+".scope")
	cmd := testenv.Command(t, scope, "sleep", "60")
	check(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for _, tt := range []struct {
		cgroups []string
		want    Result
	}{
		{nil, OK},
		{[]string{string(h.Root)}, OK},
		{[]string{base}, OK},
		{[]string{base + "-other"}, Warn},
	} {
		h.Config.Cgroups = tt.cgroups
		r := &Report{}
		if h.covered(r); r.Checks[0].Result != tt.want {
			t.Errorf("%v: %+v", tt.cgroups, r.Checks)
		}
		// The process in it has the host's cgroup namespace.
		if last := r.Checks[len(r.Checks)-1]; last.Name != "cgroup_boundary" || last.Result != Warn {
			t.Errorf("%v: %+v", tt.cgroups, r.Checks)
		}
	}
}
