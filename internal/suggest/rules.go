package suggest

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// kinds are what a need is for. A pattern gives all that it matches the same, so those that it
// joins need the same.
type kinds struct {
	pattern        string
	rule           int
	metadata, mail bool
	families       policy.Families
}

// rules puts the rules for single containers before those in force: the first that matches
// holds.
func (s *suggestion) rules() {
	groups := map[kinds][]*need{}
	for _, name := range slices.Sorted(maps.Keys(s.needs)) {
		n := s.needs[name]
		pattern, _ := patternFor(name)
		of := kinds{pattern, n.rule, len(n.metadata) > 0, n.wanted != nil, n.added()}
		groups[of] = append(groups[of], n)
	}
	made := map[string][]*need{}
	for of, group := range groups {
		names := make([]string, len(group))
		for i, n := range group {
			names[i] = n.name
		}
		_, anew := patternFor(group[0].name)
		if of.pattern != "" && (len(group) > 1 || anew) && !s.of.matchesOther(of.pattern, names) {
			made[of.pattern] = group
			continue
		}
		for _, n := range group {
			made[n.name] = []*need{n}
		}
	}
	var rules []policy.ContainerRule
	for _, name := range slices.Sorted(maps.Keys(made)) {
		rule, text, needed := s.rule(name, made[name])
		if !needed {
			continue
		}
		for _, line := range text {
			s.comment(entry("containers", len(rules)), line)
		}
		rules = append(rules, rule)
	}
	s.Added += len(rules)
	for _, r := range s.Config.Containers {
		replaced := slices.ContainsFunc(rules, func(by policy.ContainerRule) bool {
			by = policy.ContainerRule{Name: by.Name, SMTP: r.SMTP, Metadata: r.Metadata, Families: r.Families}
			return r == by
		})
		if !replaced {
			rules = append(rules, r)
		}
	}
	s.Config.Containers = rules
	if s.Added > 0 && len(rules) > 0 {
		s.comment("containers", "Whoever starts containers chooses their names. `egressbpf run` applies these rules; `attach` does not.")
	}
}

// added are the families that the containers need, as a policy names them; empty for none.
func (n *need) added() policy.Families {
	var numbers []uint
	for f := range n.families {
		numbers = append(numbers, uint(f))
	}
	if len(numbers) == 0 {
		return ""
	}
	return policy.FamiliesOf(numbers)
}

// rule returns the rule for containers that need the same, and why. needed is false if the
// policy in force gives them all that already.
func (s *suggestion) rule(name string, group []*need) (rule policy.ContainerRule, text []string, needed bool) {
	metadata, families, to := tally[policy.Rule]{}, tally[uint16]{}, tally[netip.AddrPort]{}
	var sent mail
	var allowed uint64
	var names []string
	sent.exact = true
	before := policy.ContainerRule{}
	if i := group[0].rule; i >= 0 {
		before = s.of.Config.Containers[i]
	}
	rule = policy.ContainerRule{Name: name, SMTP: before.SMTP, Metadata: before.Metadata, Families: before.Families}
	var wanted, limit *policy.Limit
	for _, n := range group {
		names = append(names, n.name)
		metadata.merge(n.metadata)
		families.merge(n.families)
		for _, m := range n.mail {
			to.merge(m.to)
			sent.n, sent.unknown, sent.exact = sent.n+m.n, sent.unknown+m.unknown, sent.exact && m.exact
			sent.peak = max(sent.peak, m.peak)
		}
		for _, c := range n.containers {
			allowed += c.counted.SMTP.Allowed
		}
		if n.wanted != nil {
			wanted, limit = widest(wanted, n.wanted), widest(limit, n.limit)
		}
	}
	sent.to = to
	if len(group) > 1 {
		text = append(text, list(names, 5)+":")
	}
	if strings.Contains(name, "*") {
		text = append(text, "The star also holds for containers that start later.")
	}
	if i := group[0].rule; i >= 0 {
		text = append(text, fmt.Sprintf("With what rule %d of the policy in force gives them.", i+1))
	}
	if len(metadata) > 0 && before.Metadata != policy.Allowed {
		rule.Metadata, needed = policy.Allowed, true
		text = append(text, "Asked for the metadata service, "+times(metadata.sum())+": "+metadata.list(5, policy.Rule.String)+
			". `metadata: allow` hands out the machine's credentials.")
	}
	if len(families) > 0 {
		if f := union(before.Families, families); f != before.Families {
			rule.Families, needed = f, true
			text = append(text, "Opened sockets of other families, "+times(families.sum())+": "+families.list(5, familyName)+
				". Such sockets bypass the filter.")
		}
	}
	if wanted != nil {
		rule.SMTP, needed = wanted, true
		within := ""
		if allowed > 0 {
			within = fmt.Sprintf(", besides %d within it", allowed)
		}
		text = append(text, fmt.Sprintf("Sent mail beyond %s, burst %d: %s over that limit%s%s. %s Is this a mailer, or spam?",
			limit.Rate, limit.Burst, plural(sent.n, "connection"), within, sent.where(5), sent.pace()))
	}
	return rule, text, needed
}

func widest(a, b *policy.Limit) *policy.Limit {
	if a == nil {
		return b
	}
	l := wider(*a, *b)
	return &l
}

// union returns the families of a rule and more.
func union(f policy.Families, more tally[uint16]) policy.Families {
	if f == policy.AnyFamily {
		return f
	}
	var numbers []uint
	for _, n := range policy.FamilyNumbers() {
		if _, ok := more[uint16(n)]; ok || f != "" && f.Mask()>>n&1 != 0 {
			numbers = append(numbers, n)
		}
	}
	return policy.FamiliesOf(numbers)
}

// where says to whom mail went.
func (m mail) where(most int) string {
	text := ""
	if len(m.to) > 0 {
		text = ", to " + m.to.list(most, netip.AddrPort.String)
	}
	if m.unknown > 0 {
		text += fmt.Sprintf(", of which %d to destinations that are not recorded", m.unknown)
	}
	return text
}

// pace says how mail was spread over time.
func (m mail) pace() string {
	if m.exact {
		return fmt.Sprintf("At most %d of them came within a minute.", m.peak)
	}
	return fmt.Sprintf("Their times are not all recorded: this is for up to %d within a minute.", m.peak)
}

// tally counts by key.
type tally[K comparable] map[K]uint64

func (t tally[K]) sum() (n uint64) {
	for _, v := range t {
		n += v
	}
	return n
}

func (t tally[K]) merge(other tally[K]) {
	for k, n := range other {
		t[k] += n
	}
}

// list shows the keys with the highest counts.
func (t tally[K]) list(most int, text func(K) string) string {
	type row struct {
		text string
		n    uint64
	}
	var rows []row
	for k, n := range t {
		rows = append(rows, row{text(k), n})
	}
	slices.SortFunc(rows, func(a, b row) int { return cmp.Or(cmp.Compare(b.n, a.n), cmp.Compare(a.text, b.text)) })
	var texts []string
	for _, r := range rows {
		texts = append(texts, fmt.Sprintf("%s (%d)", r.text, r.n))
	}
	return list(texts, most)
}

func list(texts []string, most int) string {
	if more := len(texts) - most; more > 0 {
		return strings.Join(texts[:most], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(texts, ", ")
}
