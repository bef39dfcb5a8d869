// Package limiter measures how exact limiters of new mail connections are: how many of the
// SYNs of a flood a server sees.
package limiter

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"time"

	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
	"github.com/egressbpf/egressbpf/internal/test/bench/results"
	"github.com/egressbpf/egressbpf/internal/test/bench/traffic"
)

// Part is the name of this part of a run.
const Part = "limiter"

// Burst is the burst of all limits.
const Burst = 5

// Rates returns all rates.
func Rates() []policy.Rate {
	return []policy.Rate{
		{Count: 5, Period: time.Minute},
		{Count: 60, Period: time.Second},
		{Count: 1000, Period: time.Second},
		{Count: 10_000, Period: time.Second},
	}
}

// Plan says what to measure, and for how long.
type Plan struct {
	Site    *lab.Site
	Filters []lab.Filter
	Wants   func(f lab.Filter, r policy.Rate, cpus int) bool
	Flood   time.Duration
	CPUs    []int
	Log     func(format string, args ...any)
}

// Measure measures. The calling goroutine must be locked to a thread that lives as long as
// this program.
func Measure(p Plan) (all []results.Limiter, err error) {
	for _, rate := range Rates() {
		for _, f := range p.Filters {
			for cpus := 1; cpus <= len(p.CPUs); cpus++ {
				if !p.Wants(f, rate, cpus) {
					continue
				}
				p.Log("limiter: %s, %s, %d CPUs", f, rate, cpus)
				l := results.Limiter{
					Filter: f.Name, PerSecond: float64(rate.Count) / rate.Period.Seconds(), Burst: Burst, CPUs: cpus,
				}
				f.Limit = policy.Limit{Rate: rate, Burst: Burst}
				if err := p.measure(f, &l); err != nil {
					l.Missing = err.Error()
				}
				all = append(all, l)
			}
		}
	}
	return all, nil
}

// measure makes a lab, so that the bucket is full.
func (p Plan) measure(f lab.Filter, l *results.Limiter) (err error) {
	at, err := p.Site.New(f)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, at.Close()) }()
	if err := at.Server.Run(counter, "nft", "-f", "-"); err != nil {
		return err
	}
	w, err := traffic.Start(at, p.CPUs, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.End()) }()
	sent, took, err := w.Flood(p.Flood, l.CPUs)
	if err != nil {
		return err
	}
	// The last may still be on their way.
	time.Sleep(50 * time.Millisecond)
	if l.Admitted, err = count(at.Server); err != nil {
		return err
	}
	l.Asked, l.Seconds = sent, took.Seconds()
	l.Allowed = float64(l.Burst) + l.PerSecond*l.Seconds
	return nil
}

// counter counts SYNs and discards them.
const counter = `
table ip bench {
	counter syns { }
	chain prerouting {
		type filter hook prerouting priority -400; policy accept;
		tcp dport 25 counter name syns drop
	}
}
`

var packets = regexp.MustCompile(`packets (\d+)`)

func count(server *lab.Netns) (int, error) {
	out, err := server.Output("nft", "list", "counter", "ip", "bench", "syns")
	if err != nil {
		return 0, err
	}
	found := packets.FindStringSubmatch(out)
	if found == nil {
		return 0, fmt.Errorf("nft printed no counter: %s", out)
	}
	return strconv.Atoi(found[1])
}
