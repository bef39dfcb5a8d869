package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
)

type monitorOptions struct {
	*globals
	follow       bool
	selection    events.Selection
	reasons      []string
	destinations []string
	limit        uint64
	fields       []string
	input        string
	output       output
	color        output
}

func newMonitor(g *globals) *cobra.Command {
	o := monitorOptions{globals: g, output: compact, color: automatic}
	cmd := &cobra.Command{
		Use:   "monitor",
		Short: "Show refusals as they happen",
		Long: `Shows each packet and system call of a container that is refused, with the process
and the destination, until interrupted. In mode audit it shows what would be refused.

Refusals are shown if one value of each filter matches; --not shows the others. In names
of containers and processes a star stands for any characters.

Events are best effort: of each container at most 10 a second are told, and 50 at once.
What was left out or lost is said on stderr, or by objects of their own in JSON;
"egressbpf stats" counts everything.

Output formats:
  compact  a line for each refusal: time, container, process, what was refused,
           destination, and the reason with the entry of the policy
  table    the same in columns; long names are cut off
  json     an object for each line, the first of type "start"

Names that could deceive are quoted. docs/events.md explains the keys of JSON, which are
the fields of --fields too.`,
		Example: `  egressbpf monitor --container 'web-*' --reason blocked
  egressbpf monitor --destination 169.254.169.254:80 --output json >> refusals.json
  egressbpf monitor --input refusals.json --fields time,container.image,process,rule -o table`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(cmd.Flags()); err != nil {
				return usageError{err}
			}
			return o.run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&o.follow, "follow", "f", true, "wait for refusals to come, as it does anyway")
	flags.StringArrayVar(&o.selection.Containers, "container", nil, "show refusals of this container: its name, its id or at least 12 digits of it, or its cgroup; may be repeated")
	flags.StringSliceVar(&o.reasons, "reason", nil, "show refusals for these reasons: blocked, malformed, rate_limited, no_bucket, family")
	flags.StringSliceVar(&o.destinations, "destination", nil, "show refusals to these destinations: ADDR|CIDR[:PORT][/PROTO]; an IPv6 address with a port goes in brackets")
	flags.StringArrayVar(&o.selection.Processes, "process", nil, "show refusals to processes of this name; may be repeated")
	flags.BoolVar(&o.selection.Not, "not", false, "show only refusals that the filters do not match")
	flags.Uint64Var(&o.limit, "limit", 0, "end after this many refusals (default: no limit)")
	flags.StringSliceVar(&o.fields, "fields", nil, "show these fields of a refusal, such as time,container.name,destination")
	flags.StringVar(&o.input, "input", "", "show refusals from a file that --output json has written; - is stdin")
	flags.VarP(outputValue{&o.output, []string{string(compact), string(table), string(jsonText)}}, "output", "o", "output format")
	flags.Var(outputValue{&o.color, []string{string(automatic), "always", "never"}}, "color", "use colours; auto means on a terminal, unless NO_COLOR is set")
	return cmd
}

const (
	compact   output = "compact"
	automatic output = "auto"
)

// check refuses flags that are wrong, or that say nothing together.
func (o *monitorOptions) check(flags *pflag.FlagSet) (err error) {
	for _, s := range o.reasons {
		if s, err = events.ParseReason(s); err != nil {
			return fmt.Errorf("--reason: %w", err)
		}
		o.selection.Reasons = append(o.selection.Reasons, s)
	}
	for _, s := range o.destinations {
		r, err := policy.ParseRule(s)
		if err != nil {
			return fmt.Errorf("--destination: %w", err)
		}
		o.selection.Destinations = append(o.selection.Destinations, r)
	}
	for _, f := range o.fields {
		if !slices.Contains(events.Keys(), f) {
			return fmt.Errorf("--fields: there is no field %q: want some of %s", f, strings.Join(events.Keys(), ", "))
		}
	}
	switch {
	case o.selection.Not && o.selection.All():
		return errors.New("--not: want --container, --reason, --destination or --process too, to say what not to show")
	case flags.Changed("limit") && o.limit == 0:
		return errors.New("--limit: want at least 1; leave it out for no limit")
	case !o.follow:
		return errors.New("--follow=false: refusals are not kept, so there would be none to show; want --limit, or --input")
	case flags.Changed("follow") && o.input != "" && o.input != "-":
		return errors.New("--follow: a file is read to its end; want `tail -f FILE | egressbpf monitor --input -`")
	case o.color == "always" && o.output == jsonText:
		return errors.New("--color always: JSON has no colours")
	}
	return nil
}

func (o *monitorOptions) run(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer) error {
	o.selection.Containers = o.belowRoot(o.selection.Containers)
	source, closeSource, err := o.source(ctx, stdin, stderr)
	if err != nil {
		return err
	}
	defer closeSource()
	// A closed pipe ends the command like the end of the stream.
	signal.Ignore(unix.SIGPIPE)
	defer signal.Reset(unix.SIGPIPE)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go awaitClosed(ctx, stdout, cancel)
	err = o.show(ctx, source, stdout, stderr)
	if errors.Is(err, unix.EPIPE) {
		return nil
	}
	return err
}

