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
	none action = iota // continue with the next rule
	drop
	skip // continue at step.end
)

// step is a rule at the place where a packet meets it. The chains that lead there are laid
// out in one row.
type step struct {
	rule   *rule
	v6     bool
	when   []*match // the matches of the jumps to its chain, and as the last its own
	limit  *limit   // what the limits in when amount to; nil if there are none
	act    action
	end    int
	jump   bool // the target is a chain
	inUser bool // in DOCKER-USER, or in a chain that DOCKER-USER jumps to
	own    bool // in a chain that Docker fills, and that DOCKER-USER does not jump to
	aside  bool // set aside: the rule drops, but under a condition that a policy cannot express
}

// match returns the match of the step's own rule.
func (s *step) match() *match { return s.when[len(s.when)-1] }

func (s *step) entries() (entries, holes []policy.Rule, err error) { return entriesOf(s.when, s.v6) }

// mail returns the ports of a step about mail; nil if the step is not about mail.
func (s *step) mail() []uint16 { return mailOf(s.when, s.v6) }

func (s *step) about() bool { return about(s.when, s.v6) }

// catchAll reports whether a step matches every packet, whatever device the packet leaves
// by.
func (s *step) catchAll() bool {
	entries, holes, err := s.entries()
	return err == nil && s.limit == nil && len(holes) == 0 && slices.Equal(entries, []policy.Rule{{Prefix: everywhere(s.v6)}})
}

// never says why no new packet of a container meets the step; "" if one may.
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

// conditions lists the conditions that a policy cannot express.
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

// sparesBridge reports whether a step leaves out packets that stay on a bridge of
// containers whose networks are not known.
func (s *step) sparesBridge() bool {
	return slices.ContainsFunc(s.when, func(m *match) bool {
		return slices.ContainsFunc(m.conditions, func(c condition) bool { return c.not && strings.HasPrefix(c.text, "-o ") })
	})
}

// assumes reports whether a step leaves out the usual network of docker0, and one of the
// entries overlaps that network.
func (s *step) assumes(about []policy.Rule) bool {
	return slices.ContainsFunc(s.when, func(m *match) bool { return m.assumed }) &&
		slices.ContainsFunc(about, func(e policy.Rule) bool { return e.Prefix.Overlaps(docker0) && e.Prefix.Bits() > 0 })
}

// possible reports whether a step can match a packet to an address.
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

// applies reports whether the match holds for a packet in a world, apart from the limit.
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
