package verdict

import (
	"encoding/binary"
	"fmt"
	"math/big"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types Bucket testdata/bucket.bpf.c -- -std=gnu17 -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu

// clock is the time at which the simulations begin, a minute after boot.
const clock = uint64(time.Minute)

// bucket is the programs' token bucket, with a clock that the test sets.
type bucket struct {
	BucketObjects
}

// newBucket returns a bucket that was never used.
func newBucket(t *testing.T) *bucket {
	t.Helper()
	if err := maps.RemoveMemlock(); err != nil {
		t.Fatal(err)
	}
	b := &bucket{}
	if err := LoadBucketObjects(&b.BucketObjects, nil); err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// ask asks for a token at least n times, and returns how many it got. If n is more than 1, it
// may ask more often, where signals interrupt the test run.
func (b *bucket) ask(t *testing.T, l policy.Limit, now uint64, n uint32) (taken int64) {
	t.Helper()
	input, err := binary.Append(binary.NativeEndian.AppendUint64(nil, now), binary.NativeEndian, maps.LimitOf(l))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Taken.Set(uint64(0)); err != nil {
		t.Fatal(err)
	}
	last, err := b.Take.Run(&ebpf.RunOptions{Data: input, Repeat: n})
	if err != nil {
		t.Fatal(err)
	}
	// Looking at the bucket must not refuse a token that the bucket gives. Unless the limit
	// has just changed, it should refuse all others.
	if last != 1 && last != 2 {
		t.Errorf("at %d: took a token: %t; seemed empty before: %t", now, last&1 != 0, last&2 != 0)
	}
	if err := b.Taken.Get(&taken); err != nil {
		t.Fatal(err)
	}
	return taken
}

// drain asks until the bucket is empty.
func (b *bucket) drain(t *testing.T, l policy.Limit, now uint64) int64 {
	t.Helper()
	return b.ask(t, l, now, l.Burst+2)
}

// exactBucket is a token bucket as it should be.
type exactBucket struct {
	rate, burst *big.Rat // tokens in a nanosecond; tokens
	tokens      *big.Rat
	at          uint64
}

func newExactBucket(l policy.Limit, now uint64) *exactBucket {
	burst := ratio(int64(l.Burst), 1)
	return &exactBucket{ratio(int64(l.Rate.Count), int64(l.Rate.Period)), burst, burst, now}
}

func ratio(a, b int64) *big.Rat { return big.NewRat(a, b) }

func times(a, b *big.Rat) *big.Rat { return new(big.Rat).Mul(a, b) }
func plus(a, b *big.Rat) *big.Rat  { return new(big.Rat).Add(a, b) }
func minus(a, b *big.Rat) *big.Rat { return new(big.Rat).Sub(a, b) }
func over(a, b *big.Rat) *big.Rat  { return new(big.Rat).Quo(a, b) }

func floor(r *big.Rat) int64 { return new(big.Int).Div(r.Num(), r.Denom()).Int64() }

func (e *exactBucket) pass(now uint64) {
	e.tokens = plus(e.tokens, times(e.rate, ratio(int64(now-e.at), 1)))
	if e.tokens.Cmp(e.burst) > 0 {
		e.tokens = e.burst
	}
	e.at = now
}

// take takes up to n tokens and returns how many.
func (e *exactBucket) take(now uint64, n int64) int64 {
	e.pass(now)
	n = min(n, max(0, floor(e.tokens)))
	e.tokens = minus(e.tokens, ratio(n, 1))
	return n
}

// next returns the first nanosecond in which there is a token.
func (e *exactBucket) next() uint64 {
	wait := over(minus(ratio(1, 1), e.tokens), e.rate)
	if wait.Sign() <= 0 {
		return e.at
	}
	whole := floor(wait)
	if !wait.IsInt() {
		whole++
	}
	return e.at + uint64(whole)
}

// taken is how many tokens a bucket gave at a moment.
type taken struct {
	at uint64
	n  int64
}

// checkWindows compares the tokens that were taken between any two moments, inclusive, with
// what burst and rate allow.
func checkWindows(t *testing.T, l policy.Limit, log []taken) {
	t.Helper()
	e := newExactBucket(l, 0)
	total := ratio(0, 1)
	var least *big.Rat // of the tokens before a moment, less the rate up to it
	for _, moment := range log {
		refill := times(e.rate, ratio(int64(moment.at), 1))
		if before := minus(total, refill); least == nil || before.Cmp(least) < 0 {
			least = before
		}
		total = plus(total, ratio(moment.n, 1))
		excess := minus(minus(minus(total, refill), least), e.burst)
		if excess.Sign() > 0 {
			f, _ := excess.Float64()
			t.Errorf("in a window up to %d: %g tokens over burst + rate·t", moment.at, f)
			return
		}
	}
}

// bucketLimits are limits of all magnitudes.
func bucketLimits(t *testing.T) (limits []policy.Limit) {
	t.Helper()
	for _, rate := range []string{"1/day", "5/minute", "7/minute", "1000/second", "999999/second", "1000000/day"} {
		for _, burst := range []uint32{1, 5, 1_000_000} {
			r, err := policy.ParseRate(rate)
			if err != nil {
				t.Fatal(err)
			}
			l := policy.Limit{Rate: r, Burst: burst}
			if l.Validate() != nil {
				l.Burst = 36500 // what fills up in 100 years is the largest
			}
			limits = append(limits, l)
		}
	}
	return limits
}

// simulation is a bucket and the exact bucket, at one moment.
type simulation struct {
	*bucket
	*exactBucket
	limit policy.Limit
	now   uint64
	log   []taken
}

func simulate(t *testing.T, run func(*testing.T, *simulation)) {
	t.Helper()
	for _, l := range bucketLimits(t) {
		t.Run(fmt.Sprintf("%s burst %d", l.Rate, l.Burst), func(t *testing.T) {
			s := &simulation{newBucket(t), newExactBucket(l, clock), l, clock, nil}
			defer func() { checkWindows(t, l, s.log) }()
			run(t, s)
		})
	}
}

func (s *simulation) expect(t *testing.T, what string, got, want int64) {
	t.Helper()
	s.log = append(s.log, taken{s.now, got})
	if got != want {
		t.Fatalf("%s at %d: took %d, want %d", what, s.now, got, want)
	}
}

// one asks for one token; all asks for all tokens.
func (s *simulation) one(t *testing.T, what string) {
	t.Helper()
	s.expect(t, what, s.ask(t, s.limit, s.now, 1), s.take(s.now, 1))
}

func (s *simulation) all(t *testing.T, what string) {
	t.Helper()
	s.expect(t, what, s.drain(t, s.limit, s.now), s.take(s.now, 1<<62))
}

// token is the time for one token, in nanoseconds rounded down.
func (s *simulation) token() int64 { return floor(over(ratio(1, 1), s.rate)) }

// TestBucket compares the bucket with the exact bucket, to the token: asked at the moment when
// there is a token and one nanosecond before, after a long pause, and at random.
func TestBucket(t *testing.T) {
	simulate(t, func(t *testing.T, s *simulation) {
		s.all(t, "full")
		for range 1000 {
			s.now = s.next() - 1
			s.one(t, "too early")
			s.now++
			s.one(t, "in time")
		}
		full := floor(over(s.burst, s.rate)) // what it takes to fill it
		for _, idle := range []int64{full / 2, full + 2} {
			s.now += uint64(idle)
			s.all(t, "after a rest")
		}
		random := rand.New(rand.NewPCG(uint64(s.limit.Burst), s.limit.Rate.Count))
		for range 1000 {
			switch random.IntN(4) {
			case 0: // at the same moment
			case 1:
				s.now = s.next()
			default:
				s.now += uint64(random.Int64N(2 * s.token()))
			}
			s.one(t, "at random")
		}
	})
}

// TestBucketLateCPU simulates a CPU that reads the clock and then gets the lock after CPUs with
// a later time. It may be refused a token that is there. It must not get a token that is not
// there, nor leave one to others.
func TestBucketLateCPU(t *testing.T) {
	simulate(t, func(t *testing.T, s *simulation) {
		s.all(t, "full")
		start := s.now
		random := rand.New(rand.NewPCG(uint64(s.limit.Burst), s.limit.Rate.Count))
		for range 1000 {
			s.now += uint64(random.Int64N(2 * s.token()))
			s.one(t, "in time")
			for _, late := range []uint64{1, 10, uint64(s.token()) / 2, uint64(s.token()) + 3, 5 * uint64(s.token())} {
				if late > s.now-start {
					continue
				}
				if got := s.ask(t, s.limit, s.now-late, 1); got > 0 {
					s.expect(t, fmt.Sprintf("%d ns late", late), got, s.take(s.now, 1))
				}
			}
			s.one(t, "after late CPUs")
		}
	})
}

// TestBucketUnlimited takes any number of tokens at any time.
func TestBucketUnlimited(t *testing.T) {
	b := newBucket(t)
	for _, now := range []uint64{0, clock, clock, 1 << 62} {
		if got := b.ask(t, policy.Limit{Burst: 1}, now, 1000); got < 1000 {
			t.Errorf("at %d: took %d of 1000", now, got)
		}
	}
}

// TestBucketChange changes the limit of a bucket in use. Missing tokens stay missing, within a
// fraction of a token, and come back at the new rate. No more than the new burst can be
// missing.
func TestBucketChange(t *testing.T) {
	limits := []policy.Limit{}
	for _, rate := range []policy.Rate{{Count: 1, Period: 24 * time.Hour}, {Count: 7, Period: time.Minute}, {Count: 1000, Period: time.Second}, {Count: 999_999, Period: time.Second}} {
		for _, burst := range []uint32{1, 5, 1000} {
			limits = append(limits, policy.Limit{Rate: rate, Burst: burst})
		}
	}
	for _, from := range limits {
		for _, to := range limits {
			if from == to {
				continue
			}
			for _, spend := range []uint32{1, from.Burst / 2, from.Burst} {
				name := fmt.Sprintf("%d of %s burst %d to %s burst %d", spend, from.Rate, from.Burst, to.Rate, to.Burst)
				t.Run(name, func(t *testing.T) { testBucketChange(t, from, to, spend) })
			}
		}
	}
}

func testBucketChange(t *testing.T, from, to policy.Limit, spend uint32) {
	b, now := newBucket(t), clock
	before := newExactBucket(from, now)
	for range spend {
		before.take(now, b.ask(t, from, now, 1))
	}
	// A third of a token later.
	now += uint64(from.Rate.Period) / from.Rate.Count / 3
	before.pass(now)
	missing := minus(before.burst, before.tokens)

	kept := new(big.Rat)
	if e := newExactBucket(to, now); missing.Cmp(e.burst) < 0 {
		kept = minus(e.burst, missing)
	}
	most, least := newExactBucket(to, now), newExactBucket(to, now)
	most.tokens = plus(kept, ratio(1, 1<<15))
	least.tokens = minus(kept, ratio(1, 100))

	got := b.drain(t, to, now)
	if got > floor(most.tokens) || got < floor(least.tokens) {
		t.Fatalf("took %d at once, want %s", got, kept.FloatString(6))
	}
	most.tokens, least.tokens = minus(most.tokens, ratio(got, 1)), minus(least.tokens, ratio(got, 1))
	for i := range 10 {
		early, late := most.next(), least.next()
		got := int64(0)
		for _, at := range []uint64{now + (early-now)/2, early - 1} {
			if at > most.at && at < early {
				if got = b.ask(t, to, at, 1); got > 0 {
					t.Fatalf("token %d: there %d ns after the change, want %d", i, at-now, early-now)
				}
			}
		}
		if got = b.ask(t, to, late, 1); got == 0 {
			t.Fatalf("token %d: not there %d ns after the change, want %d", i, late-now, early-now)
		}
		for _, e := range []*exactBucket{most, least} {
			e.pass(late)
			e.tokens = minus(e.tokens, ratio(1, 1))
		}
	}
}
