package traffic

import (
	"slices"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
)

// Sensible says whether it makes sense to measure an operation with a filter in force.
func Sensible(op Operation, f lab.Filter) bool {
	many := f.Containers > 1 || f.Prefixes > 1
	switch op.Name {
	case UDPBeside, RoundTripBeside, UDPInto, RoundTripInto:
		// Filters of one container's cgroup do not see it; others do not differ by how
		// many containers there are.
		return !many && f.Name != lab.IPAddressDeny
	case RefusedConnect, RefusedSocket:
		if f.Prefixes > 1 {
			return false
		}
	case RefusedMail, RefusedSYN:
		if f.Name == lab.IPAddressDeny {
			return false
		}
	}
	if op.Refused && slices.Contains([]string{lab.EmptyPrograms, lab.EmptyNetfilter, lab.HostAlone, lab.NoneLegacy}, f.Name) {
		return false
	}
	if op.CPUs > 1 {
		return !many && f.Name != lab.EmptyNetfilter && f.Name != lab.HostAlone
	}
	return true
}

// Quick says whether an operation with a filter in force is part of a quick run.
func Quick(op Operation, f lab.Filter) bool {
	if op.CPUs > 1 {
		return false
	}
	switch f.Name {
	case lab.None, lab.EmptyPrograms, lab.Rules:
	case lab.Egressbpf:
		if f.Containers > 1 {
			return false
		}
	case lab.RulesByContainer:
		return f.Containers == 100 && op.Name == UDP4
	default:
		return false
	}
	switch op.Name {
	case UDP4, RoundTrip4, RefusedConnect, RefusedSYN:
		return true
	}
	return false
}
