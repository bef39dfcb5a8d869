package loader

import (
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// families is the layer that refuses sockets of families that the policy does not allow.
type families struct{ site }

// probe finds a way of refusing sockets, or notes why there is none.
func (f families) probe(a *attachment) (err error) {
	if a.policy.Families != policy.AnyFamily {
		a.refuser, err = findRefuser(a.change, a.types)
		a.found.note(SocketFamilies, err)
	}
	return nil
}

// ProbeFamilies says why this kernel does not refuse sockets for the filter; nil if it
// does. It opens a socket that must be refused.
func (f *Filter) ProbeFamilies() error {
	_, err := findRefuser(pins.OneWay(f.fault), btf.NewCache())
	return err
}

// attach makes the kernel refuse sockets of the targets as the policy says.
func (f families) attach(a *attachment) error {
	for _, t := range a.targets {
		if err := f.attachTarget(t, a); err != nil {
			return fmt.Errorf("refuse sockets of %s: %w", f.root.Path(t.rel), err)
		}
	}
	return nil
}

// attachTarget does this for one target. If there is no way, the link of an earlier attach
// stays: see keptBy.
func (f families) attachTarget(t *target, a *attachment) error {
	if a.policy.Families == policy.AnyFamily {
		return f.detach(a.change, t.was)
	}
	if a.refuser == nil {
		return nil
	}
	prog, err := a.refuser.loadFor(a.state, map[string]any{
		bpf.FamiliesVarEnforce:     a.policy.Mode == policy.Enforce,
		bpf.FamiliesVarFamilies:    a.policy.Families.Mask(),
		bpf.FamiliesVarFamilyFlags: maps.FamilyFlags(),
		bpf.FamiliesVarPoliced:     policedCgroup(t.rel, t.id, t.recognises),
		bpf.FamiliesVarHasCurrent:  true,
	}, a.types)
	if err != nil {
		return err
	}
	defer prog.Close()
	if err := (document{Version: Version(), Cgroup: t.rel, Policy: a.policy}).bind(prog); err != nil {
		return err
	}
	return a.change.ReplaceLink(familiesPin(t.was), func() (link.Link, error) { return a.refuser.attach(prog, t.dir) })
}

// detach removes the link that refuses the sockets of a cgroup.
func (f families) detach(change *pins.Change, p *policed) error {
	return change.DropLink(familiesPin(p))
}

func familiesPin(p *policed) string { return filepath.Join(p.dir, pins.Families) }

// read adds the defence and its hooks to a status.
func (f families) read(r *reading) {
	d := Defence{Name: SocketFamilies, Active: true}
	for _, p := range r.policed {
		if p.rel == "" {
			continue
		}
		if p.families == nil {
			d.Active = false
			continue
		}
		r.Hooks = append(r.Hooks, Hook{
			Name: pins.Families, Attached: true, Cgroup: f.root.Path(p.rel),
			Program: uint32(p.families.Program), Link: uint32(p.families.ID), Since: p.familiesSince,
		})
	}
	if d.Active {
		d = f.older(d, r)
	} else {
		d.Reason = f.whyNot(r)
	}
	r.Defences = append(r.Defences, d)
}

// older returns the defence as it is, or as keptBy describes it if the link of a policed
// cgroup is from an older attach than its filter.
func (f families) older(d Defence, r *reading) Defence {
	for _, p := range r.policed {
		egress := p.info[hooks[0].name]
		if p.families != nil && egress != nil && older(p.families.Program, egress.Program) {
			return r.keptBy(d, p.familiesDoc, []ebpf.ProgramID{p.families.Program})
		}
	}
	return d
}

// whyNot says why sockets are not refused in a policed cgroup.
func (f families) whyNot(r *reading) string {
	const open = ": containers with CAP_NET_RAW can send past the filter through packet sockets; run containers that do not need CAP_NET_RAW with --cap-drop=NET_RAW"
	switch {
	case r.Policy != nil && r.Policy.Families == policy.AnyFamily:
		return "turned off by the policy" + open
	case r.found != nil && r.found.Missing[SocketFamilies] != "":
		return "this kernel does not refuse sockets for the filter (" + r.found.why(SocketFamilies) + ")" + open
	}
	return r.found.why(SocketFamilies)
}
