package maps

import (
	"net/netip"

	"github.com/egressbpf/egressbpf/bpf"
)

// Seen is what a container was not refused because the mode is audit: how often it asked for a
// destination, and when first and last, in nanoseconds of CLOCK_MONOTONIC.
type Seen struct {
	// Container is the id of the container's cgroup.
	Container   uint64
	Destination netip.AddrPort
	Protocol    uint8
	Reason      bpf.EgressReason
	Count       uint64
	First, Last uint64
}
