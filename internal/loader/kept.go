package loader

import (
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// tryStep begins the name of a step in which an attach finds out whether the kernel
// can have a defence. It goes on where that fails, with what an earlier attach has
// put in force, if there is any.
const tryStep = "try "

// kept returns a defence of which some program was loaded before the egress program,
// and so by an earlier attach, whose document is doc (nil if it has none). why is what
// kept the last attach from renewing it.
func kept(d Defence, doc *document, s *Status, why string) Defence {
	d.Reason = "an older attach put it in force"
	if doc != nil {
		d.Reason += fmt.Sprintf(" (version %s, mode %s", doc.Version, doc.Policy.Mode)
		if d.Name == SocketFamilies {
			d.Reason += fmt.Sprintf(", families %s", doc.Policy.Families)
		}
		d.Reason += ")"
		if doc.Policy.Mode == policy.Audit && s.Mode == policy.Enforce {
			d.Active = false
		}
	}
	if why == interrupted {
		d.Reason += ", and the last one was interrupted; attach again"
	} else {
		d.Reason += ", and could not be renewed: " + why + "; attach again to try once more"
	}
	return d
}

// olderFamilies returns the defence as it is if a policed cgroup's link that refuses
// sockets is of an older attach than its filter.
func (f *Filter) olderFamilies(d Defence, s *Status, all []*policed) Defence {
	for _, p := range all {
		egress := p.info[hooks[0].name]
		if p.families == nil || egress == nil || !older(p.families.Program, egress.Program) {
			continue
		}
		return kept(d, p.familiesDoc, s, foundBy(all).why(SocketFamilies))
	}
	return d
}

// olderHost does the same for the host side.
func (f *Filter) olderHost(d Defence, doc *document, s *Status, all []*policed, host []ebpf.ProgramID) Defence {
	for _, p := range all {
		egress := p.info[hooks[0].name]
		if egress == nil {
			continue
		}
		for _, id := range host {
			if older(id, egress.Program) {
				return kept(d, doc, s, foundBy(all).why(HostSide))
			}
		}
	}
	return d
}

// older says whether a program was loaded before another one. One that is gone, as
// when somebody attaches meanwhile, is not.
func older(id, than ebpf.ProgramID) bool {
	a, errA := loadTime(id)
	b, errB := loadTime(than)
	return errA == nil && errB == nil && a < b
}
