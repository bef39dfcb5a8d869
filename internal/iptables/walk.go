package iptables

import (
	"fmt"
	"net/netip"
	"slices"
)

// user is the chain that Docker leaves to its users.
const user = "DOCKER-USER"

// dockers reports whether a chain is one that Docker fills.
func dockers(chain string) bool {
	switch chain {
	case "DOCKER", "DOCKER-FORWARD", "DOCKER-BRIDGE", "DOCKER-CT", "DOCKER-INTERNAL", "DOCKER-INGRESS",
		"DOCKER-ISOLATION", "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2":
		return true
	}
	return false
}

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
	when   []*match // its own, and those of the jumps to its chain
	act    action
	end    int
	inUser bool // in DOCKER-USER, or a chain it jumps to
	own    bool // in a chain that Docker fills, which DOCKER-USER does not jump to
	aside  bool // it would drop, were it understood
	// both is what the limits of the rule and of the jumps to it come to, if these are
	// several.
	both *limit
}

func (s step) limit() *limit {
	if s.both != nil {
		return s.both
	}
	for _, m := range s.when {
		if m.limit != nil {
			return m.limit
		}
	}
	return nil
}

// pass is what one table does with the packets of containers.
type pass struct {
	steps []step

	// Of them, those that can be about packets to one address, the last one asked
	// for, and where those go on that skip others.
	addr netip.Addr
	near []int
	next []int
}

