// Package traffic measures what real packets cost with one filter and another in force.
//
// Each filter has a host of its own, with a container (package lab). All hosts exist at the
// same time, and operations are done in slices of a few milliseconds, which go around the
// hosts in random order: nothing is attached or detached in between, and what disturbs the
// machine disturbs all of them. A worker in each lab does them, on one CPU, both ends of a
// connection in one thread: a wake-up on another CPU would cost more than any filter.
//
// The cost of a program depends on where the kernel has put it. So everything is made anew in
// each round, and a round gives one value.
package traffic

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
	"github.com/egressbpf/egressbpf/internal/test/bench/results"
)

// Part is the name of this part of a run.
const Part = "traffic"

// Plan says what to measure, and for how long.
type Plan struct {
	Site    *lab.Site
	Filters []lab.Filter
	// Wants chooses operations for a filter.
	Wants func(Operation, lab.Filter) bool
	// Replicas is how many labs a filter has. The mean of them counts.
	Replicas func(lab.Filter) int
	Rounds   int
	// Slices is how many slices of each operation a round has for each filter.
	Slices int
	Slice  time.Duration
	// CPUs are those to use. Operations that need more are left out.
	CPUs []int
	Log  func(format string, args ...any)
}

// cost is an operation with a filter in force.
type cost struct {
	operation Operation
	filter    int
	results.Cost
}

// Measure measures. The calling goroutine must be locked to a thread that lives as long as
// this program.
func Measure(p Plan) ([]results.Cost, error) {
	var costs []*cost
	for _, op := range Operations() {
		for i, f := range p.Filters {
			if op.CPUs > len(p.CPUs) || !p.Wants(op, f) {
				continue
			}
			costs = append(costs, &cost{operation: op, filter: i, Cost: results.Cost{
				Part: Part, Operation: op.Name, Filter: f.Name, Containers: f.Containers, Prefixes: f.Prefixes,
				CPUs: op.CPUs, Unit: "ns", Samples: []float64{},
			}})
		}
	}
	if len(costs) == 0 {
		return nil, nil
	}
	missing := make([]string, len(p.Filters))
	for round := range p.Rounds {
		p.Log("traffic: round %d of %d", round+1, p.Rounds)
		if err := p.round(costs, missing); err != nil {
			return nil, err
		}
	}
	var all []results.Cost
	for _, c := range costs {
		c.Missing = missing[c.filter]
		all = append(all, c.Cost)
	}
	return all, nil
}

// host is a lab with its worker.
type host struct {
	filter int
	lab    *lab.Lab
	*Process
}

// round makes all labs, measures each cost once, and removes the labs.
func (p Plan) round(costs []*cost, missing []string) (err error) {
	var hosts []*host
	defer func() {
		for _, h := range hosts {
			if h.Process != nil {
				err = errors.Join(err, h.End())
			}
			err = errors.Join(err, h.lab.Close())
		}
	}()
	// In random order, so that none is always placed first.
	for _, i := range p.order() {
		var names []string
		for _, c := range costs {
			if c.filter == i {
				names = append(names, c.Operation)
			}
		}
		if len(names) == 0 || missing[i] != "" {
			continue
		}
		l, err := p.Site.New(p.Filters[i])
		if err != nil && p.Filters[i].Name != lab.None {
			// This machine cannot have it.
			missing[i] = err.Error()
			p.Log("traffic: without %v", err)
			continue
		}
		if err != nil {
			return err
		}
		h := &host{filter: i, lab: l}
		hosts = append(hosts, h)
		if h.Process, err = Start(l, p.CPUs, names); err != nil {
			return err
		}
	}
	settle()
	for _, op := range Operations() {
		var now []*cost
		for _, c := range costs {
			if c.Operation == op.Name && c.CPUs == op.CPUs && missing[c.filter] == "" {
				now = append(now, c)
			}
		}
		if err := p.slices(now, hosts); err != nil {
			return err
		}
	}
	return nil
}

// order returns the number of each filter, as often as it has labs, in random order.
func (p Plan) order() (order []int) {
	for i, f := range p.Filters {
		order = append(order, slices.Repeat([]int{i}, p.Replicas(f))...)
	}
	rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	return order
}

// turn is an operation in a lab.
type turn struct {
	*cost
	*host
	n    int // in a slice
	took []float64
}

// slices does an operation in all labs, in turns.
func (p Plan) slices(costs []*cost, hosts []*host) error {
	var turns []*turn
	for _, c := range costs {
		for _, h := range hosts {
			if h.filter != c.filter {
				continue
			}
			n, err := p.calibrate(h.Process, c.operation)
			if err != nil {
				return fmt.Errorf("%s: %w", h.lab.Filter, err)
			}
			turns = append(turns, &turn{cost: c, host: h, n: n})
		}
	}
	for range p.Slices {
		for _, i := range rand.Perm(len(turns)) {
			t := turns[i]
			// Another lab had the CPU and its caches, as no other host has.
			if _, err := t.do(t.operation, t.n/3); err != nil {
				return fmt.Errorf("%s: %w", t.lab.Filter, err)
			}
			ns, err := t.do(t.operation, t.n)
			if err != nil {
				return fmt.Errorf("%s: %w", t.lab.Filter, err)
			}
			t.took = append(t.took, ns)
		}
	}
	for _, c := range costs {
		sum, n := 0.0, 0
		for _, t := range turns {
			if t.cost == c {
				sum += Median(t.took)
				n++
			}
		}
		c.Samples = append(c.Samples, sum/float64(n))
	}
	return nil
}

// calibrate returns how often the operation can be done in a slice. It empties the buckets,
// too.
func (p Plan) calibrate(w *Process, op Operation) (int, error) {
	const first = 50
	if _, err := w.do(op, first); err != nil {
		return 0, err
	}
	ns, err := w.do(op, first)
	if err != nil {
		return 0, err
	}
	return max(int(float64(p.Slice.Nanoseconds())/ns), 1), nil
}

// Median returns the median, and sorts.
func Median(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}
