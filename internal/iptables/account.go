package iptables

import "fmt"

// account gives a reason for every rule of DOCKER-USER that is not carried over and has no
// note yet; told is what earlier phases reported. Of the rules outside of DOCKER-USER, it
// names those that were meant to do what a policy does.
func account(tables []*table, host *site, families []*family, told ledger) report {
	var rep report
	walked, said, others := map[*rule]bool{}, map[*rule]bool{}, map[*rule]bool{}
	for _, s := range every(families) {
		r := s.rule
		walked[r] = true
		if said[r] || told.carried[r] || told.has(r, NotCarried, Unknown, Stricter, Weaker) {
			continue
		}
		if r.garbled == "" && (s.own || !s.inUser && !s.about()) {
			if s.unrelated(host) {
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
		rep.remarks = append(rep.remarks, unwalked(t, host, walked).remarks...)
	}
	return rep
}

// unrelated reports whether a step outside of DOCKER-USER decides about packets of
// containers. It leaves out what Docker itself lets through between its bridges and other
// devices.
func (s *step) unrelated(host *site) bool {
	return !s.own && s.act != none && !s.jump && s.never() == "" &&
		!(s.rule.target == "ACCEPT" && host.bridge(s.rule.match.in.value))
}

// uncarried says why the policy has no counterpart of a step; "" if no reason has to be
// given.
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
		return NotCarried, "" // the reason was given where the step was set aside
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

// unwalked names the rules that no packet of a container reaches and that were meant to do
// what a policy does, and the lines that cannot be read.
func unwalked(t *table, host *site, walked map[*rule]bool) (rep report) {
	for _, c := range t.hidden {
		rep.note(nil, Unknown, "%s says: %s", t.source, c)
	}
	for _, r := range t.stray {
		rep.note(r, Unknown, "%s", r.garbled)
	}
	for _, c := range t.order {
		if dockers(c.name) {
			continue
		}
		ofHost, toHost := t.reached("OUTPUT", c.name), t.reached("INPUT", c.name)
		for _, r := range c.rules {
			if walked[r] {
				continue
			}
			m := host.resolve(r.match, t.v6)
			switch {
			case c.name == user:
				rep.note(r, NotCarried, "it is in the table %s, where Docker does not use this chain", t.name)
			case r.garbled != "":
				rep.note(r, Unknown, "%s", r.garbled)
			case !about([]*match{&m}, t.v6):
			case ofHost:
				rep.note(r, NotCarried, "it is about the host's own processes, and containers with --network=host: the policy is about all containers, and no others")
			case toHost:
				rep.note(r, NotCarried, "it is about what is sent to the host itself: a policy does not know the host's own addresses")
			case t.name == "nat" && c.name != "POSTROUTING":
				rep.note(r, NotCarried, "it is address translation: a policy blocks, and does not send elsewhere")
			case t.name == "nat":
			default:
				rep.note(r, NotCarried, "packets that containers send do not pass the chain %s of the table %s", c.name, t.name)
			}
		}
	}
	return rep
}
