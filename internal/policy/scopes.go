package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// Scope is what the cgroups of containers are called.
type Scope = cgroup.Scope

// AnyScope, alone, means that every child of a policed cgroup is a container.
const AnyScope = cgroup.AnyScope

// maxScopes is MAX_SCOPES of bpf/cgroups.bpf.c.
const maxScopes = 32

// ParseScopes reads the scopes of a policy.
func ParseScopes(texts []string) ([]Scope, error) {
	var scopes []Scope
	for _, text := range texts {
		s, err := cgroup.ParseScope(text)
		if err != nil {
			return nil, err
		}
		scopes = append(scopes, s)
	}
	return finishScopes(scopes)
}

func finishScopes(scopes []Scope) ([]Scope, error) {
	if i := slices.Index(scopes, cgroup.DefaultsScope); i >= 0 {
		scopes = slices.Concat(scopes[:i], cgroup.DefaultScopes(), scopes[i+1:])
	}
	scopes = unique(scopes)
	switch {
	case len(scopes) == 0:
		return nil, errors.New("want at least one, or any")
	case len(scopes) > 1 && slices.Contains(scopes, AnyScope):
		return nil, errors.New("any stands alone")
	case len(scopes) > maxScopes:
		return nil, fmt.Errorf("%d of them: want at most %d", len(scopes), maxScopes)
	}
	return scopes, nil
}

// Recognises says whether containers below the policed cgroup rel are recognised by name: in
// systemd's slices and in the root. Elsewhere each child is a container.
func (p Policy) Recognises(rel string) bool {
	return (rel == "/" || strings.HasSuffix(rel, ".slice")) && !slices.Contains(p.Scopes, AnyScope)
}

// IsContainer says whether the cgroup at a path is a container, by its name.
func (p Policy) IsContainer(path string) bool {
	return slices.ContainsFunc(p.Scopes, func(s Scope) bool { return s.Matches(path) })
}

// LeavesOut says whether the cgroup at a path is in a pod and not a container, by its name: an operator may
// want that for pods that run the node.
func (p Policy) LeavesOut(path string) bool {
	return (cgroup.OfPod(path) || cgroup.PodUID(path) != "") && !p.IsContainer(path) && !slices.Contains(p.Scopes, AnyScope)
}

// PolicesPods says whether the policy polices the pods of a Kubernetes node, by the names that
// containerd and CRI-O give to cgroups with the systemd driver.
func (p Policy) PolicesPods() bool {
	return slices.ContainsFunc(cgroup.PodContainers(), p.IsContainer)
}

// OpensToPods returns the index of the first rule that opens something to pods of every namespace; -1
// if none does.
func (p Policy) OpensToPods() int {
	return slices.IndexFunc(p.Containers, func(r ContainerRule) bool {
		return strings.Trim(r.Namespace, "*") == "" && (r.Metadata == Allowed || r.Families != "" || r.SMTP != nil)
	})
}

// SparesPods says whether a rule gives pods of some namespace or name more than others.
func (p Policy) SparesPods() bool {
	return slices.ContainsFunc(p.Containers, func(r ContainerRule) bool {
		return (r.Namespace != "" || r.Pod != "") && (r.Metadata == Allowed || r.Families != "")
	})
}
