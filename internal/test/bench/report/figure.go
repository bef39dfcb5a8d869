package report

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// figure is a number that was derived for each round.
type figure struct {
	median float64
	q1, q3 float64 // half of the rounds are between them
	// low and high are the bounds of the median, with a confidence of 95 percent. With too
	// few rounds for that, they are the least and the greatest value.
	low, high float64
	rounds    int
}

func summarise(values []float64) figure {
	all := slices.Sorted(slices.Values(values))
	f := figure{median: quantile(all, 0.5), q1: quantile(all, 0.25), q3: quantile(all, 0.75), rounds: len(all)}
	k := outside(len(all))
	f.low, f.high = all[k], all[len(all)-1-k]
	return f
}

// quantile interpolates between the values next to it.
func quantile(sorted []float64, q float64) float64 {
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 == len(sorted) || sorted[i] == sorted[i+1] {
		return sorted[i]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// outside is how many of n sorted values, at each end, may be left out so that the median of
// what they were drawn from is among the others with a probability of at least 95 percent.
// This is the sign test: each value is below that median with a probability of one half,
// whatever the distribution.
func outside(n int) int {
	below := 0.0 // the probability that at most k values are below the median
	term := math.Pow(0.5, float64(n))
	for k := range n {
		below += term
		if 2*below > 0.05 {
			return max(0, k-1)
		}
		term *= float64(n-k) / float64(k+1)
	}
	return 0
}

// format is how the values of one kind are written.
type format func(float64) string

func (f figure) text(as format) string { return as(f.median) + " " + f.spread(as) }

// spread is the quartiles, in brackets.
func (f figure) spread(as format) string { return fmt.Sprintf("(%s to %s)", as(f.q1), as(f.q3)) }

// decimal writes a number with thousands separated.
func decimal(v float64, places int) string {
	if math.IsInf(v, 0) {
		return strings.TrimPrefix(fmt.Sprintf("%+.0f", v), "+")
	}
	text := strconv.FormatFloat(math.Abs(v), 'f', places, 64)
	whole, rest, _ := strings.Cut(text, ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if rest != "" {
		whole += "." + rest
	}
	if v < 0 && strings.Trim(whole, "0.,") != "" {
		whole = "−" + whole
	}
	return whole
}

// number writes about three digits.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 100 || a == 0:
		return decimal(v, 0)
	case a >= 1:
		return decimal(v, 1)
	}
	return decimal(v, 2)
}

// nanoseconds writes a time without its unit.
func nanoseconds(v float64) string {
	if math.Abs(v) >= 100 {
		return decimal(v, 0)
	}
	return decimal(v, 1)
}

func signed(as format) format {
	return func(v float64) string {
		if text := as(v); v <= 0 || strings.Trim(text, "0.,") == "" {
			return text
		}
		return "+" + as(v)
	}
}

func ratio(v float64) string {
	if math.Abs(v) >= 10 {
		return decimal(v, 1)
	}
	return decimal(v, 3)
}

// percent writes a ratio as what it is more or less than 1.
func percent(ratio float64) string {
	return percentage(100 * math.Abs(ratio-1))
}

func percentage(v float64) string {
	if math.Abs(v) < 1 {
		return decimal(v, 2) + " %"
	}
	return decimal(v, 1) + " %"
}

// plain writes what was chosen, not measured.
func plain(v float64) string { return strconv.FormatFloat(v, 'g', 6, 64) }

// quantity writes a value with the unit that suits its size.
func quantity(unit string) format {
	return func(v float64) string {
		type step struct {
			least float64
			name  string
		}
		var steps []step
		switch strings.ToLower(unit) {
		case "ns":
			steps = []step{{1e9, "s"}, {1e6, "ms"}, {1e3, "µs"}}
		case "b", "byte", "bytes":
			unit = "bytes"
			steps = []step{{1 << 20, "MiB"}, {1 << 10, "KiB"}}
		}
		for _, s := range steps {
			if math.Abs(v) >= s.least {
				return number(v/s.least) + " " + s.name
			}
		}
		return strings.TrimSpace(number(v) + " " + unit)
	}
}

func count(n int, noun string) string {
	switch {
	case n == 1:
	case strings.HasSuffix(noun, "x"):
		noun += "es"
	default:
		noun += "s"
	}
	return decimal(float64(n), 0) + " " + noun
}
