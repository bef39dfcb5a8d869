package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
	"github.com/egressbpf/egressbpf/internal/test/bench/programs"
	"github.com/egressbpf/egressbpf/internal/test/bench/results"
	"github.com/egressbpf/egressbpf/internal/test/bench/traffic"
)

// bound is what a figure may be at most.
type bound struct {
	name   string
	atMost float64
	unit   string
	// quick is whether a quick run measures it. Such a bound has room for any machine.
	quick bool
	// aim is whether the bound is one to reach, rather than to keep.
	aim bool
	// figure returns false if the run did not measure it.
	figure func(*results.Results) (float64, bool)
}

// bounds returns all bounds.
func bounds() []bound {
	all := []bound{
		{name: "round trip tcp4: egressbpf ÷ none", atMost: 1.10, quick: true,
			figure: traffics(traffic.RoundTrip4, quotient, one(lab.Egressbpf), one(lab.None))},
		{name: "udp4: (egressbpf - empty programs) ÷ none", atMost: 0.10, quick: true,
			figure: traffics(traffic.UDP4, share, one(lab.Egressbpf), one(lab.EmptyPrograms), one(lab.None))},
		{name: "udp4: time added by egressbpf ÷ by rules for 100 containers", atMost: 0.2, quick: true,
			figure: traffics(traffic.UDP4, added, one(lab.Egressbpf), measured{lab.RulesByContainer, 100}, one(lab.None))},
		{name: "refused mail syn: egressbpf ÷ iptables-nft rules", atMost: 0.7, quick: true,
			figure: traffics(traffic.RefusedSYN, quotient, one(lab.Egressbpf), one(lab.Rules))},
		{name: "refused connect: egressbpf ÷ iptables-nft rules", atMost: 0.4, quick: true,
			figure: traffics(traffic.RefusedConnect, quotient, one(lab.Egressbpf), one(lab.Rules))},
		{name: "limiter: connections beyond the limit", atMost: 0, quick: true, figure: overAdmitted},

		{name: "udp4: egressbpf - empty programs", atMost: 15, unit: "ns", aim: true,
			figure: traffics(traffic.UDP4, minus, one(lab.Egressbpf), one(lab.EmptyPrograms))},
		{name: "refused mail syn: egressbpf ÷ iptables-nft rules", atMost: 0.5, aim: true,
			figure: traffics(traffic.RefusedSYN, quotient, one(lab.Egressbpf), one(lab.Rules))},
		{name: "udp4: time added by egressbpf ÷ by rules for 1,000 containers", atMost: 1. / 150, aim: true,
			figure: traffics(traffic.UDP4, added, measured{lab.Egressbpf, 1000}, measured{lab.RulesByContainer, 1000}, one(lab.None))},
	}
	for _, op := range []string{traffic.RoundTrip4, traffic.RoundTrip6, traffic.Connect4, traffic.Connect6} {
		all = append(all,
			bound{name: op + ": egressbpf ÷ none", atMost: 1.02, aim: true, figure: traffics(op, quotient, one(lab.Egressbpf), one(lab.None))},
			bound{name: op + ": egressbpf ÷ iptables-nft rules", atMost: 1, aim: true, figure: traffics(op, quotient, one(lab.Egressbpf), one(lab.Rules))})
	}
	for _, b := range programs.Bounds() {
		all = append(all, bound{name: b.Operation + ": egressbpf - " + b.Base, atMost: b.AtMost, unit: "ns", figure: func(r *results.Results) (float64, bool) {
			over := findProgram(r, b.Operation, programs.Egressbpf)
			base := findProgram(r, b.Operation, b.Base)
			if b.Base != programs.EmptyProgram {
				base = findProgram(r, b.Base, programs.Egressbpf)
			}
			return compareAll(minus, over, base)
		}})
	}
	return all
}

// measured is a filter in results.
type measured struct {
	filter     string
	containers int
}

func one(filter string) measured { return measured{filter, 1} }

// The figures that are made of the costs with two or three filters, round by round.
func quotient(v []float64) float64 { return v[0] / v[1] }
func minus(v []float64) float64    { return v[0] - v[1] }
func share(v []float64) float64    { return (v[0] - v[1]) / v[2] }
func added(v []float64) float64    { return (v[0] - v[2]) / (v[1] - v[2]) }

// traffics compares the costs of an operation on one CPU.
func traffics(operation string, figure func([]float64) float64, filters ...measured) func(*results.Results) (float64, bool) {
	return func(r *results.Results) (float64, bool) {
		var costs []*results.Cost
		for _, f := range filters {
			costs = append(costs, find(r.Costs, func(c results.Cost) bool {
				return c.Part == traffic.Part && c.Operation == operation && c.CPUs == 1 && c.Filter == f.filter && c.Containers == f.containers
			}))
		}
		return compareAll(figure, costs...)
	}
}

func findProgram(r *results.Results, operation, filter string) *results.Cost {
	return find(r.Costs, func(c results.Cost) bool {
		return c.Part == programs.Part && c.Operation == operation && c.Filter == filter
	})
}

// compareAll makes a figure of costs, round by round, and returns the median. It returns false
// if one of the costs was not measured.
func compareAll(figure func([]float64) float64, costs ...*results.Cost) (float64, bool) {
	var all []float64
	for round := 0; ; round++ {
		var values []float64
		for _, c := range costs {
			if c == nil {
				return 0, false
			}
			if round < len(c.Samples) {
				values = append(values, c.Samples[round])
			}
		}
		if len(values) < len(costs) {
			break
		}
		all = append(all, figure(values))
	}
	if len(all) == 0 {
		return 0, false
	}
	return traffic.Median(all), true
}

// overAdmitted is by how many connections egressbpf exceeds the limit, at worst.
func overAdmitted(r *results.Results) (worst float64, ok bool) {
	for _, l := range r.Limits {
		if l.Filter == lab.Egressbpf && l.Missing == "" {
			worst, ok = max(worst, float64(l.Admitted)-l.Allowed), true
		}
	}
	return worst, ok
}

// check prints the bounds that a run measured, and says whether all of those to keep are kept.
// If the run was to measure everything, what is missing is not kept.
func check(w io.Writer, r *results.Results, quick, everything bool) bool {
	ok := true
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer tw.Flush()
	fmt.Fprintln(tw, "\nBOUND\tFIGURE\tAT MOST")
	for _, b := range bounds() {
		if quick && !b.quick {
			continue
		}
		value, found := b.figure(r)
		text, verdict := "not measured", ""
		switch {
		case !found && !everything:
			continue
		case !found:
		case b.unit == "":
			text = fmt.Sprintf("%.3f", value)
		default:
			text = fmt.Sprintf("%.1f %s", value, b.unit)
		}
		switch held := found && value <= b.atMost; {
		case held:
		case b.aim:
			verdict = "  not reached yet"
		default:
			verdict, ok = "  EXCEEDED", false
		}
		fmt.Fprintf(tw, "%s\t%s\t%.3g%s\n", b.name, text, b.atMost, verdict)
	}
	return ok
}
