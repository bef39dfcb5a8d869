package cgroup

import (
	"fmt"
	"path"
	"regexp"
	"strings"
)

// Scope tells the cgroups of containers from other cgroups below a policed cgroup. A scope
// has one of these forms: a name with {id}, which stands for the 64 hexadecimal digits of a
// container's id, such as docker-{id}.scope; a name with one *, which stands for any
// characters; everything in one directory, such as /default/*; or BuildScope. Names match
// at any depth.
type Scope string

// AnyScope, alone, means that every child of a policed cgroup is a container.
const AnyScope Scope = "any"

// DefaultsScope stands for DefaultScopes in a list.
const DefaultsScope Scope = "default"

// BuildScope matches the containers in which BuildKit runs the steps of a build: 25 letters
// and digits, alone or after a colon.
const BuildScope Scope = "{build}"

const (
	scopeID = "{id}"
	// The lengths in bpf/types.h.
	maxScopePrefix, maxScopeSuffix = 96, 16
	idLength                       = 64
)

// ScopeKind is the form of a [Scope], with the numbers of enum scope_kind in bpf/types.h.
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

// ParseScope reads a Scope, or any, or default, which makes sense only in a list.
func ParseScope(text string) (Scope, error) {
	s := Scope(text)
	if s == AnyScope || s == BuildScope || s == DefaultsScope {
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
	_, ok := p.variable(name)
	return ok
}

// variable returns the part of a name that {id} or * stands for, and whether the name
// matches the scope.
func (p ScopeParts) variable(name string) (string, bool) {
	if !strings.HasPrefix(name, p.Prefix) || !strings.HasSuffix(name, p.Suffix) || len(name) <= len(p.Prefix)+len(p.Suffix) {
		return "", false
	}
	middle := name[len(p.Prefix) : len(name)-len(p.Suffix)]
	return middle, p.Kind == ScopeAny || isID(middle)
}

// isID says whether a text has the form of a container's id, which is the same for all
// engines.
func isID(text string) bool {
	return len(text) == idLength && strings.Trim(text, "0123456789abcdef") == ""
}
