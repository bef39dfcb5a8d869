package iptables

import (
	"cmp"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// conclude says what there is to say about the rules and the policy as a whole.
func conclude(families []*family, p policy.Policy, mail mailLimit, blocked blocks, anyCarried bool) report {
	var r report
	if v4, v6 := limitedFamilies(families, mail); v4 != v6 {
		r.note(nil, Stricter, "the rules limit mail over %s alone; the policy's limit is for IPv4 and IPv6 together", map[bool]string{true: "IPv4", false: "IPv6"}[v4])
	}
	if blocked.hang() {
		r.note(nil, Differs, "DROP leaves connections to what is blocked hanging; the policy makes them fail at once, as REJECT does")
	}
	if open := openMetadata(p); open != "" && anyCarried {
		r.note(nil, Differs, "the rules leave open, and so does the policy, what the preset metadata would block: %s", open)
		r.comments = append(r.comments, comment{"presets", "The rules block addresses of their own. metadata instead of none also blocks " + open + "."})
	}
	switch v4, v6 := blockedFamilies(p.Block); {
	case v4 && !v6:
		r.openFamily("IPv4", "IPv6")
	case v6 && !v4:
		r.openFamily("IPv6", "IPv4")
	}
	return r
}

func limitedFamilies(families []*family, mail mailLimit) (v4, v6 bool) {
	for _, f := range families {
		limits := f.limits(mail.ports)
		v4, v6 = v4 || limits && !f.v6, v6 || limits && f.v6
	}
	return v4, v6
}

func blockedFamilies(entries []policy.Rule) (v4, v6 bool) {
	for _, b := range entries {
		v4, v6 = v4 || b.Prefix.Addr().Is4(), v6 || b.Prefix.Addr().Is6()
	}
	return v4, v6
}

// hang reports whether rules let connections to what is blocked hang.
func (b blocks) hang() bool {
	for _, rules := range b.origins {
		if slices.ContainsFunc(rules, func(r *rule) bool { return r.target == "DROP" }) {
			return true
		}
	}
	return false
}

// openMetadata lists what a policy leaves open of the preset metadata.
func openMetadata(p policy.Policy) string {
	var open []string
	rules, _ := policy.Preset(policy.Metadata)
	for _, r := range rules {
		if !p.Blocks(r.Prefix.Addr(), cmp.Or(r.Proto, tcp), cmp.Or(r.Port, 80)) {
			open = append(open, r.String())
		}
	}
	return strings.Join(open, ", ")
}

func (r *report) openFamily(blocked, open string) {
	r.note(nil, Differs, "the rules block %s addresses only, and so does the policy: a destination that has an %s address too can be reached there", blocked, open)
}
