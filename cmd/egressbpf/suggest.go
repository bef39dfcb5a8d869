package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/suggest"
)

type suggestOptions struct {
	*globals
	inputs []string
}

func newSuggest(g *globals) *cobra.Command {
	o := suggestOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "suggest [--input FILE]...",
		Short: "Make a config file from what mode audit would have refused",
		Long: `Prints a config file: the policy in force, in mode enforce, with exceptions for what
containers did while mode audit let it pass. It changes nothing on this host.

  smtp.exempt  a destination that gets most of the mail of several containers
  containers   mailers with a limit of their own, containers that asked for the
               metadata service, and containers that opened other sockets
  allow        DNS and time servers at the addresses of metadata services

A comment above each exception says who asked for it, how often, and what it opens.
An attack looks the same as a need: read the file and remove what you cannot explain.
What stays refused is in comments too.

It knows what the kernel has counted and seen in mode audit, also if attach ran again
meanwhile. With --input it also knows refusals that monitor has recorded: for a longer
time, for containers that are gone, or for more destinations than the kernel remembers.`,
		Example: `  egressbpf attach --mode audit        # then wait for a week
  egressbpf suggest >config.yaml
  egressbpf suggest --input refusals.json >config.yaml
  egressbpf attach --config config.yaml`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringArrayVar(&o.inputs, "input", nil, "file with the output of monitor --output json, or - for stdin; may be repeated")
	return cmd
}

func (o *suggestOptions) run(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer) error {
	o.podNetworks = true
	names, err := o.names(stderr)
	if err != nil {
		return err
	}
	filter, root, err := o.filter()
	if err != nil {
		return err
	}
	seen, err := observe(ctx, filter, root, names)
	switch {
	case errors.Is(err, loader.ErrNotAttached) && len(o.inputs) > 0:
		fmt.Fprintln(stderr, "warning: egressbpf is not attached: this adds to the default policy, by the input alone")
		seen = &suggest.Observation{Config: policy.Config{Policy: policy.Default()}, Now: time.Now()}
	case err != nil:
		return err
	case seen.Config.Mode != policy.Audit:
		fmt.Fprintf(stderr, "warning: the mode is %s: the destinations of what is refused are known from --input alone; set mode: audit in the config file, or use attach --mode audit with the same --config\n", seen.Config.Mode)
	}
	if seen.Node, err = os.Hostname(); err != nil {
		return err
	}
	for _, name := range o.inputs {
		if err := readRecords(ctx, seen, stdin, name, stderr); err != nil {
			return err
		}
	}
	return printSuggestion(seen.Suggest(), stdout, stderr)
}

// observe returns what the kernel tells of the containers, with their names. The error can wrap
// loader.ErrNotAttached.
func observe(ctx context.Context, filter *loader.Filter, root cgroup.Root, names *names) (*suggest.Observation, error) {
	reader, err := stats.Open(filter, root)
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	status, err := filter.Status()
	if err != nil {
		return nil, err
	}
	if status.Policy == nil {
		return nil, errors.New("no program holds the policy in force: attach again, with the same --config and flags as before")
	}
	counted, err := reader.Read()
	if err != nil {
		return nil, err
	}
	names.addTo(ctx, counted)
	if names.err != nil {
		names.warn() // no rule can be suggested without names
	}
	o := &suggest.Observation{Config: policy.Config{Cgroups: status.Cgroups, Policy: *status.Policy}, Now: time.Now()}
	if o.Clock, err = maps.Now(); err != nil {
		return nil, err
	}
	state, err := filter.State()
	if err != nil {
		return nil, err
	}
	defer state.Close()
	if o.Seen, err = state.Seen(); err != nil {
		return nil, err
	}
	for _, h := range status.Hooks {
		if h.Cgroup != "" && !h.Since.IsZero() && (o.Since.IsZero() || h.Since.Before(o.Since)) {
			o.Since = h.Since
		}
	}
	return o, addContainers(o, root, names, counted)
}

// addContainers adds the containers that have counters, and those that are not policed: a
// pattern for names must not match these either.
func addContainers(o *suggest.Observation, root cgroup.Root, names *names, counted *stats.Stats) error {
	var running []container.Container
	if names.containers != nil {
		var err error
		if running, err = names.containers.Running(root); err != nil {
			return err
		}
	}
	found := map[uint64]container.Container{}
	for _, c := range running {
		found[c.CgroupID] = c
	}
	policed := map[uint64]bool{}
	for _, row := range counted.Containers {
		policed[row.CgroupID] = true
		c, ok := found[row.CgroupID]
		if !ok {
			c.Identity = row.Identity
		}
		var started time.Time
		if row.SMTP.RateLimited > 0 && row.Cgroup != "" {
			started, _ = root.Started(row.Cgroup) // it may have ended
		}
		o.Add(c, row, started)
	}
	for _, c := range running {
		if !policed[c.CgroupID] {
			o.Add(c, stats.Container{}, time.Time{})
		}
	}
	return nil
}

func readRecords(ctx context.Context, o *suggest.Observation, stdin io.Reader, name string, stderr io.Writer) error {
	in, shown := stdin, "stdin"
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return fmt.Errorf("--input: %w", err)
		}
		defer f.Close()
		in, shown = f, name
	}
	stored := events.ReadStored(in, shown)
	defer stored.Close()
	err := o.Read(ctx, stored)
	switch {
	case errors.Is(err, events.ErrCutOff):
		fmt.Fprintf(stderr, "warning: %s: the last line is cut off and was left out\n", printable(shown))
		return nil
	case errors.Is(err, events.ErrMalformed):
		return usageError{fmt.Errorf("--input: %w", err)}
	}
	return err
}

func printSuggestion(s suggest.Suggestion, stdout, stderr io.Writer) error {
	config := s.Config.YAML(s.Comments)
	// Read it back, to be sure that attach accepts it.
	if _, err := policy.ParseConfig("config.yaml", config); err != nil {
		return fmt.Errorf("suggest: %w", err)
	}
	if _, err := stdout.Write(config); err != nil {
		return err
	}
	if s.Short {
		fmt.Fprintln(stderr, "warning: this was observed for less than a week: what containers do rarely is not in it")
	}
	if s.Nothing {
		fmt.Fprintln(stderr, "nothing was refused: the policy is that in force, in mode enforce")
		return nil
	}
	fmt.Fprintf(stderr, "exceptions suggested: %d; left refused: %d: see the comments\n", s.Added, s.Left)
	return nil
}
