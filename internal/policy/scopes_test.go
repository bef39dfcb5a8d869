package policy

import (
	"slices"
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
