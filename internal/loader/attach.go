package loader

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Attach puts the policy in force for the named cgroups, given by path, and for those that
// are policed already. If there are neither, it polices the root. It makes directories that
// do not exist. If the filter is in force, Attach replaces programs and policy through its
// links: there is no moment without a filter, and state is kept.
//
// After an error, what was in force before is in force again. Besides errors of the kernel
// and of package cgroup, the error can wrap ErrBusy, ErrCannotRecognise, ErrExcluded,
// ErrInPoliced, ErrNested, ErrOtherVersion, ErrPinPath and ErrWholeHost.
//
// If the process is killed during Attach, each hook of each cgroup is either as it was
// before or as it should be; the next Attach completes the change.
func (f *Filter) Attach(ctx context.Context, cgroups []string, p policy.Policy) (err error) {
	named, err := f.validate(cgroups, p)
	if err != nil {
		return err
	}
	if err := f.pins.Mount(f.fault, inHostsMounts); err != nil {
		return err
	}
	unlock, created, err := f.pins.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	change := pins.NewChange(f.fault)
	defer func() { err = change.End(err) }()
	if created {
		change.Back(f.pins.RemoveEmpty)
	}
	plan, err := f.plan(named, p, change)
	if err != nil {
		return err
	}
	a, err := f.begin(p, change)
	if err != nil {
		return err
	}
	defer a.close()
	// Everything that the kernel can refuse is loaded before anything is replaced.
	if err := f.egress.load(a, plan); err != nil {
		return err
	}
	for _, step := range []func(*attachment) error{
		// Containers are known before they are judged.
		f.recognition.attach,
		f.families.probe,
		f.recognition.followEarly,
		copyAgain,
		f.egress.attach,
		f.families.attach,
		f.host.attach,
		f.recognition.follow,
	} {
		if err := step(a); err != nil {
			return err
		}
	}
	return f.finish(a, plan)
}

// validate checks what can be checked without looking at what is in force, and returns
// where the cgroups are.
func (f *Filter) validate(cgroups []string, p policy.Policy) (named []string, err error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if named, err = f.named(cgroups, p); err != nil {
		return nil, err
	}
	if err := cgroup.CheckNamespace(); err != nil {
		return nil, err
	}
	// Kernels before 5.11 charge maps to it.
	return named, maps.RemoveMemlock()
}

// CheckCgroups says whether Attach takes these cgroups, as far as that does not depend on what is in force.
func (f *Filter) CheckCgroups(cgroups []string, p policy.Policy) error {
	_, err := f.named(cgroups, p)
	return err
}

// named returns where cgroups are.
func (f *Filter) named(cgroups []string, p policy.Policy) (named []string, err error) {
	for _, path := range cgroups {
		rel, err := f.root.Rel(path)
		if err != nil {
			return nil, err
		}
		if rel == "/" && !p.Recognises(rel) {
			return nil, fmt.Errorf("%s: %w", path, ErrWholeHost)
		}
		named = append(named, rel)
	}
	return named, f.checkNested(named)
}

// plan is what an attach will police.
type plan struct {
	// wanted are the cgroups to be policed, in order.
	wanted []string
	// old are the cgroups that are policed now. inner are those of them that lie in a
	// wanted cgroup: it takes them over once it is in force.
	old, inner []*policed
}

