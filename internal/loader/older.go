package loader

import (
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// keptBy returns a defence some of whose programs were loaded before the egress program,
// and so by an earlier attach. doc is the document of that attach; nil if there is none.
// What kept the last attach from renewing the defence is among what it found.
func (r *reading) keptBy(d Defence, doc *document, programs []ebpf.ProgramID) Defence {
	d.Reason = "an older attach put it in force"
	if doc != nil {
		d.Reason += fmt.Sprintf(" (version %s, mode %s", doc.Version, doc.Policy.Mode)
		if d.Name == SocketFamilies {
			d.Reason += fmt.Sprintf(", families %s", doc.Policy.Families)
		}
		d.Reason += ")"
		if doc.Policy.Mode == policy.Audit && r.Mode == policy.Enforce {
			d.Active = false
		}
	}
	if why := r.found.why(d.Name); why == interrupted {
		d.Reason += ", and the last one was interrupted; attach again"
	} else {
		d.Reason += ", and could not be renewed: " + why + "; attach again to try once more"
	}
	if r.useOtherMaps(programs) {
		d.Active = false
		d.Reason += "; it does not know the containers that were made since"
	}
	return d
}

// useOtherMaps says whether one of the programs uses another map of containers than the
// egress program, because the last attach has replaced the map.
func (r *reading) useOtherMaps(programs []ebpf.ProgramID) bool {
	return r.besideFilter(programs, func(id, egress ebpf.ProgramID) bool {
		own, err := pins.StateOf(egress)
		if err != nil || own == 0 {
			return false
		}
		other, err := pins.StateOf(id)
		return err == nil && other != 0 && other != own
	})
}

// olderThanFilter says whether one of the programs was loaded before the egress program of
// a policed cgroup.
func (r *reading) olderThanFilter(programs []ebpf.ProgramID) bool {
	return r.besideFilter(programs, older)
}

// besideFilter says whether something is true of one of the programs and the egress program of
// a policed cgroup.
func (r *reading) besideFilter(programs []ebpf.ProgramID, is func(id, egress ebpf.ProgramID) bool) bool {
	for _, p := range r.policed {
		egress := p.info[hooks[0].name]
		if egress == nil {
			continue
		}
		for _, id := range programs {
			if is(id, egress.Program) {
				return true
			}
		}
	}
	return false
}

// older says whether a program was loaded before another one; false if either is gone, for
// instance because another process is attaching.
func older(id, than ebpf.ProgramID) bool {
	a, errA := loadTime(id)
	b, errB := loadTime(than)
	return errA == nil && errB == nil && a < b
}
