package cgroup_test

import (
	"slices"
	"testing"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// What names say is read as the table has it, which TestNamedCgroups of the loader makes
// cgroups of.
func TestNames(t *testing.T) {
	scopes := cgroup.DefaultScopes()
	for _, n := range testenv.NamedCgroups() {
		rel := "/some.slice/" + n.Name
		if got := slices.ContainsFunc(scopes, func(s cgroup.Scope) bool { return s.Matches(rel) }); got != n.Container {
			t.Errorf("%s: taken for a container: %v", n.Name, got)
		}
		if got := cgroup.ContainerID(rel); got != n.ID {
			t.Errorf("%s: got id %q, want %q", n.Name, got, n.ID)
		}
	}
	for _, s := range scopes {
		if s.Parts().Kind != cgroup.ScopeChild && !slices.ContainsFunc(testenv.NamedCgroups(), func(n testenv.NamedCgroup) bool { return s.Matches(n.Name) }) {
			t.Errorf("%s: the table has no name of that scope", s)
		}
	}
}

func TestScopeOfDirectory(t *testing.T) {
	for rel, want := range map[string]bool{
		"/default/x": true, "/default/x/y": false, "/default": false, "/other/x": false, "/a/default/x": false, "/defaultx": false,
	} {
		if got := cgroup.Scope("/default/*").Matches(rel); got != want {
			t.Errorf("%s: got %v", rel, got)
		}
	}
}

// What a policy without default scopes would police is told by names that these match.
func TestSampleNames(t *testing.T) {
	for _, rel := range append(cgroup.PodContainers(), cgroup.DockerContainer("/ci"), cgroup.DockerContainer("ci.slice")) {
		if cgroup.ContainerID(rel) == "" {
			t.Errorf("%s has no id", rel)
		}
	}
	if got := cgroup.DockerContainer("ci.slice"); !cgroup.Scope("docker-{id}.scope").Matches(got) {
		t.Errorf("got %s in a slice", got)
	}
}

func TestContainerOf(t *testing.T) {
	docker, inner := cgroup.DockerContainer("/docker"), cgroup.DockerContainer("/inner")
	for _, tt := range []struct{ name, cgroups, want string }{
		{"service", "0::/system.slice/ssh.service\n", ""},
		{"container", "0::" + docker + "\n", docker},
		{"within a container", "0::" + docker + inner + "/init\n", docker},
		{"hybrid", "4:memory:" + docker + "\n1:name=systemd:" + docker + "\n0::" + docker + "\n", docker},
		{"hybrid, runc before 1.1", "4:memory:" + docker + "\n1:name=systemd:" + docker + "\n0::/system.slice/docker.service\n", docker},
		{"hybrid, service", "4:memory:/system.slice/ssh.service\n1:name=systemd:/system.slice/ssh.service\n0::/\n", ""},
		{"version 1 alone", "4:cpu,cpuacct:" + docker + "\n", docker},
		{"a colon in the name", "1:name=systemd:/a:b" + docker + "\n0::/\n", "/a:b" + docker},
	} {
		if got := cgroup.ContainerIn(tt.cgroups); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}
