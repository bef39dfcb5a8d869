// Package rules applies the policy's rules for single containers to those that run.
package rules

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/docker"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Subject returns a container of Docker's as rules see it.
func Subject(c docker.Container) policy.Subject {
	// Links give a container names within others', which are not its own.
	names := slices.DeleteFunc(slices.Clone(c.Names), func(name string) bool { return strings.Contains(name, "/") })
	return policy.Subject{Names: names, Image: c.Image, Labels: c.Labels}
}

// Apply gives each container that runs below root what the first rule for it says, and
// returns how many it changed. Subjects are the containers that are known, by their
// ids. To those that are not, the rules cannot be applied: they lose what an earlier
// rule gave them if revoke is set, and else keep it. A limit that was set by hand is
// let alone.
//
// All are tried; the errors are joined.
func Apply(root cgroup.Root, state *maps.State, rules []policy.ContainerRule, subjects map[string]policy.Subject, revoke bool) (changed int, err error) {
	running, err := root.Outermost("/", func(rel string) bool { return cgroup.ContainerID(rel) != "" })
	if err != nil {
		return 0, fmt.Errorf("look for containers: %w", err)
	}
	known, err := state.Containers()
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, rel := range running {
		subject, ok := subjects[cgroup.ContainerID(rel)]
		if !ok && !revoke {
			continue
		}
		id, err := root.ID(rel)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has ended
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		before, existed := known[id]
		var rule policy.ContainerRule
		if ok {
			rule = policy.RuleFor(rules, subject)
		}
		change, needed := changeFor(before, rule)
		if !needed {
			continue
		}
		if err := state.Configure(id, change); err != nil {
			errs = append(errs, err)
			continue
		}
		changed++
		if now, err := root.ID(rel); !existed && (err != nil || now != id) {
			// It ended before there was anything to forget.
			errs = append(errs, state.Forget(id))
		}
	}
	return changed, errors.Join(errs...)
}

// changeFor returns what takes a container to a rule, and whether it is anything.
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
		// It may be set by hand meanwhile.
		change.Limit, change.Unless, needed = &limit, maps.LimitSetByHand, true
	}
	return change, needed
}
