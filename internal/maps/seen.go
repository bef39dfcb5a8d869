package maps

import (
	"fmt"
	"math/bits"
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
	// Family is that of a socket that would have been refused, which has no Destination.
	Family      uint16
	Reason      bpf.EgressReason
	Count       uint64
	First, Last uint64
	// Most is at least how often it asked within any minute.
	Most uint64
}

// Seen returns what mode audit has let through, as far as there was room to note it: what was
// noted long ago makes room for what is new. What the host side let through is not part of it.
func (s *State) Seen() (all []Seen, err error) {
	m := s.byName[bpf.EgressMapSeen]
	if m == nil {
		return nil, nil
	}
	var (
		key   bpf.EgressSeenKey
		value bpf.EgressSighting
	)
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		s := Seen{
			Container: key.Container,
			Protocol:  uint8(key.Proto),
			Family:    key.Family,
			Reason:    bpf.EgressReason(key.Reason),
			Count:     value.Count, First: value.First, Last: value.Last, Most: value.Most,
		}
		if s.Reason != bpf.EgressReasonREASON_FAMILY {
			s.Destination = netip.AddrPortFrom(netip.AddrFrom16(key.Dst).Unmap(), bits.ReverseBytes16(key.Dport))
		}
		all = append(all, s)
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read map %s: %w", bpf.EgressMapSeen, err)
	}
	return all, nil
}
