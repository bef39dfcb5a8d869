package container

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

func TestSelect(t *testing.T) {
	const root = cgroup.Root("/mnt/cgroup")
	hexA, hexB := strings.Repeat("a1", 32), strings.Repeat("b2", 32)
	// The last is called what another one's id is.
	names := map[string]string{
		"/a/" + hexA: "db", "/b/docker-" + hexB + ".scope": "a1", "/a/" + hexA[:63] + "2": hexB, "/a/api-1": "web-2",
	}
	all := []Identity{{ID: "cgroup-7", CgroupID: 7}}
	for i, rel := range []string{
		"/a/" + hexA, "/a/" + hexA[:63] + "2", "/b/docker-" + hexB + ".scope",
		"/a/web", "/a/web-1", "/a/web-2", "/b/web-1", "/a/api-1", "/a/api-2", "/b/api",
	} {
		c := IdentityOf(rel, uint64(100+i))
		c.Name = names[rel]
		all = append(all, c)
	}
	for _, tt := range []struct {
		name string
		want string
		err  error
	}{
		{name: hexA, want: "/a/" + hexA},
		{name: hexA[:63], err: ErrAmbiguous},
		{name: "a", err: ErrAmbiguous},
		{name: "db", want: "/a/" + hexA},
		{name: "d", err: ErrNoContainer},
		{name: "a1", want: "/b/docker-" + hexB + ".scope"}, // though it is the beginning of ids
		{name: "b2", want: "/b/docker-" + hexB + ".scope"},
		{name: hexB, want: "/b/docker-" + hexB + ".scope"},
		{name: "docker-" + hexB + ".scope", want: "/b/docker-" + hexB + ".scope"},
		{name: "docker-", err: ErrNoContainer},
		{name: "/b/web-1", want: "/b/web-1"},
		{name: "/mnt/cgroup/b/web-1", want: "/b/web-1"},
		{name: "/mnt/cgroup/b/web-1/", want: "/b/web-1"},
		{name: "web-2", err: ErrAmbiguous}, // a cgroup, and a name
		{name: "api-1", want: "/a/api-1"},
		{name: "web", want: "/a/web"}, // though it is the beginning of others
		{name: "api", want: "/b/api"}, // though it comes after those
		{name: "api-", err: ErrAmbiguous},
		{name: "web-1", err: ErrAmbiguous}, // one below each policed cgroup
		{name: "nginx", err: ErrNoContainer},
		{name: "cgroup-7", want: ""},
		{name: "", err: ErrNoContainer},
		{name: ".", err: ErrNoContainer},
		{name: "/", err: ErrNoContainer},
		{name: string(root), err: ErrNoContainer},
		{name: "/mnt/cgroup/a", err: ErrNoContainer},
	} {
		i, err := Select(root, all, tt.name)
		switch {
		case !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil):
			t.Errorf("%q: got %+v, %v, want %v", tt.name, all[i], err, tt.err)
		case err == nil && all[i].Cgroup != tt.want:
			t.Errorf("%q: got %+v, want %q", tt.name, all[i], tt.want)
		case err != nil && !strings.Contains(err.Error(), fmt.Sprintf("%q", tt.name)):
			t.Errorf("%q: the error does not name it: %v", tt.name, err)
		}
	}
	if i, err := Select(root, all, "web-1"); err == nil || !strings.Contains(err.Error(), "/a/web-1, /b/web-1") {
		t.Errorf("got %+v, %v, want it to say which", all[i], err)
	}
}
