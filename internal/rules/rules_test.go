package rules

import (
	"testing"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Whoever sets a limit by hand while a rule is being applied is not overruled.
func TestLimitSetMeanwhile(t *testing.T) {
	state, err := maps.CreateState()
	if err != nil {
		t.Fatal(err)
	}
	defer state.Close()
	const id = 1 << 60
	rule := policy.ContainerRule{SMTP: &policy.Limit{Rate: policy.Rate{Count: 1, Period: 60e9}, Burst: 1}, Metadata: policy.Allowed, Families: "packet"}
	change, needed := changeFor(maps.Container{}, rule)
	if !needed {
		t.Fatal("the rule changes nothing")
	}
	byHand := policy.Limit{Rate: policy.Rate{Count: 7, Period: 60e9}, Burst: 7}
	if err := state.SetLimit(id, byHand); err != nil {
		t.Fatal(err)
	}
	if err := state.Configure(id, change); err != nil {
		t.Fatal(err)
	}
	known, err := state.Containers()
	if err != nil {
		t.Fatal(err)
	}
	if c := known[id]; maps.PolicyLimit(c.Limit) != byHand || c.Flags != maps.LimitSetByHand|maps.MayReachMetadata|maps.FlagsOf("packet") {
		t.Errorf("got %+v, flags %b", maps.PolicyLimit(c.Limit), c.Flags)
	}
	if err := state.UnsetLimit(id); err != nil {
		t.Fatal(err)
	}
	if err := state.Configure(id, change); err != nil {
		t.Fatal(err)
	}
	if known, err = state.Containers(); err != nil || maps.PolicyLimit(known[id].Limit) != *rule.SMTP {
		t.Errorf("got %+v, %v, want the rule's limit", known[id], err)
	}
}
