package cgroup_test

import (
	"slices"
	"strings"
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

func TestPod(t *testing.T) {
	id := strings.Repeat("0", 64)
	const uid = "0e0f1b6a-24a4-4b5c-8a3a-0f6c2f1a9b1d"
	under := strings.ReplaceAll(uid, "-", "_")
	for rel, want := range map[string]string{
		"/kubepods/besteffort/pod" + uid + "/" + id:                                                                                                                uid,
		"/kubepods/pod" + uid + "/" + id + "/nested/" + id:                                                                                                         uid,
		"/kubepods/pod" + uid + "/crio-" + id + "/container":                                                                                                       uid,
		"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + id + ".scope":                                     uid,
		"/kubepods.slice/kubepods-pod" + under + ".slice/crio-" + id + ".scope/container":                                                                          uid,
		"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + under + ".slice/cri-containerd-" + id + ".scope": uid,
		// A static pod, whose uid is a hash.
		"/kubepods/burstable/pod0123456789abcdef0123456789abcdef/" + id: "0123456789abcdef0123456789abcdef",

		"/kubepods/besteffort/pod" + uid:              "", // no container
		"/kubepods/besteffort/pod" + uid + "/x/" + id: "",
		"/docker/" + id: "",
		"/docker/" + id + "/kubepods/pod" + uid + "/" + id:                "", // a node of kind
		"/system.slice/docker-" + id + ".scope":                           "",
		"/kubepods.slice/kubepods-evil-pod" + under + ".slice/crio-" + id: "",
		"/":                                 "",
		"":                                  "",
		"/kubepods/besteffort/podx y/" + id: "",
		"/podman/libpod-" + id:              "", // beside Kubernetes
		"/pods/" + id:                       "",
		"/user.slice/user-1000.slice/pod" + uid + "/" + id: "",
	} {
		pod, got := cgroup.Pod(rel)
		if got != want || (pod == "") != (want == "") || pod != "" && !strings.HasPrefix(rel, pod+"/") {
			t.Errorf("%s: got %q in %s, want %q", rel, got, pod, want)
		}
	}
}
