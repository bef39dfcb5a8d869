package loader_test

import (
	"testing"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// TestNamedCgroups makes cgroups of the names that Go reads as the table has it (TestNames of
// the package cgroup), before attach and after: the program reads them in the same way.
func TestNamedCgroups(t *testing.T) {
	h := newHost(t)
	h.mkdir("own.slice/early.slice", "own.slice/later.slice")
	for _, n := range testenv.NamedCgroups() {
		h.mkdir("own.slice/early.slice/" + n.Name)
	}
	h.mustAttach(policy.Default(), "own.slice")
	for _, n := range testenv.NamedCgroups() {
		h.mkdir("own.slice/later.slice/" + n.Name)
	}
	got := h.enrolled()
	for _, n := range testenv.NamedCgroups() {
		for _, in := range []string{"own.slice/early.slice/", "own.slice/later.slice/"} {
			if got[in+n.Name] != n.Container {
				t.Errorf("%s: taken for a container: %v", in+n.Name, got[in+n.Name])
			}
		}
	}
}

// Go numbers the kinds of scopes as the program does.
func TestScopeKinds(t *testing.T) {
	for kind, want := range map[cgroup.ScopeKind]bpf.CgroupsScopeKind{
		cgroup.ScopeID:    bpf.CgroupsScopeKindSCOPE_ID,
		cgroup.ScopeAny:   bpf.CgroupsScopeKindSCOPE_ANY,
		cgroup.ScopeBuild: bpf.CgroupsScopeKindSCOPE_BUILD,
		cgroup.ScopeChild: bpf.CgroupsScopeKindSCOPE_CHILD,
	} {
		if bpf.CgroupsScopeKind(kind) != want {
			t.Errorf("kind %d is %d in C", kind, want)
		}
	}
}
