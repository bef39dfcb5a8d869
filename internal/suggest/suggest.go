// Package suggest makes a policy from what another one refused, or would have refused in mode
// audit: one that refuses nothing legitimate, as far as the refusals tell. A person has to read
// it, since an attack looks the same.
//
// It reads only what the caller hands it, and its result depends on nothing else.
package suggest

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Suggestion is a policy, with the reasons for each of its entries.
type Suggestion struct {
	Config policy.Config
	// Comments are for [policy.Config.YAML].
	Comments map[string][]string
	// Kept is what Config does not refuse, although the policy in force does.
	Kept []Kept
	// Added is how many entries and rules Config has besides those in force, and Left how
	// many kinds of refusals stay.
	Added, Left int
	// Nothing says that nothing was refused.
	Nothing bool
	// Short says that the time of observation was too short to tell.
	Short bool
}

// Kept is what a container tried, and may do by a Suggestion.
type Kept struct {
	Container policy.Subject
	// Destination is not valid if what it tried was to open a socket of Family.
	Destination netip.AddrPort
	Protocol    uint8
	Family      uint16
	Count       uint64
	// Mail says that it was a mail connection, to be judged by the limit unless the
	// destination is exempt.
	Mail bool
}

// need is what containers with one name need.
type need struct {
	name       string
	containers []*observed
	// rule is the index of the rule in force for them; -1 if there is none.
	rule     int
	metadata tally[policy.Rule]
	families tally[uint16]
	mail     []mail
	limit    *policy.Limit // in force, if mail has entries
	wanted   *policy.Limit
}

// suggestion is a Suggestion in the making.
type suggestion struct {
	Suggestion
	of     *Observation
	needs  map[string]*need
	open   map[policy.Rule]tally[string] // entries for allow, with who asked
	closed map[policy.Rule]tally[string] // blocked by block, with who asked
	left   []string
	relays []relay
}

// Suggest returns the policy for what was observed, which enforces.
func (o *Observation) Suggest() Suggestion {
	o.addSeen()
	slices.SortStableFunc(o.containers, func(a, b *observed) int {
		return cmp.Or(cmp.Compare(a.title(), b.title()), cmp.Compare(key(a.Identity), key(b.Identity)))
	})
	s := &suggestion{
		of:         o,
		Suggestion: Suggestion{Config: o.Config, Comments: map[string][]string{}},
		needs:      map[string]*need{},
		open:       map[policy.Rule]tally[string]{},
		closed:     map[policy.Rule]tally[string]{},
	}
	s.Config.Mode = policy.Enforce
	s.relays = o.relays()
	for _, c := range o.containers {
		s.container(c)
	}
	s.allow()
	s.exempt()
	s.rules()
	s.explainBlocked()
	s.others()
	s.head()
	return s.Suggestion
}

// need returns that of the containers with the name of c; nil if no rule can name c.
func (s *suggestion) need(c *observed) *need {
	name := c.ruleName()
	if name == "" {
		return nil
	}
	n := s.needs[name]
	if n == nil {
		n = &need{name: name, rule: policy.RuleIndex(s.of.Config.Containers, c.Subject()), metadata: tally[policy.Rule]{}, families: tally[uint16]{}}
		s.needs[name] = n
	}
	if !slices.Contains(n.containers, c) {
		n.containers = append(n.containers, c)
	}
	return n
}

