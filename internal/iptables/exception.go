package iptables

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// exceptions collects what the rules let through although they would stop it otherwise.
type exceptions struct {
	report
	before ledger // what earlier phases reported
}

// carrySkip notes that the rule of a step is carried over, if the step lets packets
// through.
func (x *exceptions) carrySkip(s *step) {
	if s.act == skip {
		x.carry(s.rule)
	}
}

// of returns what a step lets through that would be stopped otherwise, or the holes in what
// it stops. What a step lets through within a limit counts if that limit has become the
// limit on mail. If another jump, without a limit, leads to the same rule, that does not
// make the limited step an exception.
func (x *exceptions) of(s *step) []policy.Rule {
	if s.rule.isGoto || s.never() != "" || s.act == none || (s.act == drop || s.limit != nil) && !x.before.carried[s.rule] {
		return nil
	}
	entries, holes, err := s.entries()
	if err != nil {
		return nil
	}
	if s.act == drop {
		return holes
	}
	return entries
}

// needed reports whether a step can be the reason for an exception. A step that skips
// others is one only if one of the skipped steps would drop a part of the entry.
func (p *pass) needed(i int, e policy.Rule) bool {
	if p.steps[i].act != skip {
		return true
	}
	for j := i + 1; j < p.steps[i].end; j++ {
		s := &p.steps[j]
		if s.act != drop || s.never() != "" {
			continue
		}
		entries, _, err := s.entries()
		if err != nil || slices.ContainsFunc(entries, func(d policy.Rule) bool { _, ok := intersect(d, e); return ok }) {
			return true
		}
	}
	return false
}

// allowed is what the policy allows although an entry blocks it.
type allowed struct {
	exceptions
	entries []policy.Rule
}

// maxExceptions limits how many pairs of an exception and an entry that blocks are
// compared.
const maxExceptions = 100_000

// allow carries over what the rules let through before a rule that drops. The entries begin
// with those that block has spared.
func allow(families []*family, blocked blocks, before ledger) allowed {
	a := allowed{exceptions: exceptions{before: before}, entries: append([]policy.Rule{}, blocked.spared...)}
	work := 0
	for _, f := range families {
		for _, p := range f.passes {
			for i := range p.steps {
				entries := a.of(&p.steps[i])
				if work += len(entries) * len(blocked.entries); work > maxExceptions {
					a.note(nil, Stricter, "too many rules: not every exception was carried over")
					return a
				}
				a.step(f, p, i, entries, blocked.entries)
			}
		}
	}
	return a
}

func (a *allowed) step(f *family, p *pass, i int, entries, blocked []policy.Rule) {
	s := &p.steps[i]
	var refused []policy.Rule
	for _, e := range entries {
		for _, b := range blocked {
			c, ok := intersect(e, b)
			switch {
			case !ok || !p.needed(i, c):
			case slices.Contains(a.entries, c):
				a.carrySkip(s)
			case c.Validate() == nil && f.lets(c, e.Prefix.Bits() > 0):
				a.entries = append(a.entries, c)
				a.comment("allow", s.rule)
				a.carrySkip(s)
			case !slices.Contains(refused, c) && s.limit == nil:
				refused = append(refused, c)
			}
		}
	}
	if len(refused) == 0 {
		return
	}
	what := refused[0].String()
	if len(refused) > 1 {
		what += fmt.Sprintf(" and %d more", len(refused)-1)
	}
	if why := s.conditions(); why != "" {
		a.note(s.rule, Stricter, "the exception is not carried over, since it depends on %s: the policy stops %s", why, what)
	} else {
		a.note(s.rule, Stricter, "the exception is not carried over: other rules may stop a part of it all the same, and the policy stops %s", what)
	}
}

// lets reports whether the rules let everything in an entry through. If limited is set,
// mail within the limit counts as let through.
func (f *family) lets(e policy.Rule, limited bool) bool {
	v := f.verdicts(e)
	return v == passes || limited && v&dropped == 0
}

// exempted is where mail may go without the limit.
type exempted struct {
	exceptions
	destinations []netip.Prefix
}

// exempt carries over the destinations to which mail is not limited. without is the policy
// without these destinations.
func exempt(families []*family, mail mailLimit, without policy.Policy, before ledger) exempted {
	x := exempted{exceptions: exceptions{before: before}, destinations: []netip.Prefix{}}
	if len(mail.ports) == 0 {
		return x
	}
	for _, f := range families {
		for _, p := range f.passes {
			for i := range p.steps {
				x.step(f, p, i, mail, without)
			}
		}
	}
	return x
}

func (x *exempted) step(f *family, p *pass, i int, mail mailLimit, without policy.Policy) {
	s := &p.steps[i]
	done := map[netip.Prefix]bool{}
	for _, e := range x.of(s) {
		to := e.Prefix
		if to.Bits() == 0 || e.Proto != 0 && e.Proto != tcp || e.Port != 0 && !mail.limitsPort(e.Port) || done[to] {
			continue
		}
		done[to] = true
		open := func(port uint16) bool { return !without.Blocks(to.Addr(), tcp, port) }
		if !slices.ContainsFunc(mail.ports, open) || !p.needed(i, policy.Rule{Prefix: to, Proto: tcp}) {
			continue
		}
		var v verdict
		for _, port := range mail.ports {
			v |= f.verdicts(policy.Rule{Prefix: to, Port: port, Proto: tcp})
		}
		listed := slices.Contains(x.destinations, to)
		why := s.conditions()
		switch {
		case v == passes:
			if !listed {
				x.destinations = append(x.destinations, to)
			}
			x.comment("smtp.exempt", s.rule)
			x.carrySkip(s)
		case v&passes == 0:
		case why != "":
			x.note(s.rule, Stricter, "the exception is not carried over, since it depends on %s: the policy limits mail to %s", why, to)
		case !listed:
			x.note(s.rule, Stricter, "the exception is not carried over: smtp.exempt is for every packet to every port of mail, and the rules limit or stop some of those to %s", to)
		}
	}
}
