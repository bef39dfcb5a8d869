// Package programs measures with BPF_PROG_TEST_RUN what programs alone cost a packet, in
// nanoseconds of CPU time.
//
// The speed of a program varies by tens of nanoseconds with the address at which the kernel
// loads it. So every case is loaded many times, in random order.
package programs

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
	"github.com/egressbpf/egressbpf/internal/test/bench/results"
)

// Part is the name of this part of a run.
const Part = "programs"

const (
	timings = 15     // of each load; the fastest counts
	repeat  = 50_000 // runs of the program in each timing: a few milliseconds
)

// Plan says what to measure, and how often.
type Plan struct {
	Site  *lab.Site
	Wants func(operation, filter string) bool
	Loads int // of each case
	Log   func(format string, args ...any)
}

// Measure measures. The calling goroutine must be locked to a thread.
func Measure(p Plan) (costs []results.Cost, err error) {
	var all []*benchmark
	for _, b := range benchmarks() {
		if p.Wants(b.operation, b.filter) {
			all = append(all, b)
		}
	}
	if len(all) == 0 {
		return nil, nil
	}
	if err := maps.RemoveMemlock(); err != nil {
		return nil, err
	}
	cgroups, err := lab.NewCgroups(p.Site.Root, 1)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, cgroups.Close()) }()
	at, err := newPlace(p.Site.Root, cgroups)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, at.close()) }()
	err = inCgroup(p.Site.Root, cgroups.Container, func() error {
		for round := range p.Loads {
			p.Log("programs: round %d of %d", round+1, p.Loads)
			for _, i := range rand.Perm(len(all)) {
				if err := all[i].measure(at); err != nil {
					return fmt.Errorf("%s: %s: %w", all[i].operation, all[i].filter, err)
				}
			}
		}
		return nil
	})
	for _, b := range all {
		costs = append(costs, results.Cost{
			Part: Part, Operation: b.operation, Filter: b.filter, Containers: b.containers, Prefixes: b.prefixes,
			CPUs: 1, Unit: "ns", Samples: append([]float64{}, b.fastest...), Instructions: b.instructions, Missing: b.missing,
		})
	}
	return costs, err
}

// measure loads the program anew and adds the fastest of several timings.
func (b *benchmark) measure(p *place) error {
	if b.missing != "" {
		return nil
	}
	prog, err := b.load(p, b)
	if errors.Is(err, ebpf.ErrNotSupported) {
		b.missing = err.Error()
		return nil
	}
	if err != nil {
		return err
	}
	defer prog.free()
	info, err := prog.Info()
	if err != nil {
		return err
	}
	b.instructions, _ = info.VerifiedInstructions()
	err = p.network.Do(func() error { return b.time(prog) })
	if errors.Is(err, ebpf.ErrNotSupported) {
		b.missing = err.Error()
		return nil
	}
	return err
}

func (b *benchmark) time(prog *loaded) error {
	data := b.packet.bytes()
	if b.bare {
		data = data[ethernet:]
	}
	run := func(repeat uint32) error {
		verdict, err := prog.Run(&ebpf.RunOptions{Data: data, Context: prog.context, Repeat: repeat})
		if err == nil && verdict != b.verdict && repeat > 1 {
			err = fmt.Errorf("verdict %d, want %d", verdict, b.verdict)
		}
		return err
	}
	// Empty the bucket.
	for range policy.Default().SMTP.Burst {
		if err := run(1); err != nil {
			return err
		}
	}
	least := math.Inf(1)
	for range timings {
		before, err := threadTime()
		if err != nil {
			return err
		}
		if err := run(repeat); err != nil {
			return err
		}
		after, err := threadTime()
		if err != nil {
			return err
		}
		least = min(least, float64(after-before)/repeat)
	}
	b.fastest = append(b.fastest, least)
	return nil
}

// threadTime is the CPU time of this thread. The duration that BPF_PROG_TEST_RUN returns is a
// whole number of nanoseconds.
func threadTime() (int64, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return ts.Nano(), err
}
