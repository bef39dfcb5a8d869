package iptables

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// action is what a rule does with a packet.
type action int

const (
	none action = iota // the next rule is asked
	drop
	skip // the rules up to step.end are not asked
)

// step is a rule in the place where a packet meets it, with the chains that lead
// there laid out in one row.
type step struct {
	rule   *rule
	v6     bool
	when   []*match // those of the jumps to its chain, and its own as the last
	limit  *limit   // what those in when come to together, or nil
	act    action
	end    int
	jump   bool // its target is a chain
	inUser bool // in DOCKER-USER, or a chain it jumps to
	own    bool // in a chain that Docker fills, which DOCKER-USER does not jump to
	aside  bool // it would drop, were it understood
}

// match returns that of the step's own rule.
func (s *step) match() *match { return s.when[len(s.when)-1] }

func (s *step) entries() (entries, holes []policy.Rule, err error) { return entriesOf(s.when, s.v6) }

// mail returns the ports of a step about mail, or nil.
func (s *step) mail() []uint16 { return mailOf(s.when, s.v6) }

func (s *step) about() bool { return about(s.when, s.v6) }

// catchAll reports whether a step is about every packet, whatever device it leaves by.
func (s *step) catchAll() bool {
	entries, holes, err := s.entries()
	return err == nil && s.limit == nil && len(holes) == 0 && slices.Equal(entries, []policy.Rule{{Prefix: everywhere(s.v6)}})
}

// never says why no new packet of a container meets the step, or "".
func (s *step) never() string {
	for _, m := range s.when {
		if m.never != "" {
			return m.never
		}
		if m.notNew {
			return "it is about packets of connections that exist, or answers"
		}
	}
	return ""
}

// conditions are those that a policy has no words for.
func (s *step) conditions() string {
	var list []string
	for _, m := range s.when {
		for _, c := range m.conditions {
			if t := c.String(); !slices.Contains(list, t) {
				list = append(list, t)
			}
		}
	}
	return strings.Join(list, ", ")
}

func (s *step) newOnly() bool {
	return slices.ContainsFunc(s.when, func(m *match) bool { return m.newOnly })
}

// sparesBridge reports whether a step is not about what stays on a bridge of containers,
// whose networks are not known.
func (s *step) sparesBridge() bool {
	return slices.ContainsFunc(s.when, func(m *match) bool {
		return slices.ContainsFunc(m.conditions, func(c condition) bool { return c.not && strings.HasPrefix(c.text, "-o ") })
	})
}

// assumes reports whether a step leaves the usual network of docker0 out of what it is about.
func (s *step) assumes(about []policy.Rule) bool {
	return slices.ContainsFunc(s.when, func(m *match) bool { return m.assumed }) &&
		slices.ContainsFunc(about, func(e policy.Rule) bool { return e.Prefix.Overlaps(docker0) && e.Prefix.Bits() > 0 })
}

// possible reports whether a step applies to any packet to an address.
func (s *step) possible(addr netip.Addr) bool {
	for _, m := range s.when {
		if m.never != "" || !m.to(addr) {
			return false
		}
	}
	return true
}

func (s *step) applies(p packet, w world) bool {
	for _, m := range s.when {
		if !m.applies(p, w) {
			return false
		}
	}
	return true
}

func (m *match) to(addr netip.Addr) bool {
	in := func(n netip.Prefix) bool { return n.Contains(addr) }
	return (m.dst == nil || slices.ContainsFunc(m.dst, in) != m.dstNot) && !slices.ContainsFunc(m.except, in)
}

// applies leaves the limit aside.
func (m *match) applies(p packet, w world) bool {
	if p.old && m.notOld || !p.old && m.notNew || m.never != "" {
		return false
	}
	if !m.to(p.dst) {
		return false
	}
	if m.proto != 0 && (m.proto == p.proto) == m.protoNot {
		return false
	}
	if m.ports != nil && (!hasPorts(p.proto) ||
		slices.ContainsFunc(m.ports, func(r portRange) bool { return r.contains(p.port) }) == m.portsNot) {
		return false
	}
	for _, c := range m.conditions {
		if w[c.text] == c.not {
			return false
		}
	}
	return true
}
