package iptables

import (
	"net/netip"
	"slices"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// maxWork limits the comparison of rules and policy to some seconds.
const maxWork = 300_000_000

// comparison finds differences between policy and rules that no note mentions yet.
type comparison struct {
	report
	policy  policy.Policy
	mail    mailLimit
	blocked blocks
	sources order
	told    ledger

	weaker, stricter map[*rule]bool // rules with a note from this comparison
}

// compare puts one packet of every kind through rules and policy, and notes the
// differences; told is what earlier phases reported.
func compare(families []*family, p policy.Policy, mail mailLimit, blocked blocks, sources order, told ledger) report {
	c := comparison{policy: p, mail: mail, blocked: blocked, sources: sources, told: told, weaker: map[*rule]bool{}, stricter: map[*rule]bool{}}
	entries := len(p.Blocked()) + len(p.Allowed())
	for _, f := range families {
		if f.partial {
			c.note(nil, Weaker, "the rules ask for more than %d devices, sources and the like: the policy was compared with them in %d combinations of these, not in all", few, len(f.worlds))
		}
		if f.work(entries) > maxWork {
			c.note(nil, Weaker, "too many rules to compare with the policy in every case: what the order of the rules means may be lost")
			continue
		}
		c.family(f)
	}
	return c.report
}

// work estimates how long it takes to compare the rules with so many entries.
func (f *family) work(entries int) int {
	for _, p := range f.passes {
		entries += len(p.steps)
	}
	kinds := len(f.addrs) * (len(f.protos) + 4*len(f.ports))
	return len(f.addrs)*entries + kinds*len(f.worlds)*10
}

func (c *comparison) family(f *family) {
	blocked, allowed := c.policy.Blocked(), c.policy.Allowed()
	var limiting []*rule
	if f.limits(c.mail.ports) { // otherwise there is a note about the family as a whole
		for _, s := range c.mail.limits {
			limiting = append(limiting, s.rule)
		}
	}
	var addr netip.Addr
	var nearBlocked, nearAllowed []policy.Rule
	f.within(policy.Rule{Prefix: everywhere(f.v6)}, func(p packet) bool {
		if p.dst != addr {
			addr = p.dst
			nearBlocked, nearAllowed = toward(blocked, addr), toward(allowed, addr)
		}
		if unforwarded(netip.PrefixFrom(p.dst, p.dst.BitLen())) {
			return true
		}
		want := f.judge(p)
		blocks := contains(nearBlocked, p) && !contains(nearAllowed, p)
		limits := !blocks && p.proto == tcp && c.mail.limitsPort(p.port) &&
			!slices.ContainsFunc(c.policy.SMTP.Exempt, func(e netip.Prefix) bool { return e.Contains(p.dst) })
		if want&dropped != 0 && !blocks || want&limited != 0 && !blocks && !limits {
			c.missed(f, p)
		}
		if blocks && want&(passes|limited) != 0 {
			c.excess(c.blocking(p), p)
		}
		if limits && want&passes != 0 {
			c.excess(limiting, p)
		}
		return true
	})
}

// toward returns the entries whose network contains an address.
func toward(list []policy.Rule, addr netip.Addr) []policy.Rule {
	var near []policy.Rule
	for _, r := range list {
		if r.Prefix.Contains(addr) {
			near = append(near, r)
		}
	}
	return near
}

func contains(list []policy.Rule, p packet) bool {
	return slices.ContainsFunc(list, func(r policy.Rule) bool {
		return r.Prefix.Contains(p.dst) && (r.Proto == 0 || r.Proto == p.proto) && (r.Port == 0 || r.Port == p.port)
	})
}

// missed notes that the policy lets through what the rules may stop.
func (c *comparison) missed(f *family, p packet) {
	for _, s := range f.droppers(p) {
		if c.weaker[s.rule] || c.told.has(s.rule, NotCarried, Unknown, Weaker) || !s.inUser && !s.about() && !c.told.carried[s.rule] {
			continue
		}
		c.weaker[s.rule] = true
		c.note(s.rule, Weaker, "the rule stops packets that the policy lets through, such as one to %s", p)
	}
}

// blocking returns the rules behind the entries that block a packet.
func (c *comparison) blocking(p packet) (from []*rule) {
	for e, rules := range c.blocked.origins {
		if contains([]policy.Rule{e}, p) {
			from = append(from, rules...)
		}
	}
	return from
}

// excess notes that the policy stops what the rules may let through. The note names the
// first of the rules behind this.
func (c *comparison) excess(from []*rule, p packet) {
	if len(from) == 0 || slices.ContainsFunc(from, func(r *rule) bool { return c.stricter[r] || c.told.has(r, Stricter) }) {
		return
	}
	first := slices.MinFunc(from, func(a, b *rule) int { return c.sources.compare(a.at, b.at) })
	c.stricter[first] = true
	c.note(first, Stricter, "the policy also stops packets that the rules may let through, such as one to %s", p)
}
