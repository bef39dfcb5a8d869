package maps

import (
	"testing"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// What the flags of a container open is what was asked for, and nothing else.
func TestFamilyFlags(t *testing.T) {
	for _, want := range []policy.Families{policy.Restrict, policy.AnyFamily, "packet", "ax25", "mctp", "bluetooth,packet,vsock"} {
		if got := FamiliesOf(FlagsOf(want) | MayReachMetadata | LimitSetByHand); got != want {
			t.Errorf("%s becomes %s", want, got)
		}
	}
	if FlagsOf("") != 0 || FlagsOf(policy.AnyFamily) != AnyFamily || AnyFamily&(MayReachMetadata|LimitSetByHand) != 0 {
		t.Errorf("got %b for none, %b for any", FlagsOf(""), FlagsOf(policy.AnyFamily))
	}
	// These are in the state of hosts that run, and must not move.
	for families, want := range map[policy.Families]Flag{"ax25": 1 << 2, "packet": 1 << 9, "mctp": 1 << 30} {
		if got := FlagsOf(families); got != want {
			t.Errorf("%s: got %b, want %b", families, got, want)
		}
	}
	for number, flag := range FamilyFlags() {
		if flag == 0 {
			t.Errorf("family %d needs no flag", number)
		}
	}
}
