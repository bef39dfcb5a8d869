package maps

import (
	"fmt"
	"math"
	"math/bits"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// LimitOf returns l in the form that the programs use.
func LimitOf(l policy.Limit) bpf.EgressLimit {
	out := bpf.EgressLimit{Burst: l.Burst, Period: uint32(l.Rate.Period / time.Second)}
	if l.Rate.Unlimited() {
		return out
	}
	period := uint64(l.Rate.Period)
	out.Count = uint32(l.Rate.Count)
	out.Interval = period / l.Rate.Count
	out.Rest = uint32(period % l.Rate.Count)
	// Validated limits span at most 100 years, so the quotient fits.
	hi, lo := bits.Mul64(uint64(l.Burst-1), period)
	out.Tolerance, _ = bits.Div64(hi, lo, l.Rate.Count)
	return out
}

// PolicyLimit is the inverse of LimitOf.
func PolicyLimit(l bpf.EgressLimit) policy.Limit {
	if l.Count == 0 {
		return policy.Limit{Burst: l.Burst}
	}
	return policy.Limit{
		Rate:  policy.Rate{Count: uint64(l.Count), Period: time.Duration(l.Period) * time.Second},
		Burst: l.Burst,
	}
}

// Now returns CLOCK_MONOTONIC in nanoseconds, as the programs read it.
func Now() (uint64, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0, fmt.Errorf("read the clock: %w", err)
	}
	return uint64(now.Nano()), nil
}

// Tokens returns how many tokens b holds under the limit l at the time now, in nanoseconds
// of CLOCK_MONOTONIC: at most l.Burst, and +Inf if l is unlimited.
func Tokens(b bpf.EgressBucket, l bpf.EgressLimit, now uint64) float64 {
	if l.Count == 0 {
		return math.Inf(1)
	}
	missing := 0.0
	if b.Count != 0 && b.FullAt > now {
		// Counted in tokens of the limit under which the bucket was last used: a
		// new limit takes over the tokens that are missing, not the time.
		missing = float64(b.FullAt-now) / (float64(b.Interval) + 1e-9)
	}
	return max(0, float64(l.Burst)-missing)
}
