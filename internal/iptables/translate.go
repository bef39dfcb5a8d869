package iptables

import (
	"cmp"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// Kind says what a note is about.
type Kind string

const (
	// NotCarried: the rule has no counterpart in the policy.
	NotCarried Kind = "not carried over"
	// Unknown: the rule was not understood, and has no counterpart either.
	Unknown Kind = "not understood"
	// Weaker: the policy lets through what the rule stops.
	Weaker Kind = "weaker"
	// Stricter: the policy stops what the rules let through.
	Stricter Kind = "stricter"
	// Differs: something else is different.
	Differs Kind = "differs"
)

// Note is one thing to know about a rule.
type Note struct {
	Source string // "": about the rules as a whole
	Line   int
	Kind   Kind
	Rule   string
	Text   string
}

func (n Note) String() string {
	var s strings.Builder
	if n.Source != "" {
		fmt.Fprintf(&s, "%s:%d: ", n.Source, n.Line)
	}
	fmt.Fprintf(&s, "%s: %s", n.Kind, n.Text)
	if n.Rule != "" {
		fmt.Fprintf(&s, "\n    %s", n.Rule)
	}
	return s.String()
}

// Result is what became of the rules.
type Result struct {
	Config policy.Config
	// Comments are for [policy.Config.YAML]: which rules each entry comes from.
	Comments map[string][]string
	Notes    []Note // in the order of sources and lines
	Carried  int    // rules

	rules map[place]bool // those carried over
}

// ErrNothing is returned with a result whose notes say why nothing in it was
// carried over.
var ErrNothing = errors.New("no rule stops containers from reaching a destination or limits their mail")

// mailPorts are the ports by which a rule is known to be about mail.
var mailPorts = []uint16{25, 465, 587, 2525}

const (
	tcp = 6
	// maxPorts are the ports of one rule: each is an entry of its own.
	maxPorts = 256
	// maxWork bounds the comparison of rules and policy: some seconds.
	maxWork = 300_000_000
)

type translator struct {
	sources  []Source
	tables   []*table
	site     *site
	families []*family
	result   Result
	noted    map[*rule][]Kind
	carried  map[*rule]bool
	origins  map[policy.Rule][]*rule // of block entries
	mail     map[uint16]bool         // limited ports
	limits   []*step                 // that apply to them
	lists    map[string][]*step      // of -m recent, by name: the steps that put sources there
}

// Translate reads dumps, which are in force together, and returns the policy that
// does the same for what containers send. The error is that of a dump that cannot be
// read, or [ErrNothing].
func Translate(sources ...Source) (*Result, error) {
	tr, err := translate(sources...)
	if err != nil {
		return nil, err
	}
	if len(tr.carried) == 0 {
		return &tr.result, ErrNothing
	}
	return &tr.result, nil
}

func translate(sources ...Source) (*translator, error) {
	tr := &translator{
		sources: sources, noted: map[*rule][]Kind{}, carried: map[*rule]bool{},
		origins: map[policy.Rule][]*rule{}, mail: map[uint16]bool{}, lists: map[string][]*step{},
	}
	for _, s := range sources {
		tables, err := parse(s)
		if err != nil {
			return nil, err
		}
		tr.tables = append(tr.tables, tables...)
	}
	if err := tr.layOut(); err != nil {
		return nil, err
	}
	p := policy.Default()
	p.Presets = []string{policy.None}
	p.SMTP.Rate = policy.Rate{}
	tr.result.Config = policy.Config{Cgroups: []string{}, Policy: p}
	var names []string
	for _, s := range sources {
		names = append(names, s.Name)
	}
	tr.result.Comments = map[string][]string{"": {"Made by egressbpf import iptables of " + strings.Join(names, ", ") + "."}}

	tr.setAside()
	tr.limitMail()
	tr.block()
	tr.allow()
	tr.exempt()
	tr.account()
	tr.compare()
	tr.conclude()
	tr.result.Carried = len(tr.carried)
	tr.result.rules = map[place]bool{}
	for r := range tr.carried {
		tr.result.rules[r.place] = true
	}
	return tr, nil
}

func (tr *translator) note(r *rule, kind Kind, format string, args ...any) {
	n := Note{Kind: kind, Text: fmt.Sprintf(format, args...)}
	if r != nil {
		n.Source, n.Line, n.Rule = r.place.source, r.place.line, r.text
		tr.noted[r] = append(tr.noted[r], kind)
	}
	if !slices.Contains(tr.result.Notes, n) {
		tr.result.Notes = append(tr.result.Notes, n)
	}
}

func (tr *translator) has(r *rule, kinds ...Kind) bool {
	return slices.ContainsFunc(tr.noted[r], func(k Kind) bool { return slices.Contains(kinds, k) })
}

// hooks are the chains that packets of containers pass on their way out.
var hooks = map[string][]string{
	"filter": {"FORWARD"}, "mangle": {"PREROUTING", "FORWARD", "POSTROUTING"}, "raw": {"PREROUTING"}, "security": {"FORWARD"},
}

// layOut makes the families of the tables.
func (tr *translator) layOut() error {
	tr.site = learn(tr.tables)
	both := [2]*family{{}, {v6: true}}
	for _, t := range tr.tables {
		for _, c := range t.order {
			for _, r := range c.rules {
				tr.site.resolve(&r.match, t.v6)
				if l := r.match.limit; l != nil && l.mask == map[bool]int{false: 32, true: 128}[t.v6] {
					l.mask = -1
				}
			}
		}
		f := both[0]
		if t.v6 {
			f = both[1]
		}
		if c := t.chains["FORWARD"]; c != nil && c.policy == "DROP" && !slices.ContainsFunc(c.rules, func(r *rule) bool {
			return dockers(r.target) || r.target == "ACCEPT" && tr.site.bridge(r.match.in.value)
		}) {
			tr.note(nil, NotCarried, "%s: the policy of FORWARD in the table %s is DROP, and no rules of Docker accept what containers send: what no rule accepts is stopped there, and not by the policy", t.source, t.name)
		}
		roots := slices.Clone(hooks[t.name])
		reached := false
		for i := 0; i < len(roots); i++ {
			c := t.chains[roots[i]]
			if c != nil {
				p := &pass{}
				if err := p.lay(t, c, nil, false, nil); err != nil {
					return err
				}
				p.finish()
				f.passes = append(f.passes, p)
				reached = reached || slices.ContainsFunc(p.steps, func(s step) bool { return s.inUser || s.rule.target == user })
			}
			if i == len(hooks[t.name])-1 && !reached && t.chains[user] != nil && len(t.chains[user].rules) > 0 {
				forward := t.chains["FORWARD"]
				if t.name == "filter" && forward != nil && (tr.live(t.source) || len(forward.rules) > 0) {
					tr.note(t.chains[user].rules[0], Differs, "no rule of FORWARD jumps to %s: these rules stop nothing, the policy does", user)
				}
				roots = append(roots, user)
				reached = true
			}
		}
		seen := map[string]bool{} // lists of -m recent
		for _, p := range f.passes {
			for i := range p.steps {
				m := &p.steps[i].rule.match
				if m.sets != "" {
					seen[m.sets] = true
					tr.lists[m.sets] = append(tr.lists[m.sets], &p.steps[i])
				}
				if l := m.limit; l != nil && l.module == "recent" && l.rate.Unlimited() && !l.settle(seen[l.recent]) {
					text := fmt.Sprintf("-m recent --seconds %d --hitcount %d", l.window, l.hits)
					m.limit = nil
					m.conditions = append(m.conditions, condition{text: text, not: !l.over})
				}
			}
		}
	}
	for _, f := range both {
		for _, p := range f.passes {
			for i := range p.steps {
				tr.joinLimits(&p.steps[i])
			}
		}
		if len(f.passes) > 0 {
			f.survey()
			tr.families = append(tr.families, f)
		}
	}
	return nil
}

// joinLimits finds what the limits of a step come to, if it has several. What is within one
// and goes on to the next is within the strictest; what is over one and goes on to the next
// has that one's tokens too.
func (tr *translator) joinLimits(s *step) {
	var all []*limit
	for _, m := range s.when {
		if m.limit != nil {
			all = append(all, m.limit)
		}
	}
	if len(all) < 2 || s.act == none {
		return
	}
	joined := *all[0]
	for _, l := range all[1:] {
		if l.over != joined.over {
			if s.act == skip {
				tr.note(s.rule, Stricter, "the exception is not carried over: it is for some of what is over another limit")
			} else {
				tr.note(s.rule, NotCarried, "it is for what is within one limit and over another one")
				s.aside = true
			}
			s.act = none
			return
		}
		if l.over {
			joined.rate, joined.burst = sum(joined.rate, l.rate), joined.burst+l.burst
		} else {
			joined.burst = min(joined.burst, l.burst)
			if slower(l.rate, joined.rate) < 0 {
				joined.rate = l.rate
			}
		}
		if !l.perContainer() {
			joined.per, joined.mask = l.per, l.mask
		}
	}
	s.both = &joined
}

// sum adds two rates, in the longer of their periods.
func sum(a, b policy.Rate) policy.Rate {
	if a.Period < b.Period {
		a, b = b, a
	}
	return policy.Rate{Count: a.Count + b.Count*uint64(a.Period/b.Period), Period: a.Period}
}

// slower compares two rates.
func slower(a, b policy.Rate) int {
	hiA, loA := bits.Mul64(a.Count, uint64(b.Period))
	hiB, loB := bits.Mul64(b.Count, uint64(a.Period))
	return cmp.Or(cmp.Compare(hiA, hiB), cmp.Compare(loA, loB))
}

func (tr *translator) live(source string) bool {
	return slices.ContainsFunc(tr.sources, func(s Source) bool { return s.Name == source && s.Live })
}

// each calls do with every step.
func (tr *translator) each(do func(*family, *step)) {
	for _, f := range tr.families {
		for _, p := range f.passes {
			for i := range p.steps {
				do(f, &p.steps[i])
			}
		}
	}
}

// setAside takes rules that drop out of the reckoning if what they depend on has no
// counterpart: to stop all that they may stop would be another policy. Metadata
// services are the exception, since there is no good reason to let some through.
func (tr *translator) setAside() {
	tr.each(func(f *family, s *step) {
		if s.act != drop || s.never() != "" {
			return
		}
		if !s.inUser && s.catchAll(f.v6) {
			s.act = none
			for _, p := range f.passes {
				p.addr = netip.Addr{} // without this step
			}
			tr.refuse(s, "what no rule before it accepts is stopped there, and not by the policy")
			return
		}
		var why []string
		for _, m := range s.when {
			for _, c := range m.conditions {
				one := false
				if src, ok := strings.CutPrefix(c.text, "-s "); ok && !c.not {
					p, err := network(src)
					one = err == nil && p.IsSingleIP()
				}
				if !c.origin() || one {
					why = append(why, c.String())
				}
			}
		}
		if len(why) == 0 {
			return
		}
		entries, _, err := s.entries(f.v6)
		if err == nil && !slices.ContainsFunc(entries, func(e policy.Rule) bool {
			return e.Prefix.Bits() == 0 || !overlapsMetadata(e.Prefix)
		}) {
			return
		}
		s.act = none
		s.aside = true
		for _, p := range f.passes {
			p.addr = netip.Addr{} // without this step
		}
		if !s.inUser && !s.about(f.v6) {
			return
		}
		text := strings.Join(why, ", ")
		if strings.Contains(text, "--match-set") {
			text += "; the addresses of an ipset are not in the output of iptables-save"
		}
		tr.refuse(s, "a policy has no words for "+text)
	})
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

// mail returns the ports of a rule about mail, which has a port of mail among
// them and no destination, or nil.
func (s *step) mail(v6 bool) []uint16 {
	entries, _, err := s.entries(v6)
	if err != nil {
		return nil
	}
	var ports []uint16
	is := false
	for _, e := range entries {
		if e.Proto != tcp || e.Port == 0 {
			return nil
		}
		is = is || slices.Contains(mailPorts, e.Port)
		ports = append(ports, e.Port)
	}
	if !is {
		return nil
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

var errTooMany = fmt.Errorf("it has more than %d ports or networks, each of which would be an entry", maxPorts)

// entries returns what the step is about as entries of a policy, those without a
// destination with a prefix of length 0, and the holes in them. No entries: nothing
// matches.
func (s *step) entries(v6 bool) (entries, holes []policy.Rule, err error) {
	zero := netip.IPv4Unspecified()
	if v6 {
		zero = netip.IPv6Unspecified()
	}
	entries = []policy.Rule{{Prefix: netip.PrefixFrom(zero, 0)}}
	cut := func(with []policy.Rule) error {
		var list []policy.Rule
		for _, a := range entries {
			for _, b := range with {
				if c, ok := intersect(a, b); ok && !slices.Contains(list, c) {
					if list = append(list, c); len(list) > maxPorts {
						return errTooMany
					}
				}
			}
		}
		entries = list
		return nil
	}
	var not [][]policy.Rule
	for _, m := range s.when {
		for _, side := range []struct {
			is   bool
			not  bool
			list func() ([]policy.Rule, error)
		}{
			{m.proto != 0, m.protoNot, func() ([]policy.Rule, error) {
				return []policy.Rule{{Prefix: netip.PrefixFrom(zero, 0), Proto: m.proto}}, nil
			}},
			{m.dst != nil, m.dstNot, func() ([]policy.Rule, error) { return destinations(m.dst), nil }},
			{m.except != nil, true, func() ([]policy.Rule, error) { return destinations(m.except), nil }},
			{m.ports != nil, m.portsNot, func() (list []policy.Rule, err error) {
				for _, r := range m.ports {
					if r.low == 0 && r.high == 65535 {
						return []policy.Rule{{Prefix: netip.PrefixFrom(zero, 0)}}, nil
					}
					if int(r.high)-int(r.low) >= maxPorts {
						return nil, errTooMany
					}
					for n := int(r.low); n <= int(r.high); n++ {
						if n != 0 {
							list = append(list, policy.Rule{Prefix: netip.PrefixFrom(zero, 0), Port: uint16(n)})
						}
					}
				}
				return list, nil
			}},
		} {
			if !side.is {
				continue
			}
			list, err := side.list()
			if err != nil {
				return nil, nil, err
			}
			if side.not {
				not = append(not, list)
			} else if err := cut(list); err != nil {
				return nil, nil, err
			}
		}
	}
	for _, list := range not {
		entries = slices.DeleteFunc(entries, func(a policy.Rule) bool {
			return slices.ContainsFunc(list, func(b policy.Rule) bool {
				c, ok := intersect(a, b)
				return ok && c == a
			})
		})
	}
	for _, list := range not {
		for _, a := range entries {
			for _, b := range list {
				if c, ok := intersect(a, b); ok && !slices.Contains(holes, c) {
					if holes = append(holes, c); len(holes) > maxPorts {
						return nil, nil, errTooMany
					}
				}
			}
		}
	}
	return entries, holes, nil
}

func destinations(prefixes []netip.Prefix) (list []policy.Rule) {
	for _, p := range prefixes {
		list = append(list, policy.Rule{Prefix: p})
	}
	return list
}

// intersect returns what both entries are about.
func intersect(a, b policy.Rule) (policy.Rule, bool) {
	if !a.Prefix.Overlaps(b.Prefix) {
		return a, false
	}
	if b.Prefix.Bits() > a.Prefix.Bits() {
		a.Prefix = b.Prefix
	}
	for _, side := range [][2]uint16{{uint16(a.Proto), uint16(b.Proto)}, {a.Port, b.Port}} {
		if side[0] != side[1] && side[0] != 0 && side[1] != 0 {
			return a, false
		}
	}
	a.Proto, a.Port = max(a.Proto, b.Proto), max(a.Port, b.Port)
	return a, a.Port == 0 || a.Proto == 0 || hasPorts(a.Proto)
}

// within calls do with a packet of every kind that an entry is about, until it
// returns false.
func (f *family) within(e policy.Rule, do func(packet) bool) {
	from, _ := slices.BinarySearchFunc(f.addrs, e.Prefix.Addr(), netip.Addr.Compare)
	addrs := []netip.Addr{e.Prefix.Addr(), last(e.Prefix)}
	for _, a := range f.addrs[from:] {
		if !e.Prefix.Contains(a) {
			break
		}
		addrs = append(addrs, a)
	}
	protos, ports := f.protos, f.ports
	if e.Proto != 0 {
		protos = []uint8{e.Proto}
	}
	if e.Port != 0 {
		ports = []uint16{e.Port}
	}
	for _, a := range addrs {
		for _, proto := range protos {
			if !hasPorts(proto) {
				if e.Port == 0 && !do(packet{dst: a, proto: proto}) {
					return
				}
				continue
			}
			for _, port := range ports {
				if !do(packet{dst: a, proto: proto, port: port}) {
					return
				}
			}
		}
	}
}

// verdicts returns those that are possible within an entry.
func (f *family) verdicts(e policy.Rule) (v verdict) {
	f.within(e, func(p packet) bool {
		v |= f.judge(p)
		return v != passes|limited|dropped
	})
	return v
}

// limitMail finds the ports on which new connections are limited, and the limit.
func (tr *translator) limitMail() {
	smtp := &tr.result.Config.SMTP
	var rejects, drops []*rule
	tr.each(func(f *family, s *step) {
		if s.act == none || s.never() != "" || s.limit() == nil && s.act != drop {
			return
		}
		ports := s.mail(f.v6)
		entries, _, _ := s.entries(f.v6)
		for _, port := range ports {
			dst := f.other
			narrow := ""
			if p := entries[0].Prefix; p.Bits() > 0 {
				dst, narrow = p.Addr(), p.String()
			}
			pk := packet{dst: dst, proto: tcp, port: port}
			v := f.judge(pk)
			if v&limited == 0 || v&dropped != 0 {
				continue // not limited, or not only: that blocks
			}
			by := f.deciders(pk, true)
			if s.limit() == nil && !slices.ContainsFunc(by, func(d *step) bool { return d.rule == s.rule }) || s.limit() != nil && !f.reaches(pk, s) {
				continue
			}
			tr.mail[port] = true
			tr.carried[s.rule] = true
			if narrow != "" && f.judge(packet{dst: f.other, proto: tcp, port: port})&passes != 0 {
				tr.note(s.rule, Stricter, "the policy limits mail to every destination, not only to %s", narrow)
			}
			if c := s.conditions(); c != "" {
				tr.note(s.rule, Stricter, "the policy limits every container, whatever is true of %s", c)
			}
			tr.gather(f, pk)
			for _, d := range by {
				if d.rule.target == "REJECT" {
					rejects = append(rejects, d.rule)
				} else {
					drops = append(drops, d.rule)
				}
			}
		}
	})
	if len(tr.mail) == 0 {
		return
	}
	smtp.Ports = nil
	for p := range tr.mail {
		smtp.Ports = append(smtp.Ports, p)
	}
	slices.Sort(smtp.Ports)
	if len(rejects) > 0 {
		smtp.OverLimit = policy.Reject
		for _, r := range drops {
			tr.note(r, Differs, "the policy has one over_limit: what is over the limit is refused at once here too, as %s does", rejects[0].place)
		}
	}
	tr.setLimit()
	tr.note(nil, Stricter, "%s; the policy limits that too: name such servers under smtp.exempt", unseenMail)
	tr.comment("smtp", tr.limits...)
}

// gather adds the limits that a mail packet meets, of rules about mail or not.
func (tr *translator) gather(f *family, pk packet) {
	for _, p := range f.passes {
		for i := range p.steps {
			s := &p.steps[i]
			if s.act == none || s.limit() == nil || !f.reaches(pk, s) ||
				slices.ContainsFunc(tr.limits, func(o *step) bool { return o.rule == s.rule }) {
				continue
			}
			tr.limits = append(tr.limits, s)
			tr.carried[s.rule] = true
			if f.matters(s, pk) {
				tr.note(s.rule, Weaker, "the rule counts every packet to these ports; the policy counts new connections, and lets through what belongs to one that it let through")
			}
		}
	}
}

// matters reports whether a step with a limit decides about packets of a connection
// that exists, too.
func (f *family) matters(s *step, pk packet) bool {
	pk.old = true
	return slices.ContainsFunc(f.worlds, func(w world) bool { return s.applies(pk, w) }) && f.judge(pk)&(limited|dropped) != 0
}

// setLimit takes the strictest of the limits.
func (tr *translator) setLimit() {
	smtp := &tr.result.Config.SMTP
	smtp.Rate, smtp.Burst = tr.limits[0].limit().rate, tr.limits[0].limit().burst
	for _, s := range tr.limits[1:] {
		l := s.limit()
		if slower(l.rate, smtp.Rate) < 0 {
			smtp.Rate = l.rate
		}
		smtp.Burst = min(smtp.Burst, l.burst)
	}
	smtp.Burst = min(smtp.Burst, 1_000_000)
	if err := smtp.Limit().Validate(); err != nil {
		smtp.Burst = 1
	}
	for i, s := range tr.limits {
		l := s.limit()
		switch {
		case l.perContainer() && len(l.per) == 1:
		case l.perContainer():
			tr.note(s.rule, Stricter, "the rule has a limit for each %s; the policy has one for each container", strings.Join(l.per, " and "))
		default:
			tr.note(s.rule, Weaker, "the rule's limit is shared by containers; the policy's is for each, so that many of them can send more than the rule lets all of them send")
			if slices.ContainsFunc(l.per, func(p string) bool { return p != "srcip" }) {
				tr.note(s.rule, Stricter, "the rule has a limit for each %s; the policy has one for all that a container sends", strings.Join(l.per, " and "))
			}
		}
		if l.expire > 0 && l.expire < l.refill() {
			tr.note(s.rule, Stricter, "the rule forgets what it counted after %v without a packet; the policy gives tokens back at its rate alone", l.expire)
		}
		for _, sets := range tr.lists[l.recent] {
			if l.module == "recent" && len(sets.mail(false))+len(sets.mail(true)) == 0 {
				tr.note(s.rule, Weaker, "the rule also counts what is not mail, by the one at %s", sets.rule.place)
			}
		}
		if l.module == "recent" {
			tr.note(s.rule, Weaker, "the rule lets %d through within any %d seconds, and with --update starts anew at every attempt; the policy lets %d through at once and then %s, up to twice as many in such a time", l.burst, l.window, smtp.Burst, smtp.Rate)
		}
		if slower(l.rate, smtp.Rate) != 0 || l.burst != smtp.Burst {
			tr.note(s.rule, Stricter, "the policy has one limit for all mail of a container, the strictest of the rules': %s, burst %d, instead of %s, burst %d", smtp.Rate, smtp.Burst, l.rate, l.burst)
		} else if i > 0 && l.perContainer() {
			tr.note(s.rule, Stricter, "the policy has one limit for all mail of a container; the rules count apart what they let through here and at %s", tr.limits[0].rule.place)
		}
	}
}

// comment says below a key of the config file which rules it comes from.
func (tr *translator) comment(key string, steps ...*step) {
	for _, s := range steps {
		line := s.rule.place.String() + ": " + s.rule.text
		if !slices.Contains(tr.result.Comments[key], line) {
			tr.result.Comments[key] = append(tr.result.Comments[key], line)
		}
	}
}

// block carries over the rules that drop.
func (tr *translator) block() {
	cfg := &tr.result.Config
	tr.each(func(f *family, s *step) {
		if s.act != drop || s.never() != "" || !s.inUser && !s.about(f.v6) {
			return
		}
		entries, _, err := s.entries(f.v6)
		mail := s.mail(f.v6)
		switch {
		case err != nil:
			tr.refuse(s, err.Error())
			return
		case len(entries) == 0:
			tr.refuse(s, "no packet matches it and the rules that lead to it")
			return
		case s.limit() != nil && !s.limit().over:
			tr.refuse(s, "it stops what is within the limit, and lets the rest through")
			return
		case s.limit() != nil:
			tr.refuse(s, "only new mail connections can be limited")
			return
		case entries[0].Prefix.Bits() == 0 && len(mail) == 0:
			tr.refuse(s, "it names no destination, nor a port of mail")
			return
		}
		var add []policy.Rule
		for _, e := range entries {
			v := verdict(0)
			if len(mail) > 0 && e.Prefix.Bits() == 0 {
				// What is true of most destinations; others are exceptions.
				v = f.judge(packet{dst: f.other, proto: tcp, port: e.Port})
			} else {
				v = f.verdicts(e)
			}
			if v&dropped != 0 {
				add = append(add, e)
			}
		}
		add = slices.DeleteFunc(add, func(e policy.Rule) bool {
			err := e.Validate() // such as for IPv4's ICMP in ip6tables
			if err != nil {
				tr.note(s.rule, NotCarried, "%v", err)
			}
			return err != nil
		})
		add = slices.DeleteFunc(add, func(e policy.Rule) bool {
			never := unforwarded(e.Prefix) && !overlapsMetadata(e.Prefix)
			if never {
				tr.note(s.rule, NotCarried, "the host does not forward packets to %s: the rule meets none", e.Prefix)
			}
			return never
		})
		if len(add) == 0 {
			if f.enforces(s, mail) {
				tr.carried[s.rule] = true
			} else if !tr.carried[s.rule] {
				tr.refuse(s, "it stops nothing: other rules let all of it through before, or stop it")
			}
			return
		}
		tr.carried[s.rule] = true
		if c := s.conditions(); c != "" {
			tr.note(s.rule, Stricter, "the policy holds for every container, whatever is true of %s", c)
		}
		if s.assumes(add) {
			tr.note(s.rule, Weaker, "docker0 is taken to have its usual network, %s, which the rule leaves open (! -o docker0): import the table nat too, which tells it", docker0)
		}
		for _, e := range add {
			if tr.origins[e] == nil {
				cfg.Block = append(cfg.Block, e)
			}
			if !slices.Contains(tr.origins[e], s.rule) {
				tr.origins[e] = append(tr.origins[e], s.rule)
			}
			for _, p := range spared(e) {
				if !slices.Contains(cfg.Allow, p) {
					cfg.Allow = append(cfg.Allow, p)
					tr.comment("allow", s)
				}
			}
			if len(mail) > 0 && e.Prefix.Bits() == 0 {
				tr.note(s.rule, Stricter, "%s; the policy stops that too: name such servers under allow", unseenMail)
			} else if near(e.Prefix) && s.sparesBridge() {
				tr.note(s.rule, Stricter, "the policy also keeps containers on one bridge from each other, where their network is in %s: name it under allow, or import the table nat too, which tells these networks", e.Prefix)
			} else if near(e.Prefix) {
				tr.note(s.rule, Stricter, "FORWARD does not see what containers send to the host itself, nor always what they send each other on one bridge; the policy stops that too, where it is for %s", e.Prefix)
			}
		}
		tr.comment("block", s)
		for _, e := range add {
			switch {
			case e.Proto != 0 && e.Proto != tcp:
			case len(mail) == 0 && !overlapsMetadata(e.Prefix) && f.letsAnswer(e):
				tr.note(s.rule, Stricter, "the rules let packets of connections that exist pass; the policy stops them too: who connects from %s to a port that is published gets no answer", e.Prefix)
			case s.newOnly():
				tr.note(s.rule, Stricter, "the rule stops new connections; the policy stops every packet, those of connections that exist too")
			}
		}
	})
	// Of entries for the same addresses, the wider stays. A network does not stand
	// for an address in it: the address is refused as a source, too.
	same := map[netip.Prefix][]policy.Rule{}
	for _, e := range cfg.Block {
		same[e.Prefix] = append(same[e.Prefix], e)
	}
	cfg.Block = slices.DeleteFunc(cfg.Block, func(a policy.Rule) bool {
		return slices.ContainsFunc(same[a.Prefix], func(b policy.Rule) bool {
			c, ok := intersect(a, b)
			return ok && a != b && c == a
		})
	})
}

func (s *step) newOnly() bool {
	return slices.ContainsFunc(s.when, func(m *match) bool { return m.newOnly != "" })
}

// near reports whether a network can have the host or other containers in it.
func near(p netip.Prefix) bool {
	return slices.ContainsFunc(private, p.Overlaps) && p.Bits() < p.Addr().BitLen() && p.Bits() > 0
}

// about reports whether a step is about what egressbpf is for: a metadata service,
// or mail.
func (s *step) about(v6 bool) bool {
	if len(s.mail(v6)) > 0 {
		return true
	}
	entries, _, _ := s.entries(v6)
	return slices.ContainsFunc(entries, func(e policy.Rule) bool { return e.Prefix.Bits() > 0 && overlapsMetadata(e.Prefix) })
}

// unseenMail says what rules of FORWARD leave alone.
const unseenMail = "FORWARD does not see mail to the host itself, nor always to containers on the same bridge"

// local are networks to which nothing is forwarded.
var local = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// unforwarded reports whether a network is in one of these.
func unforwarded(p netip.Prefix) bool {
	return slices.ContainsFunc(local, func(l netip.Prefix) bool { return l.Bits() <= p.Bits() && l.Contains(p.Addr()) })
}

// spared returns what an entry that blocks has to leave open, since the rule does not meet
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

// enforces reports whether a step stops mail that is over a limit.
func (f *family) enforces(s *step, ports []uint16) bool {
	return slices.ContainsFunc(ports, func(port uint16) bool {
		pk := packet{dst: f.other, proto: tcp, port: port}
		return f.judge(pk)&limited != 0 && f.reaches(pk, s)
	})
}

// letsAnswer reports whether packets to an entry pass that are of connections which exist.
func (f *family) letsAnswer(e policy.Rule) (lets bool) {
	f.within(e, func(p packet) bool {
		p.old = true
		lets = f.judge(p)&passes != 0
		return !lets
	})
	return lets
}

// assumes reports whether a step leaves the usual network of docker0 out of what it is about.
func (s *step) assumes(about []policy.Rule) bool {
	return slices.ContainsFunc(s.when, func(m *match) bool { return m.assumed }) &&
		slices.ContainsFunc(about, func(e policy.Rule) bool { return e.Prefix.Overlaps(docker0) && e.Prefix.Bits() > 0 })
}

// sparesBridge reports whether a step is not about what stays on a bridge of containers,
// whose networks are not known.
func (s *step) sparesBridge() bool {
	return slices.ContainsFunc(s.when, func(m *match) bool {
		return slices.ContainsFunc(m.conditions, func(c condition) bool { return c.not && strings.HasPrefix(c.text, "-o ") })
	})
}

// catchAll reports whether a step is about every packet, whatever device it leaves by.
func (s *step) catchAll(v6 bool) bool {
	entries, holes, err := s.entries(v6)
	return err == nil && s.limit() == nil && len(holes) == 0 && len(entries) == 1 &&
		entries[0].Prefix.Bits() == 0 && entries[0].Proto == 0 && entries[0].Port == 0
}

func overlapsMetadata(p netip.Prefix) bool {
	rules, _ := policy.Preset(policy.Metadata)
	return slices.ContainsFunc(rules, func(r policy.Rule) bool { return r.Prefix.Overlaps(p) })
}

// refuse notes a rule that is not carried over.
func (tr *translator) refuse(s *step, why string) {
	if tr.has(s.rule, NotCarried, Unknown) || tr.carried[s.rule] {
		return
	}
	tr.note(s.rule, NotCarried, "%s", why)
}

// allow carries over what is let through before a rule that drops.
func (tr *translator) allow() {
	cfg := &tr.result.Config
	work := 0
	for _, f := range tr.families {
		for _, p := range f.passes {
			for i := range p.steps {
				s := &p.steps[i]
				entries := tr.exceptions(f, p, i)
				if work += len(entries) * len(cfg.Block); work > 100_000 {
					tr.note(nil, Stricter, "too many rules: not every exception was carried over")
					return
				}
				var refused []policy.Rule
				for _, e := range entries {
					for _, b := range cfg.Block {
						c, ok := intersect(e, b)
						switch {
						case !ok || s.act == skip && !p.followed(i, f.v6, c):
						case slices.Contains(cfg.Allow, c):
							tr.carriedAs(s)
						case c.Validate() == nil && f.lets(c, e.Prefix.Bits() > 0):
							cfg.Allow = append(cfg.Allow, c)
							tr.comment("allow", s)
							tr.carriedAs(s)
						case !slices.Contains(refused, c) && s.limit() == nil:
							refused = append(refused, c)
						}
					}
				}
				if len(refused) == 0 {
					continue
				}
				what := refused[0].String()
				if len(refused) > 1 {
					what += fmt.Sprintf(" and %d more", len(refused)-1)
				}
				if why := s.conditions(); why != "" {
					tr.note(s.rule, Stricter, "the exception is not carried over, since it depends on %s: the policy stops %s", why, what)
				} else {
					tr.note(s.rule, Stricter, "the exception is not carried over: other rules may stop a part of it all the same, and the policy stops %s", what)
				}
			}
		}
	}
}

// lets reports whether the rules let all of an entry through, for limited also as
// mail within the limit.
func (f *family) lets(e policy.Rule, within bool) bool {
	v := f.verdicts(e)
	return v == passes || within && v&dropped == 0
}

// exceptions returns what the step lets through that is stopped otherwise, or the
// holes in what it stops.
func (tr *translator) exceptions(f *family, p *pass, i int) []policy.Rule {
	s := &p.steps[i]
	if s.rule.isGoto || s.never() != "" || s.act == none || s.act == skip && s.limit() != nil && !tr.carried[s.rule] || s.act == drop && !tr.carried[s.rule] {
		return nil
	}
	entries, holes, err := s.entries(f.v6)
	if err != nil {
		return nil
	}
	if s.act == drop {
		return holes
	}
	return entries
}

// followed reports whether a step that skips others skips one that would drop some
// of what an entry is about.
func (p *pass) followed(i int, v6 bool, e policy.Rule) bool {
	for j := i + 1; j < p.steps[i].end; j++ {
		s := &p.steps[j]
		if s.act != drop || s.never() != "" {
			continue
		}
		entries, _, err := s.entries(v6)
		if err != nil || slices.ContainsFunc(entries, func(d policy.Rule) bool { _, ok := intersect(d, e); return ok }) {
			return true
		}
	}
	return false
}

func (tr *translator) carriedAs(s *step) {
	if s.act == skip {
		tr.carried[s.rule] = true
	}
}

// exempt carries over destinations to which mail is not limited.
func (tr *translator) exempt() {
	smtp := &tr.result.Config.SMTP
	if len(tr.mail) == 0 {
		return
	}
	for _, f := range tr.families {
		for _, p := range f.passes {
			for i := range p.steps {
				s := &p.steps[i]
				done := map[netip.Prefix]bool{}
				for _, e := range tr.exceptions(f, p, i) {
					if e.Prefix.Bits() == 0 || e.Proto != 0 && e.Proto != tcp || e.Port != 0 && !tr.mail[e.Port] || done[e.Prefix] {
						continue
					}
					done[e.Prefix] = true
					gets := func(port uint16) bool { return !tr.result.Config.Blocks(e.Prefix.Addr(), tcp, port) }
					if !slices.ContainsFunc(smtp.Ports, gets) {
						continue
					}
					if s.act == skip && !p.followed(i, f.v6, policy.Rule{Prefix: e.Prefix, Proto: tcp}) {
						continue
					}
					v := verdict(0)
					for _, port := range smtp.Ports {
						v |= f.verdicts(policy.Rule{Prefix: e.Prefix, Port: port, Proto: tcp})
					}
					if v != passes {
						if why := s.conditions(); why != "" && v&passes != 0 {
							tr.note(s.rule, Stricter, "the exception is not carried over, since it depends on %s: the policy limits mail to %s", why, e.Prefix)
						} else if v&passes != 0 && !slices.Contains(smtp.Exempt, e.Prefix) {
							tr.note(s.rule, Stricter, "the exception is not carried over: smtp.exempt is for every packet to every port of mail, and the rules limit or stop some of those to %s", e.Prefix)
						}
						continue
					}
					if !slices.Contains(smtp.Exempt, e.Prefix) {
						smtp.Exempt = append(smtp.Exempt, e.Prefix)
					}
					tr.comment("smtp.exempt", s)
					tr.carriedAs(s)
				}
			}
		}
	}
}

// account sees to it that no rule of DOCKER-USER is passed over in silence.
func (tr *translator) account() {
	walked, others := map[*rule]bool{}, map[*rule]bool{}
	tr.each(func(f *family, s *step) {
		walked[s.rule] = true
		if tr.carried[s.rule] || tr.has(s.rule, NotCarried, Unknown, Stricter, Weaker) {
			return
		}
		r := s.rule
		if r.garbled != "" {
			tr.note(r, Unknown, "%s", r.garbled)
			return
		}
		if s.own {
			return
		}
		if !s.inUser && !s.about(f.v6) {
			// What Docker itself lets through between its bridges and the rest is no news.
			ofDocker := s.never() != "" || r.target == "ACCEPT" && tr.site.bridge(r.match.in.value)
			if s.act != none && !tr.jumps(r) && !ofDocker {
				others[r] = true
			}
			return
		}
		never := s.never()
		switch {
		case s.aside:
		case s.act == none && r.target == "":
			tr.refuse(s, "it has no target: it counts, or puts sources on a list")
		case s.act == none && (tr.jumps(r) || dockers(r.target)):
			if never != "" {
				tr.note(r, NotCarried, "%s", never)
			}
		case s.act == none && slices.Contains([]string{"LOG", "NFLOG", "ULOG", "AUDIT"}, r.target):
			tr.refuse(s, "it writes a log; egressbpf stats counts what is stopped")
		case s.act == none && slices.Contains([]string{"MARK", "CONNMARK", "CONNSECMARK", "SECMARK", "DSCP", "TOS", "ECN", "TTL", "HL", "TCPMSS", "CLASSIFY", "CHECKSUM", "CT", "NOTRACK", "SET", "TRACE"}, r.target):
			tr.refuse(s, "it marks or changes packets, and stops none")
		case s.act == none:
			tr.note(r, Unknown, "the target %s is not known here", r.target)
		case tr.jumps(r):
		case never != "" && s.act == skip:
			tr.refuse(s, never+"; the policy has no exception for these")
		case never != "":
			tr.refuse(s, never)
		case s.act == skip && s.limit() != nil && s.conditions() != "":
			tr.refuse(s, "a limit that depends on "+s.conditions()+" cannot be carried over")
		case s.act == skip && s.limit() != nil:
			tr.refuse(s, "what is over the limit is not stopped, or it is not mail, or other rules decide before")
		case s.act == skip:
			tr.refuse(s, "nothing that the policy stops is let through by it")
		default:
			tr.note(r, Unknown, "it was passed over")
		}
	})
	if len(others) > 0 {
		tr.note(nil, NotCarried, "rules about forwarded packets that are neither in %s nor about metadata services or mail: %d", user, len(others))
	}
	// Elsewhere: what was meant to do the same and does something else.
	for _, t := range tr.tables {
		for _, c := range t.hidden {
			tr.note(nil, Unknown, "%s says: %s", t.source, c)
		}
		for _, r := range t.stray {
			tr.note(r, Unknown, "%s", r.garbled)
		}
		for _, c := range t.order {
			ofHost, toHost := t.reached("OUTPUT", c.name), t.reached("INPUT", c.name)
			for _, r := range c.rules {
				if walked[r] || dockers(c.name) {
					continue
				}
				s := step{rule: r, when: []*match{&r.match}}
				switch {
				case c.name == user:
					tr.note(r, NotCarried, "it is in the table %s, where Docker does not use this chain", t.name)
				case r.garbled != "":
					tr.note(r, Unknown, "%s", r.garbled)
				case !s.about(t.v6):
				case ofHost:
					tr.note(r, NotCarried, "it is about the host's own processes, and containers with --network=host: the policy is about all containers, and no others")
				case toHost:
					tr.note(r, NotCarried, "it is about what is sent to the host itself: a policy does not know the host's own addresses")
				case t.name == "nat" && c.name != "POSTROUTING":
					tr.note(r, NotCarried, "it is address translation: a policy blocks, and does not send elsewhere")
				case t.name == "nat":
				default:
					tr.note(r, NotCarried, "packets that containers send do not pass the chain %s of the table %s", c.name, t.name)
				}
			}
		}
	}
}

// jumps reports whether a rule's target is a chain.
func (tr *translator) jumps(r *rule) bool {
	for _, t := range tr.tables {
		if t.source != r.place.source || t.chains[r.target] == nil {
			continue
		}
		for _, c := range t.order {
			if slices.Contains(c.rules, r) {
				return true
			}
		}
	}
	return false
}

// compare puts one packet of every kind through rules and policy, and notes what
// differs and has not been said.
func (tr *translator) compare() {
	cfg := tr.result.Config
	blocked, allowed := cfg.Blocked(), cfg.Allowed()
	for _, f := range tr.families {
		steps := 0
		for _, p := range f.passes {
			steps += len(p.steps)
		}
		if f.partial {
			tr.note(nil, Weaker, "the rules ask for more than %d devices, sources and the like: the policy was compared with them in %d combinations of these, not in all", few, len(f.worlds))
		}
		kinds := len(f.addrs) * (len(f.protos) + 4*len(f.ports))
		if len(f.addrs)*(steps+len(blocked)+len(allowed))+kinds*len(f.worlds)*10 > maxWork {
			tr.note(nil, Weaker, "too many rules to compare with the policy in every case: what the order of the rules means may be lost")
			continue
		}
		everything := policy.Rule{Prefix: netip.PrefixFrom(f.addrs[0], 0)}
		var addr netip.Addr
		var nearBlocked, nearAllowed []policy.Rule
		f.within(everything, func(p packet) bool {
			if p.dst != addr {
				addr = p.dst
				nearBlocked, nearAllowed = about(blocked, addr), about(allowed, addr)
			}
			if unforwarded(netip.PrefixFrom(p.dst, p.dst.BitLen())) {
				return true
			}
			want := f.judge(p)
			b := contains(nearBlocked, p) && !contains(nearAllowed, p)
			l := !b && p.proto == tcp && tr.mail[p.port] && !slices.ContainsFunc(cfg.SMTP.Exempt, func(e netip.Prefix) bool { return e.Contains(p.dst) })
			if want&dropped != 0 && !b || want&limited != 0 && !b && !l {
				tr.missed(f, p)
			}
			if b && want&(passes|limited) != 0 || l && want&passes != 0 {
				tr.excess(f, p, b)
			}
			return true
		})
	}
}

// about returns the entries for an address.
func about(list []policy.Rule, addr netip.Addr) []policy.Rule {
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
func (tr *translator) missed(f *family, p packet) {
	for _, s := range f.droppers(p) {
		switch {
		case tr.has(s.rule, NotCarried, Unknown, Weaker):
		case !s.inUser && !s.about(f.v6) && !tr.carried[s.rule]:
		default:
			tr.note(s.rule, Weaker, "the rule stops packets that the policy lets through, such as one to %s", p)
		}
	}
}

// excess notes that the policy stops what the rules may let through.
func (tr *translator) excess(f *family, p packet, blocked bool) {
	var from []*rule
	if !blocked && !f.limits(tr.result.Config.SMTP.Ports) {
		return // said of the family as a whole
	}
	if blocked {
		for e, rules := range tr.origins {
			if contains([]policy.Rule{e}, p) {
				from = append(from, rules...)
			}
		}
	} else {
		for _, s := range tr.limits {
			from = append(from, s.rule)
		}
	}
	if len(from) == 0 || slices.ContainsFunc(from, func(r *rule) bool { return tr.has(r, Stricter) }) {
		return
	}
	slices.SortFunc(from, tr.order)
	tr.note(from[0], Stricter, "the policy also stops packets that the rules may let through, such as one to %s", p)
}

// conclude adds what is to be said about all of it, and sorts.
func (tr *translator) conclude() {
	cfg := &tr.result.Config
	if len(tr.mail) > 0 {
		v4, v6 := false, false
		for _, f := range tr.families {
			limits := f.limits(cfg.SMTP.Ports)
			v4, v6 = v4 || limits && !f.v6, v6 || limits && f.v6
		}
		if v4 != v6 {
			tr.note(nil, Stricter, "the rules limit mail over %s alone; the policy's limit is for IPv4 and IPv6 together", map[bool]string{true: "IPv4", false: "IPv6"}[v4])
		}
	}
	var open []string
	rules, _ := policy.Preset(policy.Metadata)
	for _, r := range rules {
		proto := cmp.Or(r.Proto, tcp)
		if !cfg.Blocks(r.Prefix.Addr(), proto, cmp.Or(r.Port, 80)) {
			open = append(open, r.String())
		}
	}
	hangs := func(r *rule) bool { return r.target == "DROP" }
	for _, rules := range tr.origins {
		if slices.ContainsFunc(rules, hangs) {
			tr.note(nil, Differs, "DROP leaves connections to what is blocked hanging; the policy makes them fail at once, as REJECT does")
			break
		}
	}
	if len(open) > 0 && len(tr.carried) > 0 {
		tr.note(nil, Differs, "the rules leave open, and so does the policy, what the preset metadata would block: %s", strings.Join(open, ", "))
		tr.result.Comments["presets"] = []string{"The rules block addresses of their own. metadata instead of none also blocks " + strings.Join(open, ", ") + "."}
	}
	v4, v6 := false, false
	for _, b := range cfg.Block {
		v4, v6 = v4 || b.Prefix.Addr().Is4(), v6 || b.Prefix.Addr().Is6()
	}
	if v4 != v6 {
		families := []string{"IPv4", "IPv6"}
		if v6 {
			slices.Reverse(families)
		}
		tr.note(nil, Differs, "the rules block %s addresses only, and so does the policy: a destination that has an %s address too can be reached there", families[0], families[1])
	}
	slices.SortStableFunc(tr.result.Notes, func(a, b Note) int {
		return cmp.Or(cmp.Compare(tr.index(a.Source), tr.index(b.Source)), cmp.Compare(a.Line, b.Line))
	})
}

// limits reports whether the family's rules do anything about ports of mail.
func (f *family) limits(ports []uint16) bool {
	return slices.ContainsFunc(ports, func(port uint16) bool {
		return f.judge(packet{dst: f.other, proto: tcp, port: port}) != passes
	})
}

func (tr *translator) order(a, b *rule) int {
	return cmp.Or(cmp.Compare(tr.index(a.place.source), tr.index(b.place.source)), cmp.Compare(a.place.line, b.place.line))
}

// index puts notes about no rule last.
func (tr *translator) index(source string) int {
	if source == "" {
		return len(tr.sources)
	}
	return slices.IndexFunc(tr.sources, func(s Source) bool { return s.Name == source })
}
