package stats

import (
	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Refused counts what was refused, or would have been, in packets and system calls at all
// hooks. Each number is for the reason at its place in [TallyReasons].
type Refused [5]uint64

// TallyReasons are the reasons to refuse, as events have them.
var TallyReasons = [len(Refused{})]string{
	events.ReasonMalformed, events.ReasonBlocked, events.ReasonRateLimited, events.ReasonNoBucket, events.ReasonFamily,
}

// Tally is how much was refused, without all that [Reader.Read] finds out about containers.
type Tally struct {
	Mode policy.Mode // empty if no program holds the policy
	// Total includes containers that are gone, and what no container is known for.
	Total Refused
	// Containers are those to which something was refused, by the ids of their cgroups.
	Containers map[uint64]Refused
}

// Tally returns the present counts. The containers are read after the total: what they have more
// than the total was refused meanwhile.
func (r *Reader) Tally() (*Tally, error) {
	_, p, err := r.filter.Policed()
	if err != nil {
		return nil, err
	}
	var t *Tally
	err = r.current(func(state *maps.State) error {
		t = &Tally{Containers: map[uint64]Refused{}}
		sum, err := state.Totals()
		if err != nil {
			return err
		}
		t.Total = refused(sum)
		known, err := state.Containers()
		if err != nil {
			return err
		}
		for id, c := range known {
			if n := refused(c.Counters); n != (Refused{}) {
				t.Containers[id] = n
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if p != nil {
		t.Mode = p.Mode
	}
	return t, nil
}

// Identify returns the container with a cgroup id, as its row has it.
func (r *Reader) Identify(id uint64) (container.Identity, error) {
	return container.Identify(r.root, id)
}

func refused(c maps.Counters) (n Refused) {
	for i, why := range []bpf.EgressReason{
		bpf.EgressReasonREASON_MALFORMED, bpf.EgressReasonREASON_BLOCKED, bpf.EgressReasonREASON_RATE_LIMITED, bpf.EgressReasonREASON_NO_BUCKET,
	} {
		at := maps.Refused(c, why)
		n[i] = at.Packets + at.Connects + c.HostDropped[why].Packets
	}
	n[4] = c.FamiliesDenied
	return n
}
