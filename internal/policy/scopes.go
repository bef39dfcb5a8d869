package policy

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
)

// Scope tells the cgroups of containers from others below a policed cgroup. It is a name with
// {id}, which stands for the 64 hexadecimal digits of a container's id, or with one *, which
// stands for any characters, at any depth, such as docker-{id}.scope; or everything in one
// directory, such as /default/*; or BuildScope.
type Scope string

// AnyScope, alone, means that every child of a policed cgroup is a container.
const AnyScope Scope = "any"

// defaultsScope stands for DefaultScopes in a list.
const defaultsScope Scope = "default"

// BuildScope stands for the containers in which BuildKit runs the steps of a build: 25 letters
// and digits, alone or after a colon.
const BuildScope Scope = "{build}"

const (
	scopeID = "{id}"
	// As in bpf/types.h.
	maxScopePrefix, maxScopeSuffix, maxScopes = 96, 16, 32
	containerID                               = 64
)

// DefaultScopes returns the scopes of Docker with either cgroup driver, BuildKit, Podman
// (including Quadlet's payloads and builds), containerd (including those of ctr in its
// default namespace) and CRI-O.
func DefaultScopes() []Scope {
	return []Scope{
		"docker-{id}.scope", "{id}", BuildScope,
		"libpod-{id}.scope", "libpod-{id}", "libpod-payload-{id}",
		"buildah-*", "crun-buildah-*", "runc-buildah-*",
		"cri-containerd-{id}.scope", "nerdctl-{id}.scope", "/default/*",
		"crio-{id}.scope", "crio-{id}",
	}
}

// ScopeKind is the form of a [Scope].
type ScopeKind int

const (
	ScopeID    ScopeKind = iota // prefix, id, suffix
	ScopeAny                    // prefix, one character or more, suffix
	ScopeBuild                  // BuildScope
	ScopeChild                  // any name, in the directory prefix
)

// ScopeParts are the parts of a [Scope].
type ScopeParts struct {
	Kind           ScopeKind
	Prefix, Suffix string
	// Level is the depth below the root, for ScopeChild.
	Level int
}

// Parts splits a scope that [ParseScope] has accepted.
func (s Scope) Parts() ScopeParts {
	if s == BuildScope {
		return ScopeParts{Kind: ScopeBuild}
	}
	if dir, ok := strings.CutSuffix(string(s), "*"); ok && strings.HasPrefix(dir, "/") {
		return ScopeParts{Kind: ScopeChild, Prefix: dir, Level: strings.Count(dir, "/")}
	}
	if prefix, suffix, ok := strings.Cut(string(s), scopeID); ok {
		return ScopeParts{Kind: ScopeID, Prefix: prefix, Suffix: suffix}
	}
	prefix, suffix, _ := strings.Cut(string(s), "*")
	return ScopeParts{Kind: ScopeAny, Prefix: prefix, Suffix: suffix}
}

// ParseScope reads a Scope, any, or default, which has a meaning only in a list.
func ParseScope(text string) (Scope, error) {
	s := Scope(text)
	if s == AnyScope || s == BuildScope || s == defaultsScope {
		return s, nil
	}
	bad := func(why string) (Scope, error) {
		return "", fmt.Errorf("%q: %s; want a name such as docker-{id}.scope or ci-*, a directory such as /default/*, {build}, default for all defaults, or any", text, why)
	}
	if strings.Count(text, scopeID)+strings.Count(text, "*") != 1 {
		return bad("want {id} or * exactly once")
	}
	p := s.Parts()
	switch {
	case p.Kind == ScopeChild && (p.Prefix == "/" || path.Clean(p.Prefix)+"/" != p.Prefix):
		return bad("not a directory below the root")
	case p.Kind != ScopeChild && strings.Contains(text, "/"):
		return bad("a name has no slash")
	case p.Kind == ScopeAny && p.Prefix == "":
		return bad("it would match almost every cgroup")
	case len(p.Prefix) > maxScopePrefix || len(p.Suffix) > maxScopeSuffix:
		return bad(fmt.Sprintf("longer than %d characters before, or %d after, the variable part", maxScopePrefix, maxScopeSuffix))
	case strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }):
		return bad("not a printable name")
	}
	return s, nil
}

// ParseScopes reads the scopes of a policy.
func ParseScopes(texts []string) ([]Scope, error) {
	var scopes []Scope
	for _, text := range texts {
		s, err := ParseScope(text)
		if err != nil {
			return nil, err
		}
		scopes = append(scopes, s)
	}
	return finishScopes(scopes)
}

func finishScopes(scopes []Scope) ([]Scope, error) {
	if i := slices.Index(scopes, defaultsScope); i >= 0 {
		scopes = slices.Concat(scopes[:i], DefaultScopes(), scopes[i+1:])
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

// UnmarshalText is [ParseScope].
func (s *Scope) UnmarshalText(text []byte) (err error) {
	*s, err = ParseScope(string(text))
	return err
}

var buildName = regexp.MustCompile(`^(?:.*:)?[0-9a-z]{25}$`)

// Matches says whether the scope matches the cgroup at a path from the root.
func (s Scope) Matches(cgroup string) bool {
	p, name := s.Parts(), path.Base(cgroup)
	switch p.Kind {
	case ScopeChild:
		return strings.Count(cgroup, "/") == p.Level && strings.HasPrefix(cgroup, p.Prefix)
	case ScopeBuild:
		return buildName.MatchString(name)
	}
	if !strings.HasPrefix(name, p.Prefix) || !strings.HasSuffix(name, p.Suffix) || len(name) <= len(p.Prefix)+len(p.Suffix) {
		return false
	}
	middle := name[len(p.Prefix) : len(name)-len(p.Suffix)]
	return p.Kind == ScopeAny || len(middle) == containerID && strings.Trim(middle, "0123456789abcdef") == ""
}

// Recognises says whether containers below the policed cgroup rel are recognised by name: in
// systemd's slices and in the root. Elsewhere each child is a container.
func (p Policy) Recognises(rel string) bool {
	return (rel == "/" || strings.HasSuffix(rel, ".slice")) && !slices.Contains(p.Scopes, AnyScope)
}

// IsContainer says whether the cgroup at a path is a container, by its name.
func (p Policy) IsContainer(cgroup string) bool {
	return slices.ContainsFunc(p.Scopes, func(s Scope) bool { return s.Matches(cgroup) })
}

// PolicesPods says whether the policy polices the pods of a Kubernetes node, by the names that
// containerd and CRI-O give to cgroups with the systemd driver.
func (p Policy) PolicesPods() bool {
	const pod = "/kubepods.slice/kubepods-pod0.slice/"
	id := strings.Repeat("0", containerID)
	return p.IsContainer(pod+"cri-containerd-"+id+".scope") || p.IsContainer(pod+"crio-"+id+".scope")
}
