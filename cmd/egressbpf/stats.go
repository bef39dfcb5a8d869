package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/egressbpf/egressbpf/internal/metrics"
	"github.com/egressbpf/egressbpf/internal/stats"
)

type statsOptions struct {
	*globals
	container string
	watch     bool
	interval  time.Duration
	output    *output
}

func newStats(g *globals) *cobra.Command {
	o := statsOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "stats [--container NAME] [--watch]",
		Short: "Show the counters of each container",
		Long: `Shows a row of counters for each container, those first that were refused most, and a
total that includes removed containers. A container is shown by its name in Docker, or
by its id if Docker's daemon does not answer. In mode audit the same is counted, and
nothing is dropped or refused.

  BLOCKED   packets to blocked destinations, dropped
  REFUSED   attempts to send there, refused before there was a packet
  MALFORMED packets dropped because they hide where they go
  MAIL      mail connections let through
  LIMITED   mail connections dropped because the bucket was empty; repeats count
  NO-BUCKET mail connections dropped because there was no room for a bucket, or, in
            the total, because the container was removed
  SOCKETS   sockets refused because they would bypass the filter
  HOST      packets that got past the filter and were dropped on the host; counted
            for the container if it is known, else in the total alone
  TOKENS    mail connections the container can open right now
  LIMIT     rate and burst that hold for the container

With --output prometheus, prints the metrics that run serves with --web-listen, for
node_exporter's textfile collector. If the counters cannot be read, or nothing is
attached, the metrics say so, and the command fails.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&o.container, "container", "", "show only this container, without the total: its name, its id or the beginning of it, or its cgroup")
	cmd.Flags().BoolVar(&o.watch, "watch", false, "print the counters again and again until interrupted; with -o json, one object a line")
	cmd.Flags().DurationVar(&o.interval, "interval", 2*time.Second, "time between two readings with --watch")
	o.output = outputFlag(cmd, prometheus)
	return cmd
}

func (o *statsOptions) run(ctx context.Context, stdout, stderr io.Writer) error {
	if o.interval < 100*time.Millisecond {
		return usageError{errors.New("--interval: want at least 100ms")}
	}
	if *o.output == prometheus && (o.container != "" || o.watch) {
		return usageError{errors.New("--output prometheus: want neither --container nor --watch")}
	}
	names, err := o.names(stderr)
	if err != nil {
		return err
	}
	if *o.output == prometheus {
		return o.metrics(ctx, stdout, names)
	}
	reader, err := o.reader()
	if err != nil {
		return err
	}
	defer reader.Close()
	tick := time.NewTicker(o.interval)
	defer tick.Stop()
	for {
		if err := o.show(ctx, stdout, reader, names); err != nil || !o.watch {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if *o.output == table {
			fmt.Fprintln(stdout)
		}
	}
}

// metrics prints them. What reads the output may not look at the exit code.
func (o *statsOptions) metrics(ctx context.Context, w io.Writer, names *names) error {
	collector := metrics.Collector{Containers: true}
	filter, root, err := o.filter()
	if usage := (usageError{}); errors.As(err, &usage) {
		return err
	}
	if err != nil {
		_ = collector.Write(w) // fails for the same reason
		return err
	}
	collector.Filter, collector.Root = filter, root
	if names.containers != nil {
		if names.asked || names.containers.Started() {
			names.refresh(ctx)
		}
		collector.Engines = names.containers
	}
	return collector.Write(w)
}

func (o *statsOptions) show(ctx context.Context, w io.Writer, reader *stats.Reader, names *names) error {
	s, err := reader.Read()
	if err != nil {
		return err
	}
	names.addTo(ctx, s)
	if o.container != "" {
		c, err := names.selected(ctx, reader, s, o.container)
		if err != nil {
			return err
		}
		s.Containers = []stats.Container{*c}
	}
	if *o.output == jsonText {
		return writeJSON(w, s)
	}
	return printStats(w, s, o.container == "")
}

// printStats prints a table, with the containers first that were refused most. JSON has them in
// the order of their cgroups.
func printStats(w io.Writer, s *stats.Stats, withTotal bool) error {
	slices.SortStableFunc(s.Containers, func(a, b stats.Container) int {
		return cmp.Or(cmp.Compare(refusedOf(&b), refusedOf(&a)), strings.Compare(title(a.Name, a.ID), title(b.Name, b.ID)))
	})
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "CONTAINER\tBLOCKED\tREFUSED\tMALFORMED\tMAIL\tLIMITED\tNO-BUCKET\tSOCKETS\tHOST\tTOKENS\tLIMIT")
	row := func(name string, t stats.Total, tokens, limit string) {
		fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%s\t%s\n", name, t.Blocked.Packets, t.Blocked.Connects,
			t.Malformed.Packets, t.SMTP.Allowed, t.SMTP.RateLimited, t.SMTP.NoBucket, t.Families.Denied, t.HostSide.Packets,
			tokens, limit)
	}
	for _, c := range s.Containers {
		tokens := "-"
		if c.SMTP.Tokens != nil {
			tokens = strconv.FormatFloat(*c.SMTP.Tokens, 'f', 1, 64)
		}
		limit := "-"
		if c.SMTP.Known() {
			limit = fmt.Sprintf("%s, burst %d", c.SMTP.Rate, c.SMTP.Burst)
		}
		row(title(c.Name, c.ID), stats.Total{Blocked: c.Blocked, Malformed: c.Malformed, Families: c.Families, HostSide: c.HostSide, SMTP: c.SMTP.SMTP}, tokens, limit)
	}
	if withTotal {
		row("TOTAL", s.Total, "", "")
	}
	return tw.Flush()
}

// refusedOf is how much was refused to a container, as its row shows it.
func refusedOf(c *stats.Container) uint64 {
	return c.Blocked.Packets + c.Blocked.Connects + c.Malformed.Packets + c.SMTP.RateLimited + c.SMTP.NoBucket +
		c.Families.Denied + c.HostSide.Packets
}

// title is what a container is called in tables.
func title(name, id string) string {
	const short = 12 // as docker ps shows ids
	switch {
	case name != "":
		return printable(name)
	case len(id) == 64:
		id = id[:short]
	}
	return printable(id)
}
