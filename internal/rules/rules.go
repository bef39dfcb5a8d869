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
	errs := []error{err}
	known, err := state.Containers()
	if err != nil {
		return 0, errors.Join(append(errs, err)...)
	}
	for _, c := range running {
		told := c.Source != ""
		if !told && !revoke {
			continue
		}
		before, existed := known[c.CgroupID]
		var rule policy.ContainerRule
		if told {
			rule = policy.RuleFor(rules, c.Subject())
		}
		change, needed := changeFor(before, rule)
		if !needed {
			continue
		}
		if err := state.Configure(c.CgroupID, change); err != nil {
			errs = append(errs, err)
			continue
		}
		changed++
		if now, err := root.ID(c.Cgroup); !existed && (err != nil || now != c.CgroupID) {
			// The container ended before there was an entry to forget.
			errs = append(errs, state.Forget(c.CgroupID))
		}
	}
	return changed, errors.Join(errs...)
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