func (s *suggestion) container(c *observed) {
	attempts := slices.SortedFunc(maps.Keys(c.attempts), func(a, b attempt) int {
		return cmp.Or(cmp.Compare(a.reason, b.reason), a.destination.Compare(b.destination), cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.family, b.family))
	})
	unnamed := tally[policy.Rule]{}
	probes := tally[policy.Rule]{}
	elsewhere := tally[policy.Rule]{}
	forged := tally[policy.Rule]{}
	families := tally[uint16]{}
	counted := map[string]uint64{}
	for _, a := range attempts {
		n := min(c.attempts[a].count(), most)
		counted[a.reason] += n
		switch a.reason {
		case events.ReasonBlocked:
			to := ruleOf(a)
			m := s.Config.Match(a.destination.Addr(), a.protocol, a.destination.Port())
			switch {
			case !m.Blocked():
				elsewhere[to] += n
			case len(m.Block) > 0:
				add(s.closed, to, c.title(), n)
			case isService(a):
				for _, e := range m.Presets {
					add(s.open, policy.Rule{Prefix: e.Rule.Prefix, Port: to.Port, Proto: a.protocol}, c.title(), n)
				}
				s.keep(c, a, n)
			case !policy.HasPorts(a.protocol):
				probes[to] += n
			case s.need(c) == nil:
				unnamed[to] += n
			default:
				s.need(c).metadata[to] += n
				s.keep(c, a, n)
			}
		case events.ReasonFamily:
			if s.need(c) == nil || !slices.Contains(policy.FamilyNumbers(), uint(a.family)) {
				families[a.family] += n
				continue
			}
			s.need(c).families[a.family] += n
			s.keep(c, a, n)
		case events.ReasonRateLimited:
			if !s.of.isMail(a) {
				forged[ruleOf(a)] += n
			} else if s.need(c) != nil || s.isRelay(a.destination.Addr()) {
				s.keep(c, a, n)
			}
		}
	}
	if m := s.of.mailOf(c, s.relays); m.n > 0 {
		if n := s.need(c); n == nil {
			s.leave("%s: %s of mail over the limit%s: %s", c.title(), plural(m.n, "connection"), m.where(3), c.noName())
		} else {
			limit := limitFor(c.limit, m.peak)
			if n.wanted != nil {
				limit = wider(limit, *n.wanted)
			}
			n.wanted, n.mail = &limit, append(n.mail, m)
			if n.limit == nil || wider(*n.limit, c.limit) == c.limit {
				n.limit = &c.limit
			}
		}
	}
	if len(unnamed) > 0 {
		s.leave("%s: asked for the metadata service, %s: %s: %s", c.title(), times(unnamed.sum()), unnamed.list(3, policy.Rule.String), c.noName())
	}
	if len(probes) > 0 {
		s.leave("%s: asked for metadata addresses by protocols that no metadata service speaks: %s", c.title(), probes.list(3, policy.Rule.String))
	}
	if len(elsewhere) > 0 {
		s.leave("%s: blocked for another reason than the destination (its source, a tunnel of the host, or an earlier policy): %s", c.title(), elsewhere.list(3, policy.Rule.String))
	}
	if len(forged) > 0 {
		s.leave("%s: TCP from a mail port, or for an exempt destination by an earlier policy: %s", c.title(), forged.list(3, policy.Rule.String))
	}
	if len(families) > 0 {
		s.leave("%s: opened sockets of the families %s: %s", c.title(), families.list(5, familyName),
			"no rule can name the container, or only socket_families: any allows that family")
	}
	s.leaveCounted(c, counted)
}

// noName says why no rule is suggested for a container without a name of its own.
func (c *observed) noName() string {
	if c.Pod.Name != "" {
		return "for a pod, write a rule with its namespace"
	}
	return "no rule can name this container"
}

// leaveCounted tells of what was only counted.
func (s *suggestion) leaveCounted(c *observed, known map[string]uint64) {
	blocked := c.counted.Blocked.Packets + c.counted.Blocked.Connects
	if n := max(blocked, known[events.ReasonBlocked]) - known[events.ReasonBlocked]; n > 0 {
		s.leave("%s: asked for blocked destinations that are not recorded, %s", c.title(), times(n))
	}
	if n := max(c.counted.Families.Denied, known[events.ReasonFamily]) - known[events.ReasonFamily]; n > 0 {
		s.leave("%s: opened sockets of families that are not recorded, %s", c.title(), times(n))
	}
	if n := max(c.counted.Malformed.Packets, known[events.ReasonMalformed]); n > 0 {
		s.leave("%s: %s that cannot be judged (malformed)", c.title(), plural(n, "packet"))
	}
	if n := max(c.counted.SMTP.NoBucket, known[events.ReasonNoBucket]); n > 0 {
		s.leave("%s: %s of mail for which there was no room (no_bucket): see `egressbpf status`", c.title(), plural(n, "connection"))
	}
}

