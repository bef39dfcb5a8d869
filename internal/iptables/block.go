package iptables

import (
	"net/netip"
	"slices"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// blocks is what the policy blocks.
type blocks struct {
	report
	entries []policy.Rule
	spared  []policy.Rule           // what has to stay open although an entry covers it
	origins map[policy.Rule][]*rule // the rules behind each entry, and behind entries that a wider entry replaces
}

// block carries over the rules that drop.
func block(families []*family) blocks {
	b := blocks{entries: []policy.Rule{}, spared: []policy.Rule{}, origins: map[policy.Rule][]*rule{}}
	for f, s := range every(families) {
		if s.act != drop || s.never() != "" || !s.inUser && !s.about() {
			continue
		}
		entries, why := s.blockable()
		if why != "" {
			b.refuse(s.rule, why)
			continue
		}
		b.step(f, s, entries)
	}
	b.entries = widest(b.entries)
	return b
}

// blockable returns the policy entries for a step that drops, or why the policy cannot have
// any.
func (s *step) blockable() (entries []policy.Rule, why string) {
	entries, _, err := s.entries()
	switch {
	case err != nil:
		return nil, err.Error()
	case len(entries) == 0:
		return nil, "no packet matches it and the rules that lead to it"
	case s.limit != nil && !s.limit.over:
		return nil, "it stops what is within the limit, and lets the rest through"
	case s.limit != nil:
		return nil, "only new mail connections can be limited"
	case entries[0].Prefix.Bits() == 0 && len(s.mail()) == 0:
		return nil, "it names no destination, nor a port of mail"
	}
	return entries, ""
}

func (b *blocks) step(f *family, s *step, entries []policy.Rule) {
	mail := s.mail()
	entries = b.possible(s, f.stopped(entries, len(mail) > 0))
	if len(entries) == 0 {
		if f.enforces(s, mail) {
			b.carry(s.rule)
		} else {
			b.refuse(s.rule, "it stops nothing: other rules let all of it through before, or stop it")
		}
		return
	}
	b.carry(s.rule)
	if c := s.conditions(); c != "" {
		b.note(s.rule, Stricter, "the policy holds for every container, whatever is true of %s", c)
	}
	if s.assumes(entries) {
		b.note(s.rule, Weaker, "docker0 is taken to have its usual network, %s, which the rule leaves open (! -o docker0): import the table nat too, which tells it", docker0)
	}
	for _, e := range entries {
		b.add(s, e)
		if len(mail) > 0 && e.Prefix.Bits() == 0 {
			b.note(s.rule, Stricter, "%s; the policy stops that too: name such servers under allow", unseenMail)
		} else if near(e.Prefix) && s.sparesBridge() {
			b.note(s.rule, Stricter, "the policy also keeps containers on one bridge from each other, where their network is in %s: name it under allow, or import the table nat too, which tells these networks", e.Prefix)
		} else if near(e.Prefix) {
			b.note(s.rule, Stricter, "FORWARD does not see what containers send to the host itself, nor always what they send each other on one bridge; the policy stops that too, where it is for %s", e.Prefix)
		}
	}
	b.comment("block", s.rule)
	for _, e := range entries {
		switch {
		case e.Proto != 0 && e.Proto != tcp:
		case len(mail) == 0 && !overlapsMetadata(e.Prefix) && f.letsAnswer(e):
			b.note(s.rule, Stricter, "the rules let packets of connections that exist pass; the policy stops them too: who connects from %s to a port that is published gets no answer", e.Prefix)
		case s.newOnly():
			b.note(s.rule, Stricter, "the rule stops new connections; the policy stops every packet, those of connections that exist too")
		}
	}
}

// stopped returns the entries some of whose packets the rules stop. An entry for mail to
// everywhere counts as stopped if the rules stop mail to most destinations; the others are
// exceptions.
func (f *family) stopped(entries []policy.Rule, mail bool) (list []policy.Rule) {
	for _, e := range entries {
		var v verdict
		if mail && e.Prefix.Bits() == 0 {
			v = f.judge(f.mailPacket(e.Port))
		} else {
			v = f.verdicts(e)
		}
		if v&dropped != 0 {
			list = append(list, e)
		}
	}
	return list
}

// possible returns the entries that a policy can have and that packets can match.
func (b *blocks) possible(s *step, entries []policy.Rule) (list []policy.Rule) {
	for _, e := range entries {
		if err := e.Validate(); err != nil { // for instance IPv4's ICMP in ip6tables
			b.note(s.rule, NotCarried, "%v", err)
		} else if unforwarded(e.Prefix) && !overlapsMetadata(e.Prefix) {
			b.note(s.rule, NotCarried, "the host does not forward packets to %s: the rule meets none", e.Prefix)
		} else {
			list = append(list, e)
		}
	}
	return list
}

// add adds an entry for a step.
func (b *blocks) add(s *step, e policy.Rule) {
	if b.origins[e] == nil {
		b.entries = append(b.entries, e)
	}
	if !slices.Contains(b.origins[e], s.rule) {
		b.origins[e] = append(b.origins[e], s.rule)
	}
	for _, p := range spared(e) {
		if !slices.Contains(b.spared, p) {
			b.spared = append(b.spared, p)
			b.comment("allow", s.rule)
		}
	}
}

// widest returns the entries that no wider entry for the same addresses covers. A network
// does not replace an address in it, because a single address is blocked as a source too.
func widest(entries []policy.Rule) []policy.Rule {
	same := map[netip.Prefix][]policy.Rule{}
	for _, e := range entries {
		same[e.Prefix] = append(same[e.Prefix], e)
	}
	return slices.DeleteFunc(entries, func(a policy.Rule) bool {
		return slices.ContainsFunc(same[a.Prefix], func(b policy.Rule) bool { return a != b && covers(b, a) })
	})
}

// enforces reports whether a step stops mail that is over a limit.
func (f *family) enforces(s *step, ports []uint16) bool {
	return slices.ContainsFunc(ports, func(port uint16) bool {
		pk := f.mailPacket(port)
		return f.judge(pk)&limited != 0 && f.reaches(pk, s)
	})
}

// letsAnswer reports whether packets of existing connections pass to the destination of an
// entry.
func (f *family) letsAnswer(e policy.Rule) (lets bool) {
	f.within(e, func(p packet) bool {
		p.old = true
		lets = f.judge(p)&passes != 0
		return !lets
	})
	return lets
}

// local are networks to which nothing is forwarded.
var local = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// unforwarded reports whether a network is in a local one.
func unforwarded(p netip.Prefix) bool {
	return slices.ContainsFunc(local, func(l netip.Prefix) bool { return l.Bits() <= p.Bits() && l.Contains(p.Addr()) })
}

// spared returns what an entry that blocks has to leave open because the rule never sees
// it: above all a container's own loopback.
func spared(e policy.Rule) (open []policy.Rule) {
	for _, l := range local {
		if l.Bits() <= e.Prefix.Bits() || !e.Prefix.Contains(l.Addr()) {
			continue
		}
		if l.Addr().IsLoopback() || e.Port == 0 {
			open = append(open, policy.Rule{Prefix: l, Port: e.Port, Proto: e.Proto})
		}
	}
	return open
}

// near reports whether a network may contain the host or other containers.
func near(p netip.Prefix) bool {
	return slices.ContainsFunc(private, p.Overlaps) && p.Bits() < p.Addr().BitLen() && p.Bits() > 0
}
