package report

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/egressbpf/egressbpf/internal/test/bench/results"
)

// data finds costs, and derives numbers from them.
type data struct {
	results.Results
}

// newData checks what the derived numbers rely on.
func newData(r results.Results) (data, error) {
	type key struct {
		part, operation, filter string
		containers, prefixes    int
		cpus                    int
	}
	seen := map[key]bool{}
	for i := range r.Costs {
		c := &r.Costs[i]
		c.CPUs = max(1, c.CPUs)
		k := key{c.Part, c.Operation, c.Filter, c.Containers, c.Prefixes, c.CPUs}
		if seen[k] {
			return data{}, fmt.Errorf("the results have %+v twice", k)
		}
		seen[k] = true
		if len(c.Samples) == 0 && c.Missing == "" {
			c.Missing = "the results do not say why"
		}
	}
	return data{r}, nil
}

// few is the number of containers of a cost if any will do: the lowest that was measured.
const few = -1

// find returns a cost that was measured, with the fewest prefixes. Otherwise the error says why there is none.
func (d data) find(part, operation, filter string, containers, cpus int) (results.Cost, error) {
	var found []results.Cost
	for _, c := range d.Costs {
		if c.Part == part && c.Operation == operation && c.Filter == filter && c.CPUs == cpus &&
			(containers == few || c.Containers == containers) {
			found = append(found, c)
		}
	}
	slices.SortStableFunc(found, func(a, b results.Cost) int {
		return cmp.Or(cmp.Compare(a.Containers, b.Containers), cmp.Compare(a.Prefixes, b.Prefixes))
	})
	for _, c := range found {
		if len(c.Samples) > 0 {
			return c, nil
		}
	}
	if len(found) > 0 {
		return results.Cost{}, fmt.Errorf("%s: %s", filter, found[0].Missing)
	}
	what := filter
	if containers > 1 {
		what += " with " + count(containers, "container")
	}
	return results.Cost{}, fmt.Errorf("the results have no “%s” for “%s”", what, operation)
}

// beside finds the cost of another filter for the same operation: with as many containers if
// that was measured, else with the fewest.
func (d data) beside(c results.Cost, filter string) (results.Cost, error) {
	if other, err := d.find(c.Part, c.Operation, filter, c.Containers, c.CPUs); err == nil {
		return other, nil
	}
	return d.find(c.Part, c.Operation, filter, few, c.CPUs)
}

// noFilter finds the cost of the same operation with no filter. The rules of iptables-legacy
// are measured with Docker's own rules in iptables-legacy too, and compared with those alone.
func (d data) noFilter(c results.Cost) (results.Cost, error) {
	if c.Filter == legacyRules {
		if base, err := d.beside(c, noneLegacy); err == nil {
			return base, nil
		}
	}
	return d.beside(c, none)
}

// against finds what a comparison of egressbpf with rules needs: the costs of both and, if
// Docker's own rules differ, also those of no filter.
func (d data) against(operation, rules string, cpus int) (costs []results.Cost, err error) {
	for _, filter := range []string{tool, rules} {
		c, err := d.find(traffic, operation, filter, few, cpus)
		if err != nil {
			return nil, err
		}
		costs = append(costs, c)
	}
	if rules == legacyRules {
		for _, c := range slices.Clone(costs) {
			base, err := d.noFilter(c)
			if err != nil || c.Filter == legacyRules && base.Filter != noneLegacy {
				return costs[:2], nil
			}
			costs = append(costs, base)
		}
	}
	return costs, nil
}

// moreThan and timesOf compare what against returns.
func moreThan(of []float64) float64 {
	if len(of) == 2 {
		return of[0] - of[1]
	}
	return (of[0] - of[2]) - (of[1] - of[3])
}

func timesOf(of []float64) float64 {
	if len(of) == 2 {
		return quotient(of[0], of[1])
	}
	return quotient(quotient(of[0], of[2]), quotient(of[1], of[3]))
}

// fewestPrefixes is the number of prefixes with which find finds a filter.
func (d data) fewestPrefixes(filter string) int {
	least := 0
	for _, c := range d.costs(traffic, func(c results.Cost) bool { return c.Filter == filter && len(c.Samples) > 0 }) {
		if least == 0 || c.Prefixes < least {
			least = c.Prefixes
		}
	}
	return least
}

// costs returns the costs of one part for which want is true.
func (d data) costs(part string, want func(results.Cost) bool) (all []results.Cost) {
	for _, c := range d.Costs {
		if c.Part == part && (want == nil || want(c)) {
			all = append(all, c)
		}
	}
	return all
}

// perRound derives a number from costs, for each round that all of them have.
func perRound(derive func(of []float64) float64, costs ...results.Cost) []float64 {
	rounds := len(costs[0].Samples)
	for _, c := range costs {
		rounds = min(rounds, len(c.Samples))
	}
	values := make([]float64, rounds)
	for i := range values {
		of := make([]float64, len(costs))
		for j, c := range costs {
			of[j] = c.Samples[i]
		}
		values[i] = derive(of)
	}
	return values
}

func over(of []float64) float64 { return of[0] - of[1] }

// quotient is infinite if its divisor is nothing, or less than nothing by chance.
func quotient(a, b float64) float64 {
	if b <= 0 {
		return math.Inf(1)
	}
	return a / b
}

