package iptables

import "fmt"

// account sees to it that no rule of DOCKER-USER is passed over in silence; told is what
// has been said before.
func account(tables []*table, on *site, families []*family, told ledger) report {
	var rep report
	walked, said, others := map[*rule]bool{}, map[*rule]bool{}, map[*rule]bool{}
	for _, s := range every(families) {
		r := s.rule
		walked[r] = true
		if said[r] || told.carried[r] || told.has(r, NotCarried, Unknown, Stricter, Weaker) {
			continue
		}
		if r.garbled == "" && (s.own || !s.inUser && !s.about()) {
			if s.unrelated(on) {
				others[r] = true
			}
			continue
		}
		if kind, why := s.uncarried(); why != "" {
			said[r] = true
			rep.note(r, kind, "%s", why)
		}
	}
	if n := len(others); n > 0 {
		rep.note(nil, NotCarried, "rules about forwarded packets that are neither in %s nor about metadata services or mail: %d", user, n)
	}
	for _, t := range tables {
		rep.unwalked(t, on, walked)
	}
	return rep
}

// unrelated reports whether a step outside of DOCKER-USER decides about packets of
// containers. What Docker itself lets through between its bridges and the rest is no news.
func (s *step) unrelated(on *site) bool {
	return !s.own && s.act != none && !s.jump && s.never() == "" &&
		!(s.rule.target == "ACCEPT" && on.bridge(s.rule.match.in.value))
}

// uncarried says why a step has nothing to do with the policy, or "" if nothing is to be
// said of it.
func (s *step) uncarried() (Kind, string) {
	if s.rule.garbled != "" {
		return Unknown, s.rule.garbled
	}
	if s.act == none {
		return s.undecided()
	}
	never, conditions := s.never(), s.conditions()
	switch {
	case s.jump:
		return NotCarried, ""
	case never != "" && s.act == skip:
		return NotCarried, never + "; the policy has no exception for these"
	case never != "":
		return NotCarried, never
	case s.act == drop:
		return Unknown, "it was passed over"
	case s.limit != nil && conditions != "":
		return NotCarried, "a limit that depends on " + conditions + " cannot be carried over"
	case s.limit != nil:
		return NotCarried, "what is over the limit is not stopped, or it is not mail, or other rules decide before"
	}
	return NotCarried, "nothing that the policy stops is let through by it"
}

// undecided is uncarried for a step that neither drops nor skips.
func (s *step) undecided() (Kind, string) {
	switch target := s.rule.target; {
	case s.aside:
		return NotCarried, "" // said, or of no concern
	case target == "":
		return NotCarried, "it has no target: it counts, or puts sources on a list"
	case s.jump || dockers(target):
		return NotCarried, s.never()
	}
	switch s.rule.target {
	case "LOG", "NFLOG", "ULOG", "AUDIT":
		return NotCarried, "it writes a log; egressbpf stats counts what is stopped"
	case "MARK", "CONNMARK", "CONNSECMARK", "SECMARK", "DSCP", "TOS", "ECN", "TTL", "HL", "TCPMSS", "CLASSIFY",
		"CHECKSUM", "CT", "NOTRACK", "SET", "TRACE":
		return NotCarried, "it marks or changes packets, and stops none"
	}
	return Unknown, fmt.Sprintf("the target %s is not known here", s.rule.target)
}

// unwalked names what stands elsewhere, was meant to do the same and does something else.
func (r *report) unwalked(t *table, on *site, walked map[*rule]bool) {
	for _, c := range t.hidden {
		r.note(nil, Unknown, "%s says: %s", t.source, c)
	}
	for _, s := range t.stray {
		r.note(s, Unknown, "%s", s.garbled)
	}
	for _, c := range t.order {
		if dockers(c.name) {
			continue
		}
		ofHost, toHost := t.reached("OUTPUT", c.name), t.reached("INPUT", c.name)
		for _, s := range c.rules {
			if walked[s] {
				continue
			}
			m := on.resolve(s.match, t.v6)
			switch {
			case c.name == user:
				r.note(s, NotCarried, "it is in the table %s, where Docker does not use this chain", t.name)
			case s.garbled != "":
				r.note(s, Unknown, "%s", s.garbled)
			case !about([]*match{&m}, t.v6):
			case ofHost:
				r.note(s, NotCarried, "it is about the host's own processes, and containers with --network=host: the policy is about all containers, and no others")
			case toHost:
				r.note(s, NotCarried, "it is about what is sent to the host itself: a policy does not know the host's own addresses")
			case t.name == "nat" && c.name != "POSTROUTING":
				r.note(s, NotCarried, "it is address translation: a policy blocks, and does not send elsewhere")
			case t.name == "nat":
			default:
				r.note(s, NotCarried, "packets that containers send do not pass the chain %s of the table %s", c.name, t.name)
			}
		}
	}
}
