package report

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/egressbpf/egressbpf/internal/test/bench/results"
)

// bound is something that must hold. It is checked for one or more operations.
type bound struct {
	// id is the name of the file with the explanation if the bound does not hold.
	id   string
	what string
	must string
	rows []row
}

// row is a line of the table of bounds.
type row struct {
	what     string
	measured string
	verdict  verdict
}

type verdict int

const (
	notMeasured verdict = iota
	holds
	holdsWithinNoise
	exceeded
)

func (v verdict) String() string {
	return [...]string{"not measured", "yes", "yes, within noise", "**no**"}[v]
}

// broken says whether some row does not hold.
func (b bound) broken() bool {
	for _, r := range b.rows {
		if r.verdict == exceeded {
			return true
		}
	}
	return false
}

func unmeasured(what string, err error) row {
	return row{what: what, measured: "not measured: " + err.Error()}
}

// atMost is a row whose median must not be above a limit.
func atMost(what string, f figure, limit float64, measured string) row {
	r := row{what, measured, holds}
	if f.median > limit {
		r.verdict = exceeded
	}
	return r
}

// bounds checks everything that must hold.
func (d data) bounds() []bound {
	return []bound{
		d.addedBound("host-side-container", "The host side over an empty netfilter program, a packet from a container's bridge",
			hostAlone, emptyNetfilter, 10, udp4, udp6),
		d.addedBound("host-side-other", "The host side over an empty netfilter program, a packet from another device",
			hostAlone, emptyNetfilter, 3, udpIntoHost),
		d.intoHostBound(),
		d.addedBound("tool-udp", "The whole tool over its empty programs, a UDP packet",
			tool, emptyPrograms, 15, udp4, udp6),
		d.noHigherBound(),
		d.perContainerBound("per-container-100", 100, 15),
		d.perContainerBound("per-container-1000", 1000, 150),
		d.refusedBound("refused-mail", "A refused mail SYN against the three rules", refusedMail, 0.45),
		d.refusedBound("refused-connect", "A refused connect against the three rules", refusedConnect, 0.2),
		d.limiterBound(),
		d.serviceBound(),
	}
}

func (d data) addedBound(id, what, filter, base string, limit float64, operations ...string) bound {
	b := bound{id: id, what: what, must: fmt.Sprintf("at most %s ns", plain(limit))}
	for _, op := range operations {
		f, err := d.added(op, filter, base)
		if err != nil {
			b.rows = append(b.rows, unmeasured(describe(op, 1), err))
			continue
		}
		b.rows = append(b.rows, atMost(describe(op, 1), f, limit, f.text(signed(nanoseconds))+" ns"))
	}
	return b
}

func (d data) intoHostBound() bound {
	const limit = 3
	b := bound{id: "into-host", what: "A packet that the host receives from elsewhere, over no filter",
		must: fmt.Sprintf("at most an empty netfilter program and %d ns", limit)}
	what := describe(udpIntoHost, 1)
	whole, err := d.added(udpIntoHost, tool, none)
	if err == nil {
		var empty, beyond figure
		if empty, err = d.added(udpIntoHost, emptyNetfilter, none); err == nil {
			beyond, err = d.added(udpIntoHost, tool, emptyNetfilter)
			ns := signed(nanoseconds)
			b.rows = append(b.rows, atMost(what, beyond, limit, fmt.Sprintf("%s ns; an empty netfilter program: %s ns; difference: %s ns",
				ns(whole.median), ns(empty.median), beyond.text(ns))))
		}
	}
	if err != nil {
		b.rows = []row{unmeasured(what, err)}
	}
	return b
}

// noHigherBound compares egressbpf with the three rules. It is higher only if it is so beyond
// noise.
func (d data) noHigherBound() bound {
	b := bound{id: "round-trips", what: "Round trip, and connect and close, against the three rules", must: "no higher, beyond noise"}
	for _, op := range []string{"round trip tcp4", "round trip tcp6", "connect and close tcp4", "connect and close tcp6"} {
		for _, rules := range threeRules {
			what := describe(op, 1) + ", " + rules
			costs, err := d.against(op, rules, 1)
			if err != nil {
				b.rows = append(b.rows, unmeasured(what, err))
				continue
			}
			f := summarise(perRound(timesOf, costs...))
			r := row{what, fmt.Sprintf("%s of the rules' time; the median is between %s and %s",
				ratio(f.median), ratio(f.low), ratio(f.high)), holds}
			switch {
			case f.low > 1:
				r.verdict = exceeded
			case f.median > 1:
				r.verdict = holdsWithinNoise
			}
			b.rows = append(b.rows, r)
		}
	}
	return b
}

