package maps_test

import (
	"math"
	"math/big"
	"testing"
	"time"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

const day = 24 * time.Hour

// limits are valid ones, up to the extremes.
func limits(t *testing.T) (all []policy.Limit) {
	for _, period := range []time.Duration{time.Second, time.Minute, time.Hour, day} {
		for _, count := range []uint64{1, 2, 3, 5, 7, 28, 1000, 999_999, 1_000_000} {
			for _, burst := range []uint32{1, 2, 5, 36_500, 999_999, 1_000_000} {
				l := policy.Limit{Rate: policy.Rate{Count: count, Period: period}, Burst: burst}
				if l.Validate() == nil {
					all = append(all, l)
				}
			}
		}
	}
	for _, l := range []policy.Limit{
		{Rate: policy.Rate{Count: 1, Period: day}, Burst: 36_500},
		{Rate: policy.Rate{Count: 28, Period: day}, Burst: 1_000_000},
	} {
		if err := l.Validate(); err != nil {
			t.Fatalf("an extreme that should be valid: %v", err)
		}
		all = append(all, l)
	}
	return all
}

func TestLimitOf(t *testing.T) {
	for _, l := range limits(t) {
		got := maps.LimitOf(l)
		period := uint64(l.Rate.Period)
		if got.Interval*uint64(got.Count)+uint64(got.Rest) != period || uint64(got.Rest) >= l.Rate.Count {
			t.Errorf("%v: %d tokens of %d ns and a rest of %d are not the period", l.Rate, got.Count, got.Interval, got.Rest)
		}
		tolerance := new(big.Int).Mul(big.NewInt(int64(l.Burst-1)), new(big.Int).SetUint64(period))
		tolerance.Div(tolerance, new(big.Int).SetUint64(l.Rate.Count))
		if !tolerance.IsUint64() || got.Tolerance != tolerance.Uint64() {
			t.Errorf("%v, burst %d: got tolerance %d, want %d", l.Rate, l.Burst, got.Tolerance, tolerance)
		}
		// Added to a clock that has run for a century, it is still no overflow.
		if got.Tolerance+got.Interval > math.MaxInt64-uint64(100*365*day) {
			t.Errorf("%v, burst %d: tolerance %d is too large to add to a clock", l.Rate, l.Burst, got.Tolerance)
		}
		if back := maps.PolicyLimit(got); back != l {
			t.Errorf("got %+v back, want %+v", back, l)
		}
	}
}

func TestUnlimited(t *testing.T) {
	l := policy.Limit{Burst: 5}
	got := maps.LimitOf(l)
	if want := (bpf.EgressLimit{Burst: 5}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if back := maps.PolicyLimit(got); back != l {
		t.Errorf("got %+v back, want %+v", back, l)
	}
	if tokens := maps.Tokens(bpf.EgressBucket{Count: 5, Interval: 1, FullAt: 1 << 60}, got, 0); !math.IsInf(tokens, 1) {
		t.Errorf("got %v tokens, want no limit", tokens)
	}
}

func TestTokens(t *testing.T) {
	const now = 1_000_000_000_000
	for _, l := range limits(t) {
		limit := maps.LimitOf(l)
		burst := float64(l.Burst)
		// used returns the bucket after some tokens were taken from a full one.
		used := func(taken float64) bpf.EgressBucket {
			return bpf.EgressBucket{
				Count:    limit.Count,
				Interval: limit.Interval,
				FullAt:   now + uint64(taken*float64(l.Rate.Period)/float64(l.Rate.Count)),
			}
		}
		for _, tt := range []struct {
			name   string
			bucket bpf.EgressBucket
			want   float64
		}{
			{"never used", bpf.EgressBucket{}, burst},
			{"never used, and not zero", bpf.EgressBucket{Interval: 1, FullAt: 2 * now}, burst},
			{"full again", bpf.EgressBucket{Count: limit.Count, Interval: limit.Interval, FullAt: now}, burst},
			{"full long ago", bpf.EgressBucket{Count: limit.Count, Interval: limit.Interval, FullAt: 1}, burst},
			{"half a token taken", used(0.5), burst - 0.5},
			{"one taken", used(1), burst - 1},
			{"half empty", used(burst / 2), burst / 2},
			{"empty", used(burst), 0},
			{"shrunk to less than is missing", used(burst + 3), 0},
		} {
			// A bucket does not keep the fraction of a nanosecond in its interval.
			if got := maps.Tokens(tt.bucket, limit, now); math.Abs(got-tt.want) > 1e-6+burst/1000 || got < 0 || got > burst {
				t.Errorf("%v, burst %v, %s: got %v tokens, want %v", l.Rate, burst, tt.name, got, tt.want)
			}
		}
	}
}

// A new limit takes over the tokens that are missing, at its own pace.
func TestTokensAfterLimitChanged(t *testing.T) {
	old := maps.LimitOf(policy.Limit{Rate: policy.Rate{Count: 1, Period: time.Hour}, Burst: 5})
	bucket := bpf.EgressBucket{Count: old.Count, Interval: old.Interval, FullAt: uint64(3 * time.Hour)} // 3 missing
	for _, tt := range []struct {
		limit policy.Limit
		want  float64
	}{
		{policy.Limit{Rate: policy.Rate{Count: 100, Period: time.Second}, Burst: 5}, 2},
		{policy.Limit{Rate: policy.Rate{Count: 1, Period: day}, Burst: 10}, 7},
		{policy.Limit{Rate: policy.Rate{Count: 1, Period: day}, Burst: 2}, 0},
	} {
		if got := maps.Tokens(bucket, maps.LimitOf(tt.limit), 0); math.Abs(got-tt.want) > 1e-6 {
			t.Errorf("%v, burst %d: got %v tokens, want %v", tt.limit.Rate, tt.limit.Burst, got, tt.want)
		}
	}
}
