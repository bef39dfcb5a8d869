package container

import (
	"reflect"
	"slices"
	"testing"

	"github.com/egressbpf/egressbpf/internal/docker"
	"github.com/egressbpf/egressbpf/internal/policy"
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

// A container counts as one of a pod only where the cgroup and the source of pods agree, and as one
// outside of pods only where neither says otherwise.
func TestSubjectOfPod(t *testing.T) {
	inPod, beside := "/kubepods/besteffort/pod1-a/"+id(1), "/system.slice/docker-"+id(1)+".scope"
	pod := Pod{Namespace: "kube-system", Name: "cni", UID: "1-a", HostNetwork: true}
	other := pod
	other.UID = "2-b"
	unsure := pod
	unsure.HostNetwork, unsure.NetworkUnknown = false, true
	for _, tt := range []struct {
		what   string
		cgroup string
		pod    Pod
		want   policy.Subject
	}{
		{"both", inPod, pod, policy.Subject{Namespace: "kube-system", Pod: "cni", HostNetwork: true}},
		{"no network told", inPod, unsure, policy.Subject{Namespace: "kube-system", Pod: "cni", NetworkUnknown: true}},
		{"another pod's cgroup", inPod, other, policy.Subject{PodUnknown: true}},
		{"no pod told, as by Docker", inPod, Pod{}, policy.Subject{PodUnknown: true}},
		{"no cgroup of a pod", beside, pod, policy.Subject{PodUnknown: true}},
		{"neither", beside, Pod{}, policy.Subject{}},
	} {
		got := Container{Identity: Identity{ID: id(1), Cgroup: tt.cgroup}, Source: "test", Pod: tt.pod}.Subject()
		if !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %+v, want %+v", tt.what, got, tt.want)
		}
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
