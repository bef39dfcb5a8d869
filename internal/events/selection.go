package events

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Selection says which refusals are wanted: those that one entry of each list matches. An empty
// list matches all. In patterns a star stands for any characters.
type Selection struct {
	// Containers are patterns for the name, the id, or the cgroup: its path below the cgroup2
	// mount, or the last part of it. At least 12 digits of an id, as `docker ps` shows it,
	// also match if they begin it.
	Containers []string
	// Reasons are those of records.
	Reasons []string
	// Destinations match in any spelling of the address, as those that a policy blocks.
	Destinations []policy.Rule
	// Processes are patterns for the names of processes. The kernel keeps 15 bytes of a name;
	// a longer one matches by these.
	Processes []string
	// Not turns the selection around: wanted is what the lists do not match.
	Not bool
}

// ParseReason reads one of the reasons to refuse.
func ParseReason(s string) (string, error) {
	reasons := []string{ReasonBlocked, ReasonMalformed, ReasonRateLimited, ReasonNoBucket, ReasonFamily}
	if !slices.Contains(reasons, s) {
		last := len(reasons) - 1
		return "", fmt.Errorf("%q: want %s or %s", s, strings.Join(reasons[:last], ", "), reasons[last])
	}
	return s, nil
}

// All says whether the selection has no lists.
func (s Selection) All() bool {
	return len(s.Containers) == 0 && !s.detailed()
}

// detailed says whether it depends on more than the container.
func (s Selection) detailed() bool {
	return len(s.Reasons)+len(s.Destinations)+len(s.Processes) > 0
}

// Wants says whether a record belongs to what is selected. Suppressed and Lost stand for
// refusals of which little is known: they are wanted unless none of these refusals could be.
// The same holds for records of types that this version does not know.
func (s Selection) Wants(r Record) bool {
	switch r.Type {
	case Refusal:
		return s.matches(r) != s.Not
	case Start, Lost:
		return true
	}
	switch {
	case r.Container == nil, s.All():
		return true
	case s.Not && s.detailed():
		return true
	}
	return s.matchesContainer(r) != s.Not
}

func (s Selection) matches(r Record) bool {
	return s.matchesContainer(r) && s.matchesDestination(r) && s.matchesProcess(r) &&
		(len(s.Reasons) == 0 || slices.Contains(s.Reasons, r.Reason))
}

func (s Selection) matchesContainer(r Record) bool {
	c := r.Container
	if len(s.Containers) == 0 || c == nil {
		return len(s.Containers) == 0
	}
	names := []string{c.Name, c.ID}
	if c.Cgroup != "" {
		names = append(names, c.Cgroup, path.Base(c.Cgroup))
	}
	const short = 12
	return slices.ContainsFunc(s.Containers, func(pattern string) bool {
		return glob(pattern, names...) ||
			len(pattern) >= short && cgroup.ContainerID(c.ID) != "" && strings.HasPrefix(c.ID, pattern)
	})
}

func (s Selection) matchesDestination(r Record) bool {
	if len(s.Destinations) == 0 || r.Destination == nil || !r.Destination.Address.IsValid() {
		return len(s.Destinations) == 0
	}
	// A name that is not known matches destinations without a protocol.
	proto, _ := policy.ParseProtocol(r.Protocol)
	p := policy.Policy{Block: s.Destinations}
	return p.Match(r.Destination.Address, proto, r.Destination.Port).Blocked()
}

func (s Selection) matchesProcess(r Record) bool {
	if len(s.Processes) == 0 || r.Process == nil {
		return len(s.Processes) == 0
	}
	comm := runes(r.Process.Comm)
	const longest = 15
	return slices.ContainsFunc(s.Processes, func(pattern string) bool {
		return glob(runes(pattern), comm) || len(pattern) > longest && comm == runes(pattern[:longest])
	})
}

// runes replaces each byte that is not valid UTF-8, as JSON does.
func runes(s string) string { return string([]rune(s)) }

// glob says whether a pattern matches one of some texts, as in rules for single containers.
func glob(pattern string, texts ...string) bool {
	return pattern != "" && policy.ContainerRule{Name: pattern}.Matches(policy.Subject{Names: texts})
}
