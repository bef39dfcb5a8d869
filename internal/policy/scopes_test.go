package policy

import (
	"slices"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

func TestParseScopes(t *testing.T) {
	for _, tt := range []struct{ in, want []Scope }{
		{[]Scope{"ci-*"}, []Scope{"ci-*"}},
		{[]Scope{"any"}, []Scope{AnyScope}},
		{[]Scope{"default"}, cgroup.DefaultScopes()},
		{[]Scope{"ci-*", "default", "{id}", "lxc.payload.*"}, slices.Concat([]Scope{"ci-*"}, cgroup.DefaultScopes(), []Scope{"lxc.payload.*"})},
	} {
		var texts []string
		for _, s := range tt.in {
			texts = append(texts, string(s))
		}
		got, err := ParseScopes(texts)
		slices.Sort(got)
		slices.Sort(tt.want)
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%q: got %q, %v, want %q", tt.in, got, err, tt.want)
		}
	}
	for _, in := range [][]string{nil, {"any", "default"}, {"*"}, {"a/b*"}, {"/*"}, {"docker.scope"}, {"a*b*"}} {
		if got, err := ParseScopes(in); err == nil {
			t.Errorf("%q: got %q, want an error", in, got)
		}
	}
	p := Default()
	p.Scopes = []Scope{"default"}
	if err := p.Validate(); err == nil {
		t.Error("a policy with the scope default is valid, which stands for no cgroup")
	}
}

// Pods can be left out by name, and are not called uncovered then; others cannot.
func TestLeavesOut(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	docker, all, each := Default(), Default(), Default()
	docker.Scopes, each.Scopes = []Scope{"docker-{id}.scope"}, []Scope{AnyScope}
	for _, tt := range []struct {
		policy Policy
		rel    string
		want   bool
	}{
		{docker, "/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope", true},
		{docker, "/kubepods/besteffort/pod1/" + id, true},
		{docker, "/own/kubepods/besteffort/pod1/" + id, true}, // kubelet --cgroup-root
		{all, "/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope", false},
		{each, "/kubepods/besteffort/pod1/" + id, false},
		{docker, "/system.slice/cri-containerd-" + id + ".scope", false},
		{docker, "/kubepods-mine/" + id, false},
	} {
		if got := tt.policy.LeavesOut(tt.rel); got != tt.want {
			t.Errorf("%s: left out %v, want %v", tt.rel, got, tt.want)
		}
	}
	if !all.PolicesPods() || docker.PolicesPods() {
		t.Errorf("pods are policed: %v by default, %v with Docker's scope alone", all.PolicesPods(), docker.PolicesPods())
	}
}