func (d data) perContainerBound(id string, containers int, atLeast float64) bound {
	b := bound{id: id, what: fmt.Sprintf("What the rules of %s add to a UDP packet, divided by what the whole tool adds", count(containers, "container")),
		must: "at least " + plain(atLeast)}
	what := describe(udp4, 1)
	err := func() error {
		rules, err := d.find(traffic, udp4, perContainer, containers, 1)
		if err != nil {
			return err
		}
		whole, err := d.beside(rules, tool)
		if err != nil {
			return err
		}
		base, err := d.beside(rules, none)
		if err != nil {
			return err
		}
		f := summarise(perRound(func(of []float64) float64 { return quotient(of[0]-of[2], of[1]-of[2]) }, rules, whole, base))
		r := row{what, f.text(number), holds}
		if f.median < atLeast {
			r.verdict = exceeded
		}
		b.rows = append(b.rows, r)
		return nil
	}()
	if err != nil {
		b.rows = append(b.rows, unmeasured(what, err))
	}
	return b
}

func (d data) refusedBound(id, what, operation string, limit float64) bound {
	b := bound{id: id, what: what, must: "at most " + plain(limit) + " of the rules' time"}
	for _, rules := range threeRules {
		costs, err := d.against(operation, rules, 1)
		if err != nil {
			b.rows = append(b.rows, unmeasured(rules, err))
			continue
		}
		f := summarise(perRound(timesOf, costs...))
		b.rows = append(b.rows, atMost(rules, f, limit, f.text(ratio)))
	}
	return b
}

func (d data) limiterBound() bound {
	b := bound{id: "limiter", what: "Mail connections that the limiter admits beyond its limit", must: "0"}
	for _, l := range d.Limits {
		if l.Filter != tool {
			continue
		}
		what := count(max(1, l.CPUs), "CPU")
		if l.Missing != "" {
			b.rows = append(b.rows, unmeasured(what, errors.New(l.Missing)))
			continue
		}
		beyond := beyond(l.Admitted, l.Allowed)
		b.rows = append(b.rows, atMost(what, figure{median: beyond}, 0,
			fmt.Sprintf("%s (%s admitted, %s allowed)", decimal(beyond, 0), decimal(float64(l.Admitted), 0), decimal(l.Allowed, 1))))
	}
	if len(b.rows) == 0 {
		b.rows = append(b.rows, unmeasured("", fmt.Errorf("the results have no limiter of %s", tool)))
	}
	return b
}

// beyond is how many connections were admitted that the limit does not allow.
func beyond(admitted int, allowed float64) float64 {
	return max(0, float64(admitted)-math.Floor(allowed))
}

func (d data) serviceBound() bound {
	const limit, others = 2e6, 1000
	b := bound{id: "service-start", what: "The service's CPU time for the start of a container, beside " + count(others, "other"),
		must: "at most " + plain(limit/1e6) + " ms"}
	for _, c := range d.costs(commands, func(c results.Cost) bool {
		return strings.HasPrefix(c.Operation, startCPU) && strings.HasSuffix(c.Operation, ofService) && c.Containers >= others
	}) {
		if len(c.Samples) == 0 {
			b.rows = append(b.rows, unmeasured(c.Operation, errors.New(c.Missing)))
			continue
		}
		if c.Unit != "ns" {
			b.rows = append(b.rows, unmeasured(c.Operation, fmt.Errorf("the unit is %q instead of ns", c.Unit)))
			continue
		}
		f := summarise(c.Samples)
		b.rows = append(b.rows, atMost(c.Operation, f, limit, f.text(quantity(c.Unit))))
	}
	if len(b.rows) == 0 {
		b.rows = append(b.rows, unmeasured("", fmt.Errorf("the results have no “%s” with %s", startCPU, count(others, "container"))))
	}
	return b
}
