package policy

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

const (
	maxCount = 1_000_000
	maxBurst = 1_000_000
	// maxFill bounds the time in which an empty bucket fills up. The programs keep it in
	// int64 nanoseconds, which hold 292 years; the rest is left for the clock that it is
	// added to.
	maxFill = 100 * 365 * 24 * time.Hour
)

var periods = []struct {
	name string
	time.Duration
}{
	{"second", time.Second},
	{"minute", time.Minute},
	{"hour", time.Hour},
	{"day", 24 * time.Hour},
}

// Rate is how fast a bucket refills: Count tokens in every Period. The zero
// value means no limit.
type Rate struct {
	Count  uint64        // 1 to 1,000,000
	Period time.Duration // a second, minute, hour or day of 24 hours
}

// ParseRate reads N/second, N/minute, N/hour, N/day or unlimited, N from 1 to
// 1,000,000. A rate of 0 would block mail: it is refused, and the error says which rules
// block mail.
func ParseRate(s string) (Rate, error) {
	if s == "unlimited" {
		return Rate{}, nil
	}
	count, name, _ := strings.Cut(s, "/")
	for _, p := range periods {
		if p.name != name {
			continue
		}
		if n, ok := number(count, 0, maxCount); ok {
			r := Rate{Count: n, Period: p.Duration}
			if err := r.Validate(); err != nil {
				return Rate{}, fmt.Errorf("%q: %w", s, err)
			}
			return r, nil
		}
		return Rate{}, fmt.Errorf("%q: want a number from 1 to %d before the slash", s, maxCount)
	}
	return Rate{}, fmt.Errorf("%q: want N/second, N/minute, N/hour, N/day or unlimited", s)
}

// Unlimited reports whether r is the zero value, which limits nothing.
func (r Rate) Unlimited() bool { return r == Rate{} }

// String returns the form that [ParseRate] reads.
func (r Rate) String() string {
	if r.Unlimited() {
		return "unlimited"
	}
	name := r.Period.String()
	for _, p := range periods {
		if p.Duration == r.Period {
			name = p.name
		}
	}
	return strconv.FormatUint(r.Count, 10) + "/" + name
}

// Validate refuses a rate that [ParseRate] could not have returned.
func (r Rate) Validate() error {
	if r.Unlimited() {
		return nil
	}
	known := false
	for _, p := range periods {
		known = known || p.Duration == r.Period
	}
	switch {
	case !known:
		return fmt.Errorf("period %s: want a second, minute, hour or day", r.Period)
	case r.Count == 0:
		return errors.New("a rate is at least 1; to stop all mail, block it: --block 0.0.0.0/0:25/tcp --block [::/0]:25/tcp, or the same under block in a config file, and so on for each port")
	case r.Count > maxCount:
		return fmt.Errorf("count %d: want 1 to %d", r.Count, maxCount)
	}
	return nil
}

// MarshalText returns [Rate.String], and an error for a rate that is not valid.
func (r Rate) MarshalText() ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, fmt.Errorf("rate %s: %w", r, err)
	}
	return []byte(r.String()), nil
}

// UnmarshalText is [ParseRate].
func (r *Rate) UnmarshalText(text []byte) (err error) {
	*r, err = ParseRate(string(text))
	return err
}

// Limit is a token bucket: it holds Burst tokens (1 to 1,000,000) when full and
// refills continuously at Rate. With an unlimited rate Burst has no effect.
type Limit struct {
	Rate  Rate   `json:"rate" yaml:"rate"`
	Burst uint32 `json:"burst" yaml:"burst"`
}

// Validate refuses a rate or burst out of range, and a pair of them that takes
// longer than 100 years (of 365 days) to fill the bucket.
func (l Limit) Validate() error {
	if err := l.Rate.Validate(); err != nil {
		return fmt.Errorf("rate: %w", err)
	}
	if err := l.validateBurst(); err != nil {
		return fmt.Errorf("burst: %w", err)
	}
	return nil
}

func (l Limit) validateBurst() error {
	if l.Burst < 1 || l.Burst > maxBurst {
		return fmt.Errorf("%d: want 1 to %d", l.Burst, maxBurst)
	}
	if l.Rate.Unlimited() {
		return nil
	}
	// In periods, since burst × period overflows int64 nanoseconds itself.
	if most := uint64(maxFill/l.Rate.Period) * l.Rate.Count; uint64(l.Burst) > most {
		return fmt.Errorf("%d takes more than 100 years to refill at %s: want at most %d", l.Burst, l.Rate, most)
	}
	return nil
}
