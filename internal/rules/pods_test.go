package rules_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/rules"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// source knows these containers.
type source struct {
	container.Source
	known []container.Container
}

func (s *source) Name() string                                        { return "test" }
func (s *source) Started() bool                                       { return true }
func (s *source) List(context.Context) ([]container.Container, error) { return s.known, nil }

// TestPods applies a rule for a namespace: the pods that the source knows get it, and those of
// which it tells what the cgroup's path does not confirm get nothing.
func TestPods(t *testing.T) {
	root, base, state := scene(t)
	src := &source{}
	n := 0
	type made struct {
		path    string
		pod, at uint64
	}
	add := func(parent, namespace, uid string) made {
		t.Helper()
		n++
		id := fmt.Sprintf("%064x", n)
		path := filepath.Join(base, parent, id)
		check(t, os.MkdirAll(path, 0o755))
		src.known = append(src.known, container.Container{
			Identity: container.Identity{ID: id}, Source: "test",
			Pod: container.Pod{Namespace: namespace, Name: "pod", UID: uid, Container: container.Sandbox},
		})
		return made{path, number(t, root, filepath.Dir(path)), number(t, root, path)}
	}
	due := add("kubepods/besteffort/pod11-a", "kube-system", "11-a")
	systemd := add("kubepods.slice/kubepods-pod12_b.slice", "kube-system", "12-b")
	add("kubepods/besteffort/pod13", "team", "13")
	add("kubepods/besteffort/pod14", "kube-system", "15") // another pod's
	add("docker", "kube-system", "16")
	add("kubepods/burstable/pod17/"+strings.Repeat("a", 64)+"/kubepods/pod18", "kube-system", "18")

	v := container.NewInventory(src)
	check(t, v.Refresh(t.Context()))
	all := []policy.ContainerRule{{Namespace: "kube-system", Metadata: policy.Allowed}}
	apply := func(list []policy.ContainerRule, revoke bool) {
		t.Helper()
		_, err := rules.Apply(root, state, withRules(list...), v, revoke)
		check(t, err)
	}
	expect := func(when string, want ...made) {
		t.Helper()
		pods, err := state.Pods()
		check(t, err)
		containers, err := state.Containers()
		check(t, err)
		spared := map[uint64]bool{}
		for id, c := range containers {
			if c.Flags != 0 {
				spared[id] = true
			}
		}
		if len(pods) != len(want) || len(spared) != len(want) {
			t.Errorf("%s: %d pods and %d containers are spared, want %d", when, len(pods), len(spared), len(want))
		}
		for _, m := range want {
			if pods[m.pod].Flags != maps.MayReachMetadata || !spared[m.at] {
				t.Errorf("%s: %s is not spared", when, m.path)
			}
		}
	}
	apply(all, false)
	expect("a rule", due, systemd)
	apply(all[:0], false)
	expect("no rule")
	apply(all, false)
	src.known = src.known[:1]
	check(t, v.Refresh(t.Context()))
	apply(all, false)
	expect("the source does not know one any more", due, systemd)
	apply(all, true)
	expect("nor is it to keep anything", due)

	// A rule by image or name does not hold for all containers of a pod.
	apply([]policy.ContainerRule{{Namespace: "kube-system", Name: "agent", Metadata: policy.Denied}, all[0]}, false)
	pods, err := state.Pods()
	check(t, err)
	if len(pods) != 0 {
		t.Errorf("got %+v", pods)
	}
	// For one container.
	c := container.Container{Identity: container.Identity{ID: src.known[0].ID, CgroupID: due.at}, Source: "test", Pod: src.known[0].Pod}
	c.Cgroup, err = root.Rel(due.path)
	check(t, err)
	_, err = rules.ApplyTo(root, state, withRules(all...), c)
	check(t, err)
	expect("one container", due)
	_, err = rules.ApplyTo(root, state, withRules(), c)
	check(t, err)
	expect("one container without a rule")

	// Pods that the policy leaves out stay as they are.
	left := withRules(all...)
	left.Scopes, err = policy.ParseScopes([]string{"docker-{id}.scope"})
	check(t, err)
	left.Containers[0].SMTP = &policy.Limit{Rate: policy.Rate{Count: 1, Period: 60e9}, Burst: 1}
	check(t, state.Forget(due.at))
	_, err = rules.Apply(root, state, left, v, false)
	check(t, err)
	_, err = rules.ApplyTo(root, state, left, c)
	check(t, err)
	if known, err := state.Recognised(due.at); err != nil || known {
		t.Errorf("a container that is left out: known %v, %v", known, err)
	}
	if pods, err = state.Pods(); err != nil || len(pods) > 0 {
		t.Errorf("a pod that is left out: %+v, %v", pods, err)
	}
}

