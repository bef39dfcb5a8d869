package iptables

import (
	"fmt"
	"slices"
)

// user is the chain that Docker leaves to its users.
const user = "DOCKER-USER"

// dockers reports whether Docker fills a chain.
func dockers(chain string) bool {
	switch chain {
	case "DOCKER", "DOCKER-FORWARD", "DOCKER-BRIDGE", "DOCKER-CT", "DOCKER-INTERNAL", "DOCKER-INGRESS",
		"DOCKER-ISOLATION", "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2":
		return true
	}
	return false
}

// hooks are the chains, by table, that packets of containers pass on their way out.
var hooks = map[string][]string{
	"filter": {"FORWARD"}, "mangle": {"PREROUTING", "FORWARD", "POSTROUTING"}, "raw": {"PREROUTING"}, "security": {"FORWARD"},
}

// layout has the rules in the order in which packets of containers meet them. It does not
// change once it is made.
type layout struct {
	report
	families []*family
	lists    map[string][]*step // of -m recent: the steps that put sources on each list
}

// layOut lays out the tables of all dumps. It returns an error if chains jump in circles,
// or have more than maxSteps rules, where the rules of a chain count once for each jump to
// it.
func layOut(tables []*table, host *site) (layout, error) {
	l := layout{lists: map[string][]*step{}}
	var passes [2][]*pass
	means := [2]*meaning{newMeaning(host, false), newMeaning(host, true)}
	for _, t := range tables {
		i := 0
		if t.v6 {
			i = 1
		}
		if t.stopsRest(host) {
			l.note(nil, NotCarried, "%s: the policy of FORWARD in the table %s is DROP, and no rules of Docker accept what containers send: what no rule accepts is stopped there, and not by the policy", t.source, t.name)
		}
		added, err := l.table(t, means[i])
		if err != nil {
			return layout{}, err
		}
		passes[i] = append(passes[i], added...)
	}
	for i, list := range passes {
		if len(list) > 0 {
			l.families = append(l.families, newFamily(i == 1, list))
		}
	}
	return l, nil
}

// stopsRest reports whether the policy of FORWARD stops packets of containers, because no
// rule accepts them.
func (t *table) stopsRest(host *site) bool {
	c := t.chains["FORWARD"]
	return c != nil && c.policy == "DROP" && !slices.ContainsFunc(c.rules, func(r *rule) bool {
		return dockers(r.target) || r.target == "ACCEPT" && host.bridge(r.match.in.value)
	})
}

// table lays out a table, and DOCKER-USER even if no rule jumps to it.
func (l *layout) table(t *table, means *meaning) (passes []*pass, err error) {
	for _, name := range hooks[t.name] {
		if c := t.chains[name]; c != nil {
			p, err := l.chain(t, c, means)
			if err != nil {
				return nil, err
			}
			passes = append(passes, p)
		}
	}
	for s := range stepsOf(passes) {
		if s.inUser || s.rule.target == user {
			return passes, nil
		}
	}
	c := t.chains[user]
	if hooks[t.name] == nil || c == nil || len(c.rules) == 0 {
		return passes, nil
	}
	if forward := t.chains["FORWARD"]; t.name == "filter" && forward != nil && (t.live || len(forward.rules) > 0) {
		l.note(c.rules[0], Differs, "no rule of FORWARD jumps to %s: these rules stop nothing, the policy does", user)
	}
	p, err := l.chain(t, c, means)
	return append(passes, p), err
}

// chain lays out what a packet meets from a chain on.
func (l *layout) chain(t *table, c *chain, means *meaning) (*pass, error) {
	row := row{table: t, means: means, report: &l.report}
	if err := row.chain(c, nil, false, nil); err != nil {
		return nil, err
	}
	for i := range row.steps {
		s := &row.steps[i]
		if s.end < 0 { // skips the rest of the table
			s.end = len(row.steps)
		}
		if list := s.match().sets; list != "" {
			l.lists[list] = append(l.lists[list], s)
		}
	}
	return &pass{steps: row.steps}, nil
}

