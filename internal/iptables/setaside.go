package iptables

import (
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// reckoning holds the rules that the policy is made from and compared with.
type reckoning struct {
	report
	families []*family
}

// setAside returns the families without the rules that drop under a condition that a policy
// cannot express. To stop everything that such a rule may stop would be another policy.
func setAside(families []*family) reckoning {
	var r reckoning
	for _, f := range families {
		kept := *f
		kept.passes = nil
		for _, p := range f.passes {
			steps := slices.Clone(p.steps)
			for i := range steps {
				r.step(&steps[i])
			}
			kept.passes = append(kept.passes, &pass{steps: steps})
		}
		r.families = append(r.families, &kept)
	}
	return r
}

func (r *reckoning) step(s *step) {
	if s.act != drop || s.never() != "" {
		return
	}
	if !s.inUser && s.catchAll() {
		s.act = none
		r.refuse(s.rule, "what no rule before it accepts is stopped there, and not by the policy")
		return
	}
	why := s.unspeakable()
	if len(why) == 0 || s.metadataAlone() {
		return
	}
	s.act, s.aside = none, true
	if !s.inUser && !s.about() {
		return
	}
	text := strings.Join(why, ", ")
	if strings.Contains(text, "--match-set") {
		text += "; the addresses of an ipset are not in the output of iptables-save"
	}
	r.refuse(s.rule, "a policy has no words for "+text)
}

// unspeakable returns the conditions of a step that a policy can neither express nor leave
// out. It can leave out a device or a network of containers.
func (s *step) unspeakable() (why []string) {
	for _, m := range s.when {
		for _, c := range m.conditions {
			if !c.origin() || c.oneContainer() {
				why = append(why, c.String())
			}
		}
	}
	return why
}

func (c condition) oneContainer() bool {
	src, ok := strings.CutPrefix(c.text, "-s ")
	if !ok || c.not {
		return false
	}
	p, err := network(src)
	return err == nil && p.IsSingleIP()
}

// metadataAlone reports whether a step is only about metadata services. There is no good
// reason to let some packets through to these.
func (s *step) metadataAlone() bool {
	entries, _, err := s.entries()
	return err == nil && !slices.ContainsFunc(entries, func(e policy.Rule) bool {
		return e.Prefix.Bits() == 0 || !overlapsMetadata(e.Prefix)
	})
}
