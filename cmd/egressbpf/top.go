package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/top"
)

type topOptions struct {
	*globals
	interval  time.Duration
	container string
	sort      string
	color     string
}

func newTop(g *globals) *cobra.Command {
	o := topOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show on a live screen which containers are being stopped",
		Long: `Shows a row for each container, those first that are refused most right now, and
then those that were refused last: how many refusals there are per second and in all,
for what reason, how many mail connections the container has left, and which
destination was refused last, to which process.

The numbers are those of stats. Destinations and processes come from events, which are
best effort: the screen is right without them, but these columns are empty.

  up, down, pgup, pgdown, home, end   select a row
  enter     its counters by reason and its last refusals; esc goes back
  s, S      sort by the next or previous column (also right and left); r reverses
  /         show only rows in whose name, id, destination or process a text occurs
  p, space  pause
  ?         help: what the columns mean
  q         quit`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().DurationVar(&o.interval, "interval", time.Second, "time between two readings of the counters")
	cmd.Flags().StringVar(&o.container, "container", "", "begin with this filter, as if typed after /")
	cmd.Flags().StringVar(&o.sort, "sort", top.DefaultSort, "column to sort by: "+strings.Join(top.Columns(), ", "))
	cmd.Flags().StringVar(&o.color, "color", "auto", "use colours: auto, always or never; auto: unless NO_COLOR is set")
	return cmd
}

func (o *topOptions) run(ctx context.Context, stdout, stderr io.Writer) error {
	if o.interval < 100*time.Millisecond {
		return usageError{errors.New("--interval: want at least 100ms")}
	}
	if !slices.Contains(top.Columns(), o.sort) {
		return usageError{fmt.Errorf("--sort %q: want one of %s", o.sort, strings.Join(top.Columns(), ", "))}
	}
	if !slices.Contains([]string{"auto", "always", "never"}, o.color) {
		return usageError{fmt.Errorf("--color %q: want auto, always or never", o.color)}
	}
	terminal, err := screen(stdout)
	if err != nil {
		return usageError{err}
	}
	// What is printed while the screen is shown would spoil it.
	var warnings bytes.Buffer
	defer func() { _, _ = stderr.Write(warnings.Bytes()) }()
	names, err := o.names(&warnings)
	if err != nil {
		return err
	}
	filter, root, err := o.filter()
	if err != nil {
		return err
	}
	reader, err := stats.Open(filter, root)
	if err != nil {
		return err
	}
	defer reader.Close()
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	source, closeEvents, noEvents := names.events(filter, root)
	if noEvents != nil {
		source = nil
		fmt.Fprintf(&warnings, "warning: destinations and processes are not shown: %s\n", strings.Map(visible, noEvents.Error()))
	} else {
		defer closeEvents()
	}
	return top.Run(ctx, top.Options{
		Events:   source,
		NoEvents: noEvents,
		Read:     topReading(filter, reader, names),
		Interval: o.interval,
		Title:    fmt.Sprintf("%s, egressbpf %s", host, loader.Version()),
		Filter:   o.container,
		Sort:     o.sort,
		Color:    o.color == "always" || o.color == "auto" && os.Getenv("NO_COLOR") == "",
		Output:   terminal,
	})
}

// screen returns stdout if it is a terminal on which a screen can be drawn.
func screen(stdout io.Writer) (*os.File, error) {
	const remedy = "use `egressbpf stats --watch` or `egressbpf monitor`"
	file, ok := stdout.(*os.File)
	if ok {
		_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
		ok = err == nil
	}
	if !ok {
		return nil, fmt.Errorf("stdout is not a terminal: %s", remedy)
	}
	if term := os.Getenv("TERM"); term == "" || term == "dumb" {
		return nil, fmt.Errorf("no screen can be drawn on a terminal of type %q ($TERM): %s", cmp.Or(term, "unknown"), remedy)
	}
	return file, nil
}

// topReading returns what reads the counters, with names.
func topReading(filter *loader.Filter, reader *stats.Reader, names *names) func(context.Context) (top.Reading, error) {
	// statusAge is how long a status is valid: it looks at every process of the host.
	const statusAge = 5 * time.Second
	var (
		enforcing bool
		next      time.Time
	)
	return func(ctx context.Context) (top.Reading, error) {
		begun := time.Now()
		s, err := reader.Read()
		if err != nil {
			next = time.Time{}
			return top.Reading{}, err
		}
		if now := time.Now(); !now.Before(next) {
			status, err := filter.Status()
			if err != nil {
				return top.Reading{}, err
			}
			enforcing, next = status.Enforcing, now.Add(statusAge)
		}
		names.addTo(ctx, s)
		return top.Reading{Time: begun, Stats: s, Enforcing: enforcing}, nil
	}
}
