// Package rules applies the policy's rules for single containers to running containers.
package rules

import (
	"errors"
	"slices"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Apply gives each container that runs below root what the policy's first matching rule says, and
// returns how many containers it changed. Rules cannot match a container that no source
// knows, and those of pods may not if a source does not tell the pod's network. Such a container loses
// what an earlier rule gave it if revoke is set, and otherwise keeps it. Apply leaves alone a limit that was
// set by hand, and containers of pods that the policy leaves out.
//
// It goes on after an error; the errors are joined.
func Apply(root cgroup.Root, state *maps.State, p policy.Policy, containers *container.Inventory, revoke bool) (changed int, err error) {
	running, err := containers.Running(root)
	if err != nil {
		return 0, err
	}
	known, err := state.Containers()
	if err != nil {
		return 0, err
	}
	sandboxes, err := containers.Sandboxes(root, running)
	if err != nil {
		return 0, err
	}
	running = slices.DeleteFunc(running, func(c container.Container) bool { return p.LeavesOut(c.Cgroup) })
	errs := []error{applyToPods(root, state, p.Containers, slices.Concat(running, sandboxes), revoke)}
	for _, c := range running {
		if !revoke && undecided(p.Containers, c) {
			continue
		}
		before, existed := known[c.CgroupID]
		done, err := apply(root, state, p.Containers, c, before, existed)
		if done {
			changed++
		}
		errs = append(errs, err)
	}
	return changed, errors.Join(errs...)
}

// ApplyTo is Apply for a single container, which a source knows. It says whether it changed the
// container. What it costs does not depend on how many other containers there are.
func ApplyTo(root cgroup.Root, state *maps.State, p policy.Policy, c container.Container) (changed bool, err error) {
	if p.LeavesOut(c.Cgroup) {
		return false, nil
	}
	if id, pod := podOf(root, p.Containers, c, false); id != 0 {
		if before, err := state.Pod(id); err != nil {
			return false, err
		} else if err := setPod(root, state, c, id, before, pod); err != nil {
			return false, err
		}
	}
	if undecided(p.Containers, c) {
		return false, nil
	}
	before, existed, err := state.Container(c.CgroupID)
	if err != nil {
		return false, err
	}
	return apply(root, state, p.Containers, c, before, existed)
}

// undecided says whether it is not known what the rules say about a container. That another source than
// the pod's has told of it is not enough: it may have been started beside Kubernetes.
func undecided(rules []policy.ContainerRule, c container.Container) bool {
	subject := c.Subject()
	return c.Source == "" || subject.NetworkUnknown && policy.RuleIndex(rules, subject) < 0
}

// applyToPods sets what holds from their start for the containers of those pods that have a
// container or a sandbox in all, so that a rule for a pod is not late for most of them.
func applyToPods(root cgroup.Root, state *maps.State, rules []policy.ContainerRule, all []container.Container, revoke bool) error {
	before, err := state.Pods()
	if err != nil {
		return err
	}
	var errs []error
	known := map[uint64]bool{}
	for _, c := range all {
		if id, pod := podOf(root, rules, c, revoke); id != 0 && !known[id] {
			known[id] = true
			errs = append(errs, setPod(root, state, c, id, before[id], pod))
		}
	}
	for id := range before {
		if revoke && !known[id] {
			errs = append(errs, state.SetPod(id, maps.Pod{}))
		}
	}
	return errors.Join(errs...)
}

// setPod sets what holds for a container's pod, whose cgroup has an id.
func setPod(root cgroup.Root, state *maps.State, c container.Container, id uint64, before, now maps.Pod) error {
	if before == now {
		return nil
	}
	err := state.SetPod(id, now)
	rel, _ := cgroup.Pod(c.Cgroup)
	if at, gone := root.ID(rel); gone != nil || at != id {
		// The pod ended before there was an entry to forget.
		return errors.Join(err, state.SetPod(id, maps.Pod{}))
	}
	return err
}

// podOf returns the id of the cgroup of a container's pod, and what holds for all containers of
// the pod; 0 if the container is in none, or no source knows the pod or, unless revoke is set, its network, which
// matters.
func podOf(root cgroup.Root, rules []policy.ContainerRule, c container.Container, revoke bool) (id uint64, is maps.Pod) {
	subject := c.Subject()
	if subject.Namespace == "" {
		return 0, is
	}
	rel, _ := cgroup.Pod(c.Cgroup)
	at, err := root.ID(rel)
	if err != nil {
		return 0, is // it is gone
	}
	rule := policy.RuleForPod(rules, subject)
	if subject.NetworkUnknown && rule == (policy.ContainerRule{}) && !revoke {
		return 0, is
	}
	is.Flags = flagsOf(rule)
	if rule.SMTP != nil {
		is.Limit = *rule.SMTP
	}
	return at, is
}

// flagsOf returns the flags of the containers for which a rule holds.
func flagsOf(rule policy.ContainerRule) maps.Flag {
	flags := maps.FlagsOf(rule.Families)
	if rule.Metadata == policy.Allowed {
		flags |= maps.MayReachMetadata
	}
	return flags
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
	err = state.Configure(c.CgroupID, change)
	now, gone := root.ID(c.Cgroup)
	ended := gone != nil || now != c.CgroupID
	if err != nil {
		if ended {
			return false, nil
		}
		return false, err
	}
	if !existed && ended {
		// The container ended before there was an entry to forget.
		return true, state.Forget(c.CgroupID)
	}
	return true, nil
}

// changeFor returns the change that gives a container what a rule says, and whether a
// change is needed.
func changeFor(c maps.Container, rule policy.ContainerRule) (change maps.Change, needed bool) {
	const byRule = maps.MayReachMetadata | maps.AnyFamily
	change.Flags = flagsOf(rule)
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