// plan reads back what is in force and adds it to the named cgroups. What it opens stays
// open until the end of the change.
func (f *Filter) plan(named []string, p policy.Policy, change *pins.Change) (*plan, error) {
	if err := f.pins.Check(); err != nil {
		return nil, err
	}
	if unknown, err := f.pins.UnknownLinks(); err != nil {
		return nil, err
	} else if len(unknown) > 0 {
		return nil, fmt.Errorf("%s: %w", unknown[0], ErrOtherVersion)
	}
	old, err := f.installed()
	if err != nil {
		return nil, err
	}
	for _, o := range old {
		// An undo goes through these links.
		change.Keep(o)
	}
	plan := &plan{wanted: slices.Clone(named), old: old}
	for _, o := range old {
		if o.rel == "" {
			continue
		}
		if slices.ContainsFunc(named, func(rel string) bool { return rel != o.rel && cgroup.Within(o.rel, rel) }) {
			plan.inner = append(plan.inner, o)
			continue
		}
		// A cgroup that was removed is policed again if somebody has made it anew.
		if _, err := os.Stat(f.root.Path(o.rel)); err == nil {
			plan.wanted = append(plan.wanted, o.rel)
		}
	}
	if len(plan.wanted) == 0 {
		if !p.Recognises("/") {
			return nil, fmt.Errorf("%s: %w", f.root, ErrWholeHost)
		}
		plan.wanted = []string{"/"}
	}
	slices.Sort(plan.wanted)
	plan.wanted = slices.Compact(plan.wanted)
	if err := f.checkNested(plan.wanted); err != nil {
		// The named ones are not, among themselves.
		return nil, fmt.Errorf("%w: %w", err, ErrInPoliced)
	}
	if len(plan.wanted) > maxPoliced {
		return nil, fmt.Errorf("%d cgroups: %w: at most %d", len(plan.wanted), ErrTooMany, maxPoliced)
	}
	return plan, nil
}

func (f *Filter) checkNested(rels []string) error {
	for _, outer := range rels {
		for _, inner := range rels {
			if inner != outer && cgroup.Within(inner, outer) {
				return fmt.Errorf("%s and %s: %w", f.root.Path(outer), f.root.Path(inner), ErrNested)
			}
		}
	}
	return nil
}

// begin opens the state and loads the policy's lists into the kernel.
func (f *Filter) begin(p policy.Policy, change *pins.Change) (*attachment, error) {
	state, migration, err := f.openState(change, f.format)
	if err != nil {
		return nil, err
	}
	shared, err := loadPolicy(p)
	if err != nil {
		return nil, err
	}
	a := &attachment{loaded: shared, change: change, state: state, migration: migration}
	gap, err := socketIdentityGap()
	if err != nil {
		a.close()
		return nil, err
	}
	if gap != "" {
		a.found.note(SocketIdentity, errors.New(gap))
	}
	return a, nil
}

// finish stores what the attach found with the programs, and removes what is not needed any
// more.
func (f *Filter) finish(a *attachment, plan *plan) error {
	for _, t := range a.targets {
		if err := t.progs.note(&a.found); err != nil {
			return fmt.Errorf("record what was found: %w", err)
		}
	}
	if err := f.pins.RemoveFormer(); err != nil {
		return err
	}
	// The rules may be others now. Whoever applies them sets this again.
	if err := a.state.ForgetPods(); err != nil {
		return err
	}
	if err := a.state.SweepReaders(); err != nil {
		return err
	}
	if len(plan.inner) > 0 {
		// The cgroups around them are in force, and what is detached now cannot come back.
		a.change.Commit()
	}
	for _, o := range plan.inner {
		if err := f.egress.detach(a.change, o); err != nil {
			return err
		}
	}
	for _, o := range plan.old {
		if o.gone && !slices.Contains(plan.inner, o) {
			// The cgroup was removed: nothing is in force there.
			if err := f.egress.detach(a.change, o); err != nil {
				return err
			}
		}
	}
	return f.complete(a)
}

// copyAgain copies the buckets once more. The less time passes between the copy and the
// replacement of the programs, the fewer tokens can be taken twice if the process is killed
// before it carries them over.
func copyAgain(a *attachment) error {
	if a.migration == nil {
		return nil
	}
	return a.migration.Copy()
}

// complete takes over what was counted in maps that were replaced. It comes last, and from then
// on nothing can be undone, or counts would be in the wrong maps: after an error, the next
// attach completes it.
func (f *Filter) complete(a *attachment) error {
	if a.migration == nil {
		return f.pins.UnpinKept()
	}
	if err := a.change.Step("carry over what was counted"); err != nil {
		return err
	}
	a.change.Commit()
	if err := f.pins.UnpinKept(); err != nil {
		return err
	}
	if err := a.migration.Carry(); err != nil {
		return err
	}
	// Carry makes entries for all that the old maps have.
	if err := f.recognition.forgetOthers(a); err != nil {
		return err
	}
	return f.pins.UnpinReplaced()
}
