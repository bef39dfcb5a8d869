package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
	"github.com/egressbpf/egressbpf/internal/test/bench/programs"
	"github.com/egressbpf/egressbpf/internal/test/bench/results"
	"github.com/egressbpf/egressbpf/internal/test/bench/traffic"
)

// baseOf names the filter that a cost is compared with.
func baseOf(c results.Cost) string {
	switch {
	case c.Part == programs.Part:
		return programs.EmptyProgram
	case c.Filter == lab.RulesLegacy:
		return lab.NoneLegacy
	}
	return lab.None
}

// printCosts prints costs, beside those of what they are compared with.
func printCosts(w io.Writer, costs []results.Cost) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer tw.Flush()
	last := ""
	for _, c := range costs {
		title := c.Part + ": " + c.Operation
		if c.CPUs > 1 {
			title += fmt.Sprintf(", %d CPUs", c.CPUs)
		}
		if title != last {
			fmt.Fprintf(tw, "\n%s\tNS\tOVER\tRATIO\n", title)
			last = title
		}
		name := lab.Filter{Name: c.Filter, Containers: c.Containers, Prefixes: c.Prefixes}.String()
		if c.Missing != "" {
			fmt.Fprintf(tw, "  %s\tmissing: %s\n", name, c.Missing)
			continue
		}
		ns := traffic.Median(slices.Clone(c.Samples))
		base := find(costs, func(o results.Cost) bool {
			return o.Part == c.Part && o.Operation == c.Operation && o.CPUs == c.CPUs && o.Filter == baseOf(c)
		})
		over, found := compareAll(minus, &c, base)
		if !found {
			fmt.Fprintf(tw, "  %s\t%.1f\n", name, ns)
			continue
		}
		ratio, _ := compareAll(quotient, &c, base)
		fmt.Fprintf(tw, "  %s\t%.1f\t%+.1f\t%.4f\n", name, ns, over, ratio)
	}
}

func printLimiters(w io.Writer, all []results.Limiter) {
	if len(all) == 0 {
		return
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer tw.Flush()
	fmt.Fprintln(tw, "\nlimiter\tPER SECOND\tCPUS\tSECONDS\tASKED\tADMITTED\tALLOWED\tRATIO")
	for _, l := range all {
		if l.Missing != "" {
			fmt.Fprintf(tw, "  %s\t%.4g\t%d\tmissing: %s\n", l.Filter, l.PerSecond, l.CPUs, l.Missing)
			continue
		}
		fmt.Fprintf(tw, "  %s\t%.4g\t%d\t%.3f\t%d\t%d\t%.2f\t%.4f\n", l.Filter, l.PerSecond, l.CPUs, l.Seconds, l.Asked, l.Admitted,
			l.Allowed, float64(l.Admitted)/l.Allowed)
	}
}

func find(costs []results.Cost, match func(results.Cost) bool) *results.Cost {
	if i := slices.IndexFunc(costs, match); i >= 0 {
		return &costs[i]
	}
	return nil
}