func ratioTo(of []float64) float64 { return quotient(of[0], of[1]) }

// added is what a filter adds to an operation of traffic from one container, over base.
func (d data) added(operation, filter, base string) (figure, error) {
	return d.derive(over, operation, filter, base)
}

// derive derives a number from the costs of an operation of traffic with several filters.
func (d data) derive(derive func([]float64) float64, operation string, filters ...string) (figure, error) {
	var costs []results.Cost
	for _, f := range filters {
		c, err := d.find(traffic, operation, f, few, 1)
		if err != nil {
			return figure{}, err
		}
		if c.Unit != "ns" {
			return figure{}, fmt.Errorf("%s was measured in %q instead of ns", f, c.Unit)
		}
		costs = append(costs, c)
	}
	return summarise(perRound(derive, costs...)), nil
}

// walk is an operation's cost with a rule set that grows with the number of containers, and
// with egressbpf.
type walk struct {
	operation string
	none      results.Cost
	// rules and tool are in ascending numbers of containers.
	rules, tool []results.Cost
	// three says that the cost of one container is that of the three rules.
	three bool
}

// walks returns the operations that were measured with rules for each container.
func (d data) walks() (all []walk) {
	for _, c := range d.costs(traffic, func(c results.Cost) bool { return c.Filter == perContainer && c.CPUs == 1 }) {
		if !slices.ContainsFunc(all, func(w walk) bool { return w.operation == c.Operation }) {
			if w, err := d.walk(c.Operation); err == nil {
				all = append(all, w)
			}
		}
	}
	return all
}

func (d data) walk(operation string) (w walk, err error) {
	w.operation = operation
	if w.none, err = d.find(traffic, operation, none, few, 1); err != nil {
		return w, err
	}
	measured := func(filter string) []results.Cost {
		all := d.costs(traffic, func(c results.Cost) bool {
			return c.Operation == operation && c.Filter == filter && c.CPUs == 1 && len(c.Samples) > 0
		})
		for i := range all {
			all[i].Containers = max(1, all[i].Containers)
		}
		slices.SortStableFunc(all, func(a, b results.Cost) int { return cmp.Compare(a.Containers, b.Containers) })
		return all
	}
	if w.tool = measured(tool); len(w.tool) == 0 {
		_, err := d.find(traffic, operation, tool, few, 1)
		return w, err
	}
	if w.rules = measured(perContainer); len(w.rules) == 0 {
		_, err := d.find(traffic, operation, perContainer, few, 1)
		return w, err
	}
	if w.rules[0].Containers > 1 {
		if c := measured(nftRules); len(c) > 0 && c[0].Containers == 1 {
			w.rules, w.three = slices.Insert(w.rules, 0, c[0]), true
		}
	}
	return w, nil
}

// crossing is the number of containers from which on egressbpf is cheaper. It interpolates
// between the measured numbers, since each packet walks through the rules one by one. It is
// the lowest measured number if egressbpf is cheaper there, and infinite if egressbpf
// is not cheaper with the highest.
func (w walk) crossing() figure {
	all := append(slices.Clone(w.rules), w.tool...)
	return summarise(perRound(func(of []float64) float64 {
		rules, tool := of[:len(w.rules)], of[len(w.rules):]
		at := float64(w.rules[0].Containers)
		for i := len(w.rules) - 1; i >= 0; i-- {
			n := float64(w.rules[i].Containers)
			gain := rules[i] - interpolate(w.tool, tool, n)
			if gain >= 0 {
				continue
			}
			if i == len(w.rules)-1 {
				return math.Inf(1)
			}
			next := float64(w.rules[i+1].Containers)
			nextGain := rules[i+1] - interpolate(w.tool, tool, next)
			at = n + (next-n)*-gain/(nextGain-gain)
			break
		}
		return at
	}, all...))
}

// interpolate returns the cost of n containers. Beyond the measured numbers it is that of the
// nearest.
func interpolate(costs []results.Cost, values []float64, n float64) float64 {
	for i, c := range costs {
		x := float64(c.Containers)
		switch {
		case n > x:
			continue
		case i == 0 || n == x:
			return values[i]
		}
		before := float64(costs[i-1].Containers)
		return values[i-1] + (values[i]-values[i-1])*(n-before)/(x-before)
	}
	return values[len(values)-1]
}

// program is what a program costs in BPF_PROG_TEST_RUN.
type program struct {
	results.Cost
	// over is above an empty program, if that was measured.
	over *figure
}

func isEmpty(c results.Cost) bool { return c.Filter == emptyProgram || c.Operation == emptyProgram }

// programs returns what was measured, but for the empty programs.
func (d data) programs() (all []program) {
	var common *results.Cost
	for _, c := range d.costs(programs, isEmpty) {
		if common == nil && len(c.Samples) > 0 {
			common = &c
		}
	}
	for _, c := range d.costs(programs, func(c results.Cost) bool { return !isEmpty(c) }) {
		p := program{Cost: c}
		base, err := d.beside(c, emptyProgram)
		if err != nil && common != nil {
			base, err = *common, nil
		}
		if err == nil && len(c.Samples) > 0 {
			f := summarise(perRound(over, c, base))
			p.over = &f
		}
		all = append(all, p)
	}
	return all
}