// meaning is what the rules of one family mean on a host. Its caller asks about the rules
// in the order in which packets meet them, because the meaning of a rule of -m recent
// depends on whether an earlier rule puts the packet on the list.
type meaning struct {
	site    *site
	v6      bool
	listed  map[string]bool // lists that earlier rules put packets on
	matches map[*rule]*match
}

func newMeaning(s *site, v6 bool) *meaning {
	return &meaning{site: s, v6: v6, listed: map[string]bool{}, matches: map[*rule]*match{}}
}

func (me *meaning) match(r *rule) *match {
	if m := me.matches[r]; m != nil {
		return m
	}
	m := me.site.resolve(r.match, me.v6)
	if m.sets != "" {
		me.listed[m.sets] = true
	}
	if l := m.limit; l != nil && l.module == "recent" {
		if settled, ok := l.settle(me.listed[l.recent]); ok {
			m.limit = &settled
		} else {
			m.limit = nil
			m.conditions = append(m.conditions, condition{fmt.Sprintf("-m recent --seconds %d --hitcount %d", l.window, l.hits), !l.over})
		}
	}
	me.matches[r] = &m
	return &m
}

// row holds the steps of a pass while they are laid out.
type row struct {
	table *table
	means *meaning
	*report
	steps []step
}

const maxSteps = 20_000

// chain adds a chain and the chains that it jumps to. It returns an error if they jump in
// circles.
func (w *row) chain(c *chain, when []*match, inUser bool, above []string) error {
	t := w.table
	if slices.Contains(above, c.name) {
		return fmt.Errorf("%s: chain %s jumps to itself", t.source, c.name)
	}
	above = append(slices.Clip(above), c.name)
	inUser = inUser || c.name == user
	own := dockers(c.name) && !inUser
	var leave []int // steps that skip the rest of this chain
	for _, r := range c.rules {
		if len(w.steps) > maxSteps {
			return fmt.Errorf("%s: more than %d rules, with those of chains counted once for each jump to them", t.source, maxSteps)
		}
		next := t.chains[r.target]
		s := step{rule: r, v6: t.v6, when: append(slices.Clip(when), w.means.match(r)), jump: next != nil, inUser: inUser, own: own}
		switch {
		case r.garbled != "":
		case own && (r.target == "DROP" || r.target == "REJECT"):
			// Docker separates its networks whatever the policy says.
		case r.target == "DROP" || r.target == "REJECT":
			s.act = drop
		case r.target == "ACCEPT":
			s.act, s.end = skip, -1
		case r.target == "RETURN":
			s.act = skip
			leave = append(leave, len(w.steps))
		case next != nil:
			w.add(s) // the jump itself does nothing
			if err := w.chain(next, s.when, inUser, above); err != nil {
				return err
			}
			if !r.isGoto {
				continue
			}
			s.act = skip
			leave = append(leave, len(w.steps))
		}
		w.add(s)
	}
	for _, i := range leave {
		w.steps[i].end = len(w.steps)
	}
	return nil
}

// add puts a step with its limit at the end of the row.
func (w *row) add(s step) {
	var limits []*limit
	for _, m := range s.when {
		if m.limit != nil {
			limits = append(limits, m.limit)
		}
	}
	if len(limits) > 0 {
		s.limit = limits[0]
	}
	if len(limits) > 1 && s.act != none {
		if both, ok := together(limits); ok {
			s.limit = &both
		} else if s.act == skip {
			w.note(s.rule, Stricter, "the exception is not carried over: it is for some of what is over another limit")
			s.act = none
		} else {
			w.note(s.rule, NotCarried, "it is for what is within one limit and over another one")
			s.act, s.aside = none, true
		}
	}
	w.steps = append(w.steps, s)
}