// TestNetworkUnknown asks a runtime that at times does not tell whether a pod has the host's network. What was
// decided when it did stays, unless the rules are others.
func TestNetworkUnknown(t *testing.T) {
	root, base, state := scene(t)
	id := strings.Repeat("d", 64)
	path := filepath.Join(base, "kubepods/pod31-e", id)
	check(t, os.MkdirAll(path, 0o755))
	rel, err := root.Rel(path)
	check(t, err)
	at := number(t, root, path)
	anyContainer := withRules(
		policy.ContainerRule{Namespace: "*", HostNetwork: true, Metadata: policy.Denied},
		policy.ContainerRule{Namespace: "team", Metadata: policy.Allowed})
	// The network matters to the pod, but not to this container.
	otherContainers := withRules(slices.Clone(anyContainer.Containers)...)
	otherContainers.Containers[0].Name = "other"
	for _, tt := range []struct {
		when            string
		p               policy.Policy
		unknown, revoke bool
		container, pod  bool // are spared
	}{
		{"at first", anyContainer, true, false, false, false},
		{"known", anyContainer, false, false, true, true},
		{"unknown again", anyContainer, true, false, true, true},
		{"other rules", anyContainer, true, true, false, false},
		{"at first, another's network", otherContainers, true, false, true, false},
		{"known, another's network", otherContainers, false, false, true, true},
		{"unknown again, another's network", otherContainers, true, false, true, true},
		{"other rules, another's network", otherContainers, true, true, true, false},
	} {
		c := container.Container{
			Identity: container.Identity{ID: id, Cgroup: rel, CgroupID: at}, Source: "test",
			Pod: container.Pod{Namespace: "team", Name: "pod", UID: "31-e", NetworkUnknown: tt.unknown},
		}
		v := container.NewInventory(&source{known: []container.Container{c}})
		check(t, v.Refresh(t.Context()))
		if !tt.revoke {
			_, err := rules.ApplyTo(root, state, tt.p, c)
			check(t, err)
		}
		_, err := rules.Apply(root, state, tt.p, v, tt.revoke)
		check(t, err)
		pods, err := state.Pods()
		check(t, err)
		got, _, err := state.Container(at)
		check(t, err)
		if spared := got.Flags&maps.MayReachMetadata != 0; spared != tt.container || len(pods) > 0 != tt.pod {
			t.Errorf("%s: spared %v, pods %+v", tt.when, spared, pods)
		}
	}
}

// scene returns the root of the hierarchy, a cgroup in it, and state without containers.
func scene(t *testing.T) (cgroup.Root, string, *maps.State) {
	t.Helper()
	state, err := maps.CreateState()
	check(t, err)
	t.Cleanup(func() { state.Close() })
	return testenv.Root(t), testenv.Cgroup(t), state
}

// withRules returns the default policy with these rules.
func withRules(rules ...policy.ContainerRule) policy.Policy {
	p := policy.Default()
	p.Containers = rules
	return p
}

func number(t *testing.T, root cgroup.Root, path string) uint64 {
	t.Helper()
	rel, err := root.Rel(path)
	check(t, err)
	id, err := root.ID(rel)
	check(t, err)
	return id
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A pod gets what its rule gives before it has a container, also where its sandbox has no cgroup.
func TestPodOfSandboxWithoutCgroup(t *testing.T) {
	root, base, state := scene(t)
	id := strings.Repeat("b", 64)
	sandbox := func(uid string) container.Container {
		return container.Container{
			Identity: container.Identity{ID: id}, Source: "test",
			Pod: container.Pod{Namespace: "kube-system", Name: "pod", UID: uid, Container: container.Sandbox},
		}
	}
	pod := filepath.Join(base, "kubepods/burstable/pod21-c")
	check(t, os.MkdirAll(pod, 0o755))
	// One that a container has made counts as a part of that container.
	check(t, os.MkdirAll(filepath.Join(base, "kubepods/pod23", strings.Repeat("c", 64), "pod22-d"), 0o755))
	for uid, want := range map[string]int{"21-c": 1, "22-d": 0, "24-e": 0} {
		v := container.NewInventory(&source{known: []container.Container{sandbox(uid)}})
		check(t, v.Refresh(t.Context()))
		_, err := rules.Apply(root, state, withRules(policy.ContainerRule{Namespace: "kube-system", Metadata: policy.Allowed}), v, true)
		check(t, err)
		pods, err := state.Pods()
		check(t, err)
		if len(pods) != want || want == 1 && pods[number(t, root, pod)].Flags != maps.MayReachMetadata {
			t.Errorf("%s: got %+v, want %d", uid, pods, want)
		}
	}
}
