package iptables

import (
	"cmp"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// conclude notes what concerns the rules and the policy as a whole.
func conclude(families []*family, p policy.Policy, mail mailLimit, blocked blocks, anyCarried bool) report {
	var r report
	limiting := slices.DeleteFunc(slices.Clone(families), func(f *family) bool { return !f.limits(mail.ports) })
	if len(limiting) == 1 {
		r.note(nil, Stricter, "the rules limit mail over %s alone; the policy's limit is for IPv4 and IPv6 together", familyName(limiting[0].v6))
	}
	for _, rules := range blocked.origins {
		if slices.ContainsFunc(rules, func(r *rule) bool { return r.target == "DROP" }) {
			r.note(nil, Differs, "DROP leaves connections to what is blocked hanging; the policy makes them fail at once, as REJECT does")
			break
		}
	}
	if open := openMetadata(p); open != "" && anyCarried {
		r.note(nil, Differs, "the rules leave open, and so does the policy, what the preset metadata would block: %s", open)
		r.comments = append(r.comments, comment{"presets", "The rules block addresses of their own. metadata instead of none also blocks " + open + "."})
	}
	blocks := func(v6 bool) bool {
		return slices.ContainsFunc(p.Block, func(r policy.Rule) bool { return r.Prefix.Addr().Is6() == v6 })
	}
	if v6 := blocks(true); v6 != blocks(false) {
		r.note(nil, Differs, "the rules block %s addresses only, and so does the policy: a destination that has an %s address too can be reached there", familyName(v6), familyName(!v6))
	}
	return r
}

func familyName(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

// openMetadata lists what the preset metadata would block and the policy does not.
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