// at makes near and next those of an address.
func (p *pass) at(addr netip.Addr) {
	if p.addr == addr {
		return
	}
	p.addr, p.near, p.next = addr, p.near[:0], p.next[:0]
	for i := range p.steps {
		s := &p.steps[i]
		if s.act != none && s.possible(addr) {
			p.near = append(p.near, i)
		}
	}
	for _, i := range p.near {
		n, _ := slices.BinarySearch(p.near, p.steps[i].end)
		p.next = append(p.next, n)
	}
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

func (m *match) to(addr netip.Addr) bool {
	in := func(n netip.Prefix) bool { return n.Contains(addr) }
	return (m.dst == nil || slices.ContainsFunc(m.dst, in) != m.dstNot) && !slices.ContainsFunc(m.except, in)
}

const maxSteps = 20_000

// lay lays a chain and those it jumps to out into p. It fails if they go round in
// circles.
func (p *pass) lay(t *table, c *chain, when []*match, inUser bool, above []string) error {
	if slices.Contains(above, c.name) {
		return fmt.Errorf("%s: chain %s jumps to itself", t.source, c.name)
	}
	above = append(slices.Clip(above), c.name)
	inUser = inUser || c.name == user
	own := dockers(c.name) && !inUser
	var leave []int // steps that skip the rest of this chain
	for _, r := range c.rules {
		if len(p.steps) > maxSteps {
			return fmt.Errorf("%s: more than %d rules, with those of chains counted once for each jump to them", t.source, maxSteps)
		}
		s := step{rule: r, when: append(slices.Clip(when), &r.match), inUser: inUser, own: own}
		next := t.chains[r.target]
		switch {
		case r.garbled != "":
		case own && (r.target == "DROP" || r.target == "REJECT"):
			// Docker keeps its networks apart, with a policy or without.
		case r.target == "DROP" || r.target == "REJECT":
			s.act = drop
		case r.target == "ACCEPT":
			s.act, s.end = skip, -1
		case r.target == "RETURN":
			s.act = skip
			leave = append(leave, len(p.steps))
		case next != nil:
			p.steps = append(p.steps, s) // the jump itself does nothing
			if err := p.lay(t, next, s.when, inUser, above); err != nil {
				return err
			}
			if !r.isGoto {
				continue
			}
			s.act = skip
			leave = append(leave, len(p.steps))
		}
		p.steps = append(p.steps, s)
	}
	for _, i := range leave {
		p.steps[i].end = len(p.steps)
	}
	return nil
}

// finish ends what ends the whole table.
func (p *pass) finish() {
	for i := range p.steps {
		if p.steps[i].end < 0 {
			p.steps[i].end = len(p.steps)
		}
	}
}

// packet is one that a container sends.
type packet struct {
	dst   netip.Addr
	proto uint8
	port  uint16 // 0 for protocols without
	old   bool   // of a connection that exists
}

func (p packet) String() string {
	s := p.dst.String()
	if p.port != 0 {
		s = netip.AddrPortFrom(p.dst, p.port).String()
	}
	return s + "/" + protocolName(p.proto)
}

func protocolName(n uint8) string {
	for _, name := range []string{"tcp", "udp", "icmp", "icmpv6", "sctp", "udplite", "dccp", "gre", "esp", "ah"} {
		if protocols[name] == n {
			return name
		}
	}
	return fmt.Sprint(n)
}

func hasPorts(proto uint8) bool {
	return slices.Contains([]uint8{6, 17, 136, 132, 33}, proto)
}

// world says which conditions hold.
type world map[string]bool

func (s step) applies(p packet, w world) bool {
	for _, m := range s.when {
		if !m.applies(p, w) {
			return false
		}
	}
	return true
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

// verdict is what becomes of packets; several are possible at once where it
// depends on what is not known.
type verdict uint8

const (
	passes verdict = 1 << iota
	limited
	dropped
)

// judge returns the verdict on a packet; buf has room for one of each step and one
// more.
func (p *pass) judge(pk packet, w world, buf []verdict) verdict {
	p.at(pk.dst)
	n := len(p.near)
	buf[n] = passes
	for i := n - 1; i >= 0; i-- {
		s := &p.steps[p.near[i]]
		next := buf[i+1]
		buf[i] = next
		if !s.applies(pk, w) {
			continue
		}
		then := dropped
		if s.act == skip {
			then = buf[p.next[i]]
		}
		within, over := then, then
		if l := s.limit(); l != nil {
			if l.over {
				within = next
			} else {
				over = next
			}
		}
		switch {
		case within == over:
			buf[i] = within
		case within == dropped: // a limit the wrong way round
			buf[i] = dropped
		default:
			buf[i] = limited
		}
	}
	return buf[0]
}

// decides returns the rule that drops a packet that is over every limit, or within
// every limit, or nil.
func (p *pass) decides(pk packet, w world, over bool) *step {
	p.at(pk.dst)
	for i := 0; i < len(p.near); {
		s := &p.steps[p.near[i]]
		end := p.next[i]
		i++
		if !s.applies(pk, w) {
			continue
		}
		if l := s.limit(); l != nil && l.over != over {
			continue
		}
		if s.act == drop {
			return s
		}
		i = end
	}
	return nil
}

// family is all that judges packets of IPv4, or of IPv6.
type family struct {
	v6      bool
	passes  []*pass
	worlds  []world
	partial bool // there are more worlds
	buf     []verdict

	// Between two that follow each other, in each list, all packets are alike.
	addrs  []netip.Addr
	protos []uint8
	ports  []uint16
	other  netip.Addr // an address that no rule names
}

func (f *family) judgeIn(pk packet, w world) verdict {
	v := passes
	for _, p := range f.passes {
		if len(f.buf) <= len(p.steps) {
			f.buf = make([]verdict, len(p.steps)+1)
		}
		v = max(v, p.judge(pk, w, f.buf))
	}
	return v
}

// judge returns the verdicts on a packet that are possible.
func (f *family) judge(pk packet) (possible verdict) {
	for _, w := range f.worlds {
		possible |= f.judgeIn(pk, w)
	}
	return possible
}

// deciders returns the rules that may drop a packet that is over every limit, or
// within every limit.
func (f *family) deciders(pk packet, over bool) (steps []*step) {
	for _, w := range f.worlds {
		for _, p := range f.passes {
			if s := p.decides(pk, w, over); s != nil && !slices.Contains(steps, s) {
				steps = append(steps, s)
			}
		}
	}
	return steps
}

// droppers returns all that may drop a packet.
func (f *family) droppers(pk packet) []*step {
	return append(f.deciders(pk, true), f.deciders(pk, false)...)
}

// reaches reports whether a packet may come to a step, within or over the limits
// before it.
func (f *family) reaches(pk packet, to *step) bool {
	for _, w := range f.worlds {
		for _, p := range f.passes {
			at := make([]bool, len(p.steps)+1)
			at[0] = true
			for i := range p.steps {
				s := &p.steps[i]
				if !at[i] {
					continue
				}
				applies := s.applies(pk, w)
				if s == to && applies {
					return true
				}
				if s.act == none || !applies || s.limit() != nil {
					at[i+1] = true
				}
				if s.act == skip && applies {
					at[s.end] = true
				}
			}
		}
	}
	return false
}

// survey finds the worlds and the packets that have to be looked at.
func (f *family) survey() {
	names := map[string]bool{}
	prefixes := map[netip.Prefix]bool{}
	zero, most := netip.IPv4Unspecified(), uint8(1)
	if f.v6 {
		zero, most = netip.IPv6Unspecified(), 58
	}
	addrs := map[netip.Addr]bool{zero: true, allOnes(zero): true}
	protos := map[uint8]bool{6: true, 17: true, most: true, 253: true}
	ports := map[uint16]bool{1: true, 25: true, 65535: true}
	for _, p := range f.passes {
		for _, s := range p.steps {
			m := &s.rule.match
			for _, c := range m.conditions {
				names[c.text] = true
			}
			for _, d := range slices.Concat(m.dst, m.except) {
				prefixes[d] = true
			}
			if m.proto != 0 {
				protos[m.proto] = true
			}
			for _, r := range m.ports {
				for _, n := range []int{int(r.low) - 1, int(r.low), int(r.high), int(r.high) + 1} {
					if 0 < n && n < 65536 {
						ports[uint16(n)] = true
					}
				}
			}
		}
	}
	for d := range prefixes {
		for _, a := range []netip.Addr{d.Addr().Prev(), d.Addr(), last(d), last(d).Next()} {
			if a.IsValid() {
				addrs[a] = true
			}
		}
	}
	for _, a := range []string{"198.51.100.77", "8.8.8.8", "100.99.98.97", "2001:db8:77::1", "2600::1"} {
		addrs[netip.MustParseAddr(a)] = true
	}
	for a := range addrs {
		if a.Is6() == f.v6 {
			f.addrs = append(f.addrs, a)
		}
	}
	slices.SortFunc(f.addrs, netip.Addr.Compare)
	for n := range protos {
		f.protos = append(f.protos, n)
	}
	slices.Sort(f.protos)
	for n := range ports {
		f.ports = append(f.ports, n)
	}
	slices.Sort(f.ports)
	f.other = f.addrs[len(f.addrs)/2]
	for _, a := range f.addrs {
		inside := false
		for d := range prefixes {
			inside = inside || d.Bits() > 0 && d.Contains(a)
		}
		if !inside && a != zero && a != allOnes(zero) {
			f.other = a
			break
		}
	}
	f.imagine(slices.Sorted(func(yield func(string) bool) {
		for n := range names {
			if !yield(n) {
				return
			}
		}
	}))
}

// few conditions can be looked at in all combinations.
const few = 6

// imagine makes the worlds: all of them for a few conditions; else those in which
// all hold, none does, one differs from the rest, or those of one rule that drops do.
func (f *family) imagine(names []string) {
	if len(names) <= few {
		for bits := range 1 << len(names) {
			w := world{}
			for i, n := range names {
				w[n] = bits&(1<<i) != 0
			}
			f.worlds = append(f.worlds, w)
		}
		return
	}
	for one := -1; one < len(names); one++ {
		for _, rest := range []bool{true, false} {
			w := world{}
			for i, n := range names {
				w[n] = (i == one) != rest
			}
			f.worlds = append(f.worlds, w)
		}
	}
	seen := map[string]bool{}
	for _, p := range f.passes {
		for _, s := range p.steps {
			key := s.conditions()
			if s.act != drop || key == "" || seen[key] {
				continue
			}
			seen[key] = true
			for _, rest := range []bool{true, false} {
				w := world{}
				for _, n := range names {
					w[n] = rest
				}
				for _, m := range s.when {
					for _, c := range m.conditions {
						w[c.text] = !c.not
					}
				}
				f.worlds = append(f.worlds, w)
			}
		}
	}
	f.partial = true
}