// isService says whether an attempt was for DNS or for the time, which clouds serve at the
// address of the metadata service.
func isService(a attempt) bool {
	const tcp, udp, domain, ntp = 6, 17, 53, 123
	switch a.destination.Port() {
	case domain:
		return a.protocol == udp || a.protocol == tcp
	case ntp:
		return a.protocol == udp
	}
	return false
}

// ruleOf returns the rule for exactly what was tried.
func ruleOf(a attempt) policy.Rule {
	addr := a.destination.Addr()
	return policy.Rule{Prefix: netip.PrefixFrom(addr, addr.BitLen()), Port: a.destination.Port(), Proto: a.protocol}
}

func (s *suggestion) isRelay(a netip.Addr) bool {
	return slices.ContainsFunc(s.relays, func(r relay) bool { return r.address == a })
}

func (s *suggestion) keep(c *observed, a attempt, n uint64) {
	s.Kept = append(s.Kept, Kept{
		Container: c.Subject(), Destination: a.destination, Protocol: a.protocol, Family: a.family, Count: n,
		Mail: a.reason == events.ReasonRateLimited,
	})
}

// allow adds the entries for DNS and time.
func (s *suggestion) allow() {
	const tcp, udp, domain = 6, 17, 53
	for r := range maps.Clone(s.open) {
		// Answers that are too long for UDP are asked for again over TCP.
		if long := (policy.Rule{Prefix: r.Prefix, Port: domain, Proto: tcp}); r.Port == domain && r.Proto == udp && s.open[long] == nil {
			s.open[long] = tally[string]{}
		}
	}
	s.Config.Allow = slices.Clone(s.Config.Allow)
	for _, r := range slices.SortedFunc(maps.Keys(s.open), byText) {
		what := "the time"
		if r.Port == domain {
			what = "DNS"
		}
		text := "Not asked for yet: " + what + " over TCP, for answers that are too long for UDP."
		if who := s.open[r]; len(who) > 0 {
			text = "For " + what + ", " + times(who.sum()) + ": " + who.list(5, asIs) + ". Open to all containers."
		}
		s.comment(entry("allow", len(s.Config.Allow)), text)
		s.Config.Allow = append(s.Config.Allow, r)
		s.Added++
	}
}

// exempt adds the relays.
func (s *suggestion) exempt() {
	s.Config.SMTP.Exempt = slices.Clone(s.Config.SMTP.Exempt)
	for _, r := range s.relays {
		text := "A relay? It got " + plural(r.from.sum(), "mail connection") + " over the limit at port " + joined(r.ports) +
			", from " + r.from.list(5, asIs) + ". Mail to it will not be limited."
		if !r.address.IsPrivate() && slices.Contains(r.ports, 25) {
			text += " The address is public: it may be a provider's mail server, which everybody can write to. Keep it only if it is yours."
		}
		s.comment(entry(policy.ListExempt, len(s.Config.SMTP.Exempt)), text)
		s.Config.SMTP.Exempt = append(s.Config.SMTP.Exempt, netip.PrefixFrom(r.address, r.address.BitLen()))
		s.Added++
	}
}

// explainBlocked tells of what the operator has blocked, which stays so.
func (s *suggestion) explainBlocked() {
	if len(s.closed) == 0 {
		return
	}
	const most = 20
	s.comment("block", "Left refused, since an entry below blocks it. To open one, add it to allow:")
	rules := slices.SortedFunc(maps.Keys(s.closed), func(a, b policy.Rule) int {
		return cmp.Or(cmp.Compare(s.closed[b].sum(), s.closed[a].sum()), byText(a, b))
	})
	for i, r := range rules {
		if i == most {
			s.comment("block", "and "+plural(uint64(len(rules)-most), "more destination"))
			break
		}
		s.comment("block", "  "+r.String()+": "+times(s.closed[r].sum())+", "+s.closed[r].list(3, asIs))
	}
	s.Left += len(rules)
}

func byText(a, b policy.Rule) int {
	return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Proto, b.Proto))
}

// add adds to a tally that may have no entries yet.
func add[K, V comparable](to map[K]tally[V], key K, what V, n uint64) {
	if to[key] == nil {
		to[key] = tally[V]{}
	}
	to[key][what] += n
}
