package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/bench/commands"
	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
	"github.com/egressbpf/egressbpf/internal/test/bench/limiter"
	"github.com/egressbpf/egressbpf/internal/test/bench/programs"
	"github.com/egressbpf/egressbpf/internal/test/bench/results"
	"github.com/egressbpf/egressbpf/internal/test/bench/traffic"
)

// errBounds means that a bound does not hold.
var errBounds = errors.New("a bound is exceeded")

// runOptions are the flags of run.
type runOptions struct {
	quick  bool
	only   *regexp.Regexp
	output string
	rounds int
	slices int
}

// run measures, and writes the results to a file.
func run(args []string) error {
	var o runOptions
	flags := flag.NewFlagSet("bench run", flag.ExitOnError)
	flags.BoolVar(&o.quick, "quick", false, "measure only what has bounds that hold on any machine, in less than a minute")
	only := flags.String("only", "", "measure only what matches `REGEXP`; names have the form part: operation: filter")
	flags.StringVar(&o.output, "o", "", "write the results to `FILE`, as JSON")
	flags.IntVar(&o.rounds, "rounds", 0, "build everything anew `N` times; 0 means as often as usual")
	flags.IntVar(&o.slices, "slices", 0, "measure each operation `N` times in a round; 0 means as often as usual")
	flags.Parse(args)
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root")
	}
	if os.Getenv(supervised) == "" {
		return supervise()
	}
	return o.run()
}

func (o *runOptions) run() error {
	// Workers end with this thread.
	runtime.LockOSThread()
	site, err := lab.NewSite()
	if err != nil {
		return err
	}
	cpus, err := usableCPUs()
	if err != nil {
		return err
	}
	r := &results.Results{Machine: machine(), Costs: []results.Cost{}, Limits: []results.Limiter{}}
	for _, part := range []func(*lab.Site, []int, *results.Results) error{o.programs, o.traffic, o.limiter, o.commands} {
		if err := part(site, cpus, r); err != nil {
			return err
		}
	}
	printCosts(os.Stdout, r.Costs)
	printLimiters(os.Stdout, r.Limits)
	if o.output != "" {
		if err := r.Write(o.output); err != nil {
			return err
		}
	}
	if !check(os.Stdout, r, o.quick, o.only.String() == "") {
		return errBounds
	}
	return nil
}

// wants says whether to measure something.
func (o *runOptions) wants(names ...string) bool {
	return o.only.MatchString(strings.Join(names, ": "))
}

func (o *runOptions) programs(site *lab.Site, _ []int, r *results.Results) error {
	p := programs.Plan{Site: site, Loads: 15, Log: progress}
	p.Wants = func(operation, filter string) bool { return !o.quick && o.wants(programs.Part, operation, filter) }
	costs, err := programs.Measure(p)
	r.Costs = append(r.Costs, costs...)
	return err
}

// replicas is how many labs a filter has in a round. What others are compared with has more, so
// that the place of one does not shift all figures.
func replicas(f lab.Filter) int {
	if f.Containers == 1 && slices.Contains([]string{lab.None, lab.EmptyPrograms, lab.EmptyNetfilter, lab.HostAlone, lab.Egressbpf, lab.Rules}, f.Name) {
		return 3
	}
	return 1
}

func (o *runOptions) traffic(site *lab.Site, cpus []int, r *results.Results) error {
	p := traffic.Plan{Site: site, CPUs: cpus, Filters: lab.Filters(), Replicas: replicas, Rounds: 13, Slices: 11, Slice: 3 * time.Millisecond, Log: progress}
	p.Wants = func(op traffic.Operation, f lab.Filter) bool {
		if f.Name == lab.None {
			// It is what others are compared with.
			for _, other := range p.Filters {
				if other.Name != lab.None && p.Wants(op, other) {
					return true
				}
			}
		}
		return traffic.Sensible(op, f) && (!o.quick || traffic.Quick(op, f)) && o.wants(traffic.Part, op.Name, f.String())
	}
	if o.quick {
		p.Rounds = 5
	}
	if o.rounds > 0 {
		p.Rounds = o.rounds
	}
	if o.slices > 0 {
		p.Slices = o.slices
	}
	costs, err := traffic.Measure(p)
	r.Costs = append(r.Costs, costs...)
	return err
}

func (o *runOptions) limiter(site *lab.Site, cpus []int, r *results.Results) (err error) {
	p := limiter.Plan{Site: site, CPUs: cpus, Flood: 3 * time.Second, Log: progress}
	for _, f := range lab.Filters() {
		if f.Containers == 1 && slices.Contains([]string{lab.Egressbpf, lab.Rules, lab.Hashlimit, lab.NftSet}, f.Name) {
			p.Filters = append(p.Filters, f)
		}
	}
	p.Wants = func(f lab.Filter, rate policy.Rate, cpus int) bool {
		if o.quick && (f.Name != lab.Egressbpf || rate.Count != 1000) {
			return false
		}
		return o.wants(limiter.Part, rate.String(), f.String())
	}
	r.Limits, err = limiter.Measure(p)
	return err
}

// commands measures the command that was built beside this one.
func (o *runOptions) commands(_ *lab.Site, _ []int, r *results.Results) error {
	if o.quick || !o.wants(commands.Part) {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	progress("%s", commands.Part)
	costs, err := commands.Measure(filepath.Join(filepath.Dir(self), "egressbpf"), 5)
	r.Costs = append(r.Costs, costs...)
	return err
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format(time.TimeOnly)}, args...)...)
}

// usableCPUs returns the numbers of two CPUs, or of one if there are no more.
func usableCPUs() (cpus []int, err error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	for i := 0; i < 8*len(set)*8 && len(cpus) < 2; i++ {
		if set.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	return cpus, nil
}
