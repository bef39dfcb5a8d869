package iptables

import (
	"maps"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// unseenMail says which mail rules of FORWARD do not see.
const unseenMail = "FORWARD does not see mail to the host itself, nor always to containers on the same bridge"

// mailLimit is the limit on new mail connections.
type mailLimit struct {
	report
	smtp   policy.SMTP
	ports  []uint16 // the limited ports, sorted; none if there is no limit
	limits []*step  // the steps that limit these ports
}

func (l *mailLimit) limitsPort(port uint16) bool {
	_, found := slices.BinarySearch(l.ports, port)
	return found
}

// limitMail finds the ports to which new connections are limited, and the limit. lists are
// those of [layout].
func limitMail(families []*family, lists map[string][]*step) mailLimit {
	l := mailLimit{smtp: policy.Default().SMTP}
	l.smtp.Rate = policy.Rate{}
	ports := map[uint16]bool{}
	var rejects, drops []*rule // of what is over the limit
	for f, s := range every(families) {
		if s.act == none || s.never() != "" || s.limit == nil && s.act != drop {
			continue
		}
		for _, port := range s.mail() {
			by, has := l.port(f, s, port)
			if !has {
				continue
			}
			ports[port] = true
			for _, d := range by {
				if d.rule.target == "REJECT" {
					rejects = append(rejects, d.rule)
				} else {
					drops = append(drops, d.rule)
				}
			}
		}
	}
	if len(ports) == 0 {
		return l
	}
	l.ports = slices.Sorted(maps.Keys(ports))
	l.smtp.Ports = l.ports
	if len(rejects) > 0 {
		l.smtp.OverLimit = policy.Reject
		for _, r := range drops {
			l.note(r, Differs, "the policy has one over_limit: what is over the limit is refused at once here too, as %s does", rejects[0].at)
		}
	}
	l.setLimit(lists)
	l.note(nil, Stricter, "%s; the policy limits that too: name such servers under smtp.exempt", unseenMail)
	for _, s := range l.limits {
		l.comment("smtp", s.rule)
	}
	return l
}

// port reports whether a step takes part in limiting new connections to a port, and returns
// the steps that drop what is over the limit.
func (l *mailLimit) port(f *family, s *step, port uint16) (by []*step, has bool) {
	pk := f.mailPacket(port)
	entries, _, _ := s.entries()
	narrow := entries[0].Prefix
	if narrow.Bits() > 0 {
		pk.dst = narrow.Addr()
	}
	if f.judge(pk)&(limited|dropped) != limited {
		return nil, false // not limited, or also dropped within the limit: that blocks
	}
	by = f.deciders(pk, true)
	if s.limit == nil && !slices.ContainsFunc(by, func(d *step) bool { return d.rule == s.rule }) || s.limit != nil && !f.reaches(pk, s) {
		return nil, false
	}
	l.carry(s.rule)
	if narrow.Bits() > 0 && f.judge(f.mailPacket(port))&passes != 0 {
		l.note(s.rule, Stricter, "the policy limits mail to every destination, not only to %s", narrow)
	}
	if c := s.conditions(); c != "" {
		l.note(s.rule, Stricter, "the policy limits every container, whatever is true of %s", c)
	}
	l.gather(f, pk)
	return by, true
}

// gather adds the limits that a mail packet meets, whether or not their rules are about
// mail.
func (l *mailLimit) gather(f *family, pk packet) {
	for s := range stepsOf(f.passes) {
		if s.act == none || s.limit == nil || !f.reaches(pk, s) ||
			slices.ContainsFunc(l.limits, func(o *step) bool { return o.rule == s.rule }) {
			continue
		}
		l.limits = append(l.limits, s)
		l.carry(s.rule)
		if f.matters(s, pk) {
			l.note(s.rule, Weaker, "the rule counts every packet to these ports; the policy counts new connections, and lets through what belongs to one that it let through")
		}
	}
}

// matters reports whether a step with a limit also decides about packets of existing
// connections.
func (f *family) matters(s *step, pk packet) bool {
	pk.old = true
	return slices.ContainsFunc(f.worlds, func(w world) bool { return s.applies(pk, w) }) && f.judge(pk)&(limited|dropped) != 0
}

// setLimit takes the strictest limit, and notes where that differs from the rules.
func (l *mailLimit) setLimit(lists map[string][]*step) {
	l.smtp.Rate, l.smtp.Burst = l.limits[0].limit.rate, min(l.limits[0].limit.burst, 1_000_000)
	for _, s := range l.limits[1:] {
		if slower(s.limit.rate, l.smtp.Rate) < 0 {
			l.smtp.Rate = s.limit.rate
		}
		l.smtp.Burst = min(l.smtp.Burst, s.limit.burst)
	}
	if err := l.smtp.Limit().Validate(); err != nil {
		l.smtp.Burst = 1
	}
	for _, s := range l.limits {
		l.counted(s)
		if s.limit.module == "recent" {
			l.recent(s, lists[s.limit.recent])
		}
		l.merged(s)
	}
}

// counted notes where a rule counts for something else, or for another time, than the
// policy.
func (l *mailLimit) counted(s *step) {
	each := strings.Join(s.limit.per, " and ")
	switch {
	case s.limit.perContainer() && len(s.limit.per) == 1:
	case s.limit.perContainer():
		l.note(s.rule, Stricter, "the rule has a limit for each %s; the policy has one for each container", each)
	default:
		l.note(s.rule, Weaker, "the rule's limit is shared by containers; the policy's is for each, so that many of them can send more than the rule lets all of them send")
		if slices.ContainsFunc(s.limit.per, func(p string) bool { return p != "srcip" }) {
			l.note(s.rule, Stricter, "the rule has a limit for each %s; the policy has one for all that a container sends", each)
		}
	}
	if s.limit.expire > 0 && s.limit.expire < s.limit.refill() {
		l.note(s.rule, Stricter, "the rule forgets what it counted after %v without a packet; the policy gives tokens back at its rate alone", s.limit.expire)
	}
}

// recent notes what a limit by a list of -m recent means; list has the steps that put
// sources on the list.
func (l *mailLimit) recent(s *step, list []*step) {
	for _, sets := range list {
		if len(mailOf(sets.when, false))+len(mailOf(sets.when, true)) == 0 {
			l.note(s.rule, Weaker, "the rule also counts what is not mail, by the one at %s", sets.rule.at)
		}
	}
	l.note(s.rule, Weaker, "the rule lets %d through within any %d seconds, and with --update starts anew at every attempt; the policy lets %d through at once and then %s, up to twice as many in such a time", s.limit.burst, s.limit.window, l.smtp.Burst, l.smtp.Rate)
}

// merged notes where the policy's single limit is not the limit of a rule.
func (l *mailLimit) merged(s *step) {
	if slower(s.limit.rate, l.smtp.Rate) != 0 || s.limit.burst != l.smtp.Burst {
		l.note(s.rule, Stricter, "the policy has one limit for all mail of a container, the strictest of the rules': %s, burst %d, instead of %s, burst %d", l.smtp.Rate, l.smtp.Burst, s.limit.rate, s.limit.burst)
	} else if s != l.limits[0] && s.limit.perContainer() {
		l.note(s.rule, Stricter, "the policy has one limit for all mail of a container; the rules count apart what they let through here and at %s", l.limits[0].rule.at)
	}
}
