// Package top is a live screen of the refusals of each container. The counters, which are read
// again and again, tell how many there are; events, if there are any, tell the last ones.
package top

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/colorprofile"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/stats"
)

// Reading is what the filter tells at one time.
type Reading struct {
	// Time is when it was begun.
	Time time.Time
	// Stats are the counters, with the names of the containers.
	Stats *stats.Stats
	// Enforcing is whether packets are dropped, as read back from the kernel.
	Enforcing bool
}

// Options are those of a screen.
type Options struct {
	// Read returns the present counters. It is called again after an error.
	Read func(context.Context) (Reading, error)
	// Interval is the time between two readings.
	Interval time.Duration
	// Events are refusals as they happen; nil if there are none to be had.
	Events events.Source
	// NoEvents is why Events is nil.
	NoEvents error
	// Title names this host and program.
	Title string
	// Filter is the text to begin with as the filter.
	Filter string
	// Sort is one of Columns.
	Sort string
	// Color is whether to use colours.
	Color bool
	// Output is the terminal.
	Output *os.File
}

// Run shows the screen until the user quits or the context ends.
func Run(ctx context.Context, o Options) error {
	profile := colorprofile.Ascii
	if o.Color {
		profile = colorprofile.ANSI
	}
	inner, cancel := context.WithCancel(ctx)
	program := tea.NewProgram(newModel(o), tea.WithContext(inner), tea.WithOutput(o.Output),
		tea.WithColorProfile(profile), tea.WithoutSignalHandler())
	var background sync.WaitGroup
	background.Go(func() { read(inner, o, program.Send) })
	if o.Events != nil {
		background.Go(func() { follow(inner, o.Events, program.Send) })
	}
	_, err := program.Run()
	// Nothing reads any more from what the caller closes.
	cancel()
	background.Wait()
	if ctx.Err() != nil && errors.Is(err, tea.ErrProgramKilled) {
		return nil
	}
	return err
}

// read reads at each interval.
func read(ctx context.Context, o Options, send func(tea.Msg)) {
	tick := time.NewTicker(o.Interval)
	defer tick.Stop()
	for {
		r, err := o.Read(ctx)
		send(readMsg{r, err})
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

const (
	// batchTime is how long records are collected before the screen gets them: each message
	// draws the screen.
	batchTime = 100 * time.Millisecond
	// batchLength is how many there can be. More of them wait in the source, which counts
	// what it loses.
	batchLength = 4096
)

// follow passes records on in batches.
func follow(ctx context.Context, source events.Source, send func(tea.Msg)) {
	records := make(chan events.Record, batchLength)
	var passing sync.WaitGroup
	passing.Go(func() {
		for r := range records {
			batch := recordsMsg{r}
			if len(records) < batchLength/2 {
				wait(ctx, batchTime)
			}
			for range len(records) {
				batch = append(batch, <-records)
			}
			send(batch)
		}
	})
	err := pass(ctx, source, records)
	close(records)
	passing.Wait()
	if errors.Is(err, io.EOF) {
		err = nil
	}
	send(endMsg{err})
}

// pass passes on all records until there are no more.
func pass(ctx context.Context, source events.Source, records chan<- events.Record) error {
	for {
		r, err := source.Next(ctx)
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case records <- r:
		}
	}
}

func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
