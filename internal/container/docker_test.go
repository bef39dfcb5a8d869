package container

import (
	"slices"
	"testing"

	"github.com/egressbpf/egressbpf/internal/docker"
)

// Links give a container names within another one's, which no rule for that other one
// is to match.
func TestSubject(t *testing.T) {
	var d Docker
	c := d.container(docker.Container{ID: id(1), Name: "db", Names: []string{"mailer-a/db", "db"}, Image: "postgres", Pid: 7})
	if s := c.Subject(); !slices.Equal(s.Names, []string{"db"}) || s.Image != "postgres" {
		t.Errorf("got %+v", s)
	}
	if c.ID != id(1) || c.Name != "db" || c.Source != "Docker" || c.Pid != 7 {
		t.Errorf("got %+v", c)
	}
}

// What Docker tells of has a meaning for an inventory.
func TestDockerActions(t *testing.T) {
	for _, a := range []docker.Action{docker.Resync, docker.Lost, docker.Start, docker.Die, docker.Destroy, docker.Rename, docker.Update} {
		if actions[a] == "" {
			t.Errorf("%s has none", a)
		}
	}
}
