// Package rules applies the policy's rules for single containers to running containers.
package rules

import (
	"errors"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Apply gives each container that runs below root what the first matching rule says, and
// returns how many containers it changed. Rules cannot match a container that no source
// knows. Such a container loses what an earlier rule gave it if revoke is set, and
// otherwise keeps it. Apply leaves alone a limit that was set by hand.
//
// It goes on after an error; the errors are joined.
func Apply(root cgroup.Root, state *maps.State, rules []policy.ContainerRule, containers *container.Inventory, revoke bool) (changed int, err error) {
	running, err := containers.Running(root)
	if err != nil {
		return 0, err
	}
	known, err := state.Containers()
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, c := range running {
		if c.Source == "" && !revoke {
			continue
		}
		before, existed := known[c.CgroupID]
		done, err := apply(root, state, rules, c, before, existed)
		if done {
			changed++
		}
		errs = append(errs, err)
	}
	return changed, errors.Join(errs...)
}

// ApplyTo is Apply for a single container, which a source knows. It says whether it changed the
// container. What it costs does not depend on how many other containers there are.
func ApplyTo(root cgroup.Root, state *maps.State, rules []policy.ContainerRule, c container.Container) (changed bool, err error) {
	before, existed, err := state.Container(c.CgroupID)
	if err != nil {
		return false, err
	}
	return apply(root, state, rules, c, before, existed)
}

// apply gives a container what the first matching rule says. before is its entry, if it has
// existed.
func apply(root cgroup.Root, state *maps.State, rules []policy.ContainerRule, c container.Container, before maps.Container, existed bool) (changed bool, err error) {
	var rule policy.ContainerRule
	if c.Source != "" {
		rule = policy.RuleFor(rules, c.Subject())
	}
	change, needed := changeFor(before, rule)
	if !needed {
		return false, nil
	}
	if err := state.Configure(c.CgroupID, change); err != nil {
		return false, err
	}
	if now, err := root.ID(c.Cgroup); !existed && (err != nil || now != c.CgroupID) {
		// The container ended before there was an entry to forget.
		return true, state.Forget(c.CgroupID)
	}
	return true, nil
}

// changeFor returns the change that gives a container what a rule says, and whether a
// change is needed.
func changeFor(c maps.Container, rule policy.ContainerRule) (change maps.Change, needed bool) {
	const byRule = maps.MayReachMetadata | maps.AnyFamily
	change.Flags = maps.FlagsOf(rule.Families)
	if rule.Metadata == policy.Allowed {
		change.Flags |= maps.MayReachMetadata
	}
	if c.Flags&byRule != change.Flags {
		change.Mask, needed = byRule, true
	}
	if c.Flags&maps.LimitSetByHand != 0 {
		return change, needed
	}
	var limit policy.Limit
	if rule.SMTP != nil {
		limit = *rule.SMTP
	}
	if c.Limit != maps.LimitOf(limit) {
		// The limit may be set by hand meanwhile.
		change.Limit, change.Unless, needed = &limit, maps.LimitSetByHand, true
	}
	return change, needed
}
