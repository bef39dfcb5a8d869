package metrics

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/web"
)

func TestPage(t *testing.T) {
	quiet, web1 := row("quiet", 1), row("web\xff", 2)
	quiet.Refused.Blocked.Packets = 0
	r := full(quiet, web1)
	r.label(1, engines{"web\xff": {Identity: container.Identity{Name: "front"}, Image: "nginx:1"}})
	p := r.Page()
	if p.Containers != 3 || len(p.Rows) != 2 || p.LeftOut() != 1 {
		t.Errorf("got %+v", p)
	}
	if first := p.Rows[0]; first.Name != "front" || first.Image != "nginx:1" || first.ID != "web\uFFFD" ||
		first.Blocked != 202 || first.Malformed != 101 || first.MailRefused != 17 || first.MailAllowed != 7 || first.Sockets != 5 || first.Host != 6 || *first.Tokens != 1.5 {
		t.Errorf("the one with the most refusals: %+v", first)
	}
	if p.Total.Blocked != 202 || p.Mode != "enforce" || len(p.Defences) != 2 || p.InForce {
		t.Errorf("got %+v", p)
	}

	for i := range web.MaxRows + 10 {
		r.stats.Containers = append(r.stats.Containers, row(fmt.Sprint("c", i), uint64(i+10)))
	}
	r.label(0, nil)
	if p := r.Page(); len(p.Rows) != web.MaxRows || p.Containers != web.MaxRows+12 {
		t.Errorf("%d rows of %d", len(p.Rows), p.Containers)
	}
}

// The page says why the filter is not fully in force.
func TestWhy(t *testing.T) {
	for _, tt := range []struct {
		what    string
		change  func(*Reading)
		inForce bool
		want    []string
	}{
		{"in force", func(*Reading) {}, true, nil},
		{"audit", func(r *Reading) { r.status.Enforcing, r.status.Mode = false, policy.Audit }, false, []string{"audit"}},
		{"a hook", func(r *Reading) {
			r.status.Enforcing = false
			r.status.Hooks = []loader.Hook{{Name: "egress", Cgroup: "/docker"}, {Name: "host_forward4"}}
		}, false, []string{"hook egress of /docker"}},
		{"uncovered", func(r *Reading) {
			for i := range 7 {
				r.status.Uncovered = append(r.status.Uncovered, loader.Uncovered{Name: fmt.Sprint("u", i)})
			}
		}, false, []string{"u0", "u1", "u2", "u3", "u4", "2 more"}},
		{"no answer", func(r *Reading) { r.uncertain = true }, false, []string{"engine"}},
		{"no room", func(r *Reading) { r.status.Room.Without = 2 }, false, []string{"2 containers"}},
		{"a bad file", func(r *Reading) { r.reload.successful = false }, false, []string{"configuration"}},
		{"nothing", func(r *Reading) {
			*r.status = loader.Status{Cgroups: []string{}}
			r.stats, r.err = nil, loader.ErrNotAttached
		}, false, []string{"nothing is attached"}},
	} {
		r := full(row("web", 1))
		r.status.Uncovered, r.status.Room.Without = nil, 0
		tt.change(r)
		r.label(0, nil)
		p := r.Page()
		if p.InForce != tt.inForce || len(p.Why) != len(tt.want) || p.Error != "" {
			t.Errorf("%s: %+v", tt.what, p)
			continue
		}
		for i, want := range tt.want {
			if !strings.Contains(p.Why[i], want) {
				t.Errorf("%s: %q, want %q", tt.what, p.Why[i], want)
			}
		}
		text, err := json.Marshal(p)
		check(t, err)
		if null := strings.ReplaceAll(string(text), `"records":null`, ""); strings.Contains(null, ":null") {
			t.Errorf("%s: %s", tt.what, text)
		}
	}
	r := full()
	r.err = errors.New("no")
	if p := r.Page(); p.Error != "no" || p.InForce || slices.Contains(p.Why, "no") {
		t.Errorf("not readable: %+v", p)
	}
}