// belowRoot shortens paths of cgroups to the form that records have.
func (o *monitorOptions) belowRoot(names []string) (short []string) {
	root := o.cgroupRoot
	if root == "" {
		if found, err := cgroup.FindRoot(); err == nil { // or the records are from elsewhere
			root = string(found)
		}
	}
	for _, name := range names {
		if strings.HasPrefix(name, "/") {
			name = filepath.Clean(name)
			if rel, ok := strings.CutPrefix(name, filepath.Clean(root)+"/"); ok {
				name = "/" + rel
			}
		}
		short = append(short, name)
	}
	return short
}

// source opens what the flags name. The caller closes it.
func (o *monitorOptions) source(ctx context.Context, stdin io.Reader, stderr io.Writer) (events.Source, func() error, error) {
	switch o.input {
	case "":
		filter, root, err := o.filter()
		if err != nil {
			return nil, nil, err
		}
		names, err := o.names(stderr)
		if err != nil {
			return nil, nil, err
		}
		names.refresh(ctx)
		o.warnOfAbsent(ctx, filter, root, names, stderr)
		return names.events(filter, root)
	case "-":
		s := events.ReadStored(stdin, "stdin")
		return s, s.Close, nil
	}
	f, err := os.Open(o.input)
	if err != nil {
		return nil, nil, usageError{fmt.Errorf("--input: %w", err)}
	}
	if info, err := f.Stat(); err != nil || info.IsDir() {
		f.Close()
		return nil, nil, usageError{fmt.Errorf("--input %s: want a file, not a directory", o.input)}
	}
	s := events.ReadStored(f, o.input)
	return s, func() error { return errors.Join(s.Close(), f.Close()) }, nil
}

// bufferSize is how many bytes of events can wait in the kernel for a command: 10,000 events.
const bufferSize = 1 << 20

// warnOfAbsent says which containers are not there: a name with a typing error would otherwise
// look like a container to which nothing is refused.
func (o *monitorOptions) warnOfAbsent(ctx context.Context, filter *loader.Filter, root cgroup.Root, names *names, stderr io.Writer) {
	if len(o.selection.Containers) == 0 {
		return
	}
	reader, err := stats.Open(filter, root)
	if err != nil {
		return // what follows fails for the same reason
	}
	defer reader.Close()
	s, err := reader.Read()
	if err != nil {
		return
	}
	names.addTo(ctx, s)
	for _, pattern := range o.selection.Containers {
		selection := events.Selection{Containers: []string{pattern}}
		if !slices.ContainsFunc(s.Containers, func(c stats.Container) bool {
			return selection.Wants(events.Record{Type: events.Refusal, Container: &events.Container{ID: c.ID, Name: c.Name, Cgroup: c.Cgroup}})
		}) {
			fmt.Fprintf(stderr, "warning: no policed container matches --container %s now\n", printable(pattern))
		}
	}
}

// events opens the refusals of this host, with these names. The caller closes what it returns.
func (n *names) events(filter *loader.Filter, root cgroup.Root) (events.Source, func() error, error) {
	node, err := os.Hostname()
	if err != nil {
		return nil, nil, err
	}
	reader, err := events.Open(filter, &events.Names{Node: node, Filter: filter, Root: root, Find: n.find}, bufferSize)
	if err != nil {
		return nil, nil, err
	}
	return reader, reader.Close, nil
}

// show prints what is selected until the stream or ctx ends.
func (o *monitorOptions) show(ctx context.Context, source events.Source, stdout, stderr io.Writer) error {
	p := newRecordPrinter(o, source, stdout, stderr)
	if err := p.begin(); err != nil {
		return err
	}
	for shown := uint64(0); o.limit == 0 || shown < o.limit; {
		r, err := source.Next(ctx)
		switch {
		case errors.Is(err, io.EOF), err != nil && ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		case !o.selection.Wants(r):
			continue
		}
		if err := p.print(r); err != nil {
			return err
		}
		if r.Type == events.Refusal {
			shown++
		}
	}
	return nil
}

// awaitClosed calls closed when nobody can read any more what is written to a pipe: the next
// refusal, which would tell, may not come for days.
func awaitClosed(ctx context.Context, w io.Writer, closed func()) {
	f, ok := w.(*os.File)
	if !ok {
		return
	}
	if info, err := f.Stat(); err != nil || info.Mode()&(os.ModeNamedPipe|os.ModeSocket) == 0 {
		return
	}
	const interval = 1000 // ms, after which to look at ctx
	for ctx.Err() == nil {
		// POLLERR and POLLHUP are reported in any case.
		switch n, err := unix.Poll([]unix.PollFd{{Fd: int32(f.Fd())}}, interval); {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return
		case n > 0:
			closed()
			return
		}
	}
}
