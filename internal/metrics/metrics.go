// Package metrics tells Prometheus what the filter does. What it tells is read from the kernel
// when Prometheus asks.
package metrics

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/stats"
)

const (
	// MaxContainers is how many containers have series of their own: the oldest ones.
	MaxContainers = 2000
	// patience is how long a reading waits for an engine that alone knows of a container
	// whether it is covered.
	patience = 2 * time.Second
)

// Engines tell what only they know about containers. A container.Inventory does.
type Engines interface {
	Find(id string) (container.Container, bool)
	AddUncovered(ctx context.Context, filter *loader.Filter, s *loader.Status) error
}

// Collector reads the filter's maps and its status each time it is asked. If something cannot
// be read, it says so instead of any numbers.
type Collector struct {
	// Filter is the filter to read; nil if it cannot be.
	Filter *loader.Filter
	Root   cgroup.Root
	// Engines may be nil.
	Engines Engines
	// Containers is whether containers have series of their own.
	Containers bool
	// Reload is what the service knows about its policy; nil outside of the service.
	Reload *Reload
	// LostByReaders tells how many events the service's own readers have lost; nil outside of
	// the service. It must not wait.
	LostByReaders func() uint64
	// Log is told when the filter cannot be read, and when it can be again; nil if nobody
	// wants to know.
	Log *slog.Logger

	// MaxAge is how old a reading may be that is told again; 0 for none. A reading of
	// thousands of containers costs some milliseconds.
	MaxAge time.Duration

	mu     sync.Mutex     // one reading at a time
	failed bool           // the last reading
	last   *Reading       // nil if none may be told again
	status *loader.Status // the last one; nil if there is none
}

// errNoFilter means that a Collector has no Filter.
var errNoFilter = errors.New("the filter cannot be read")

// Write writes all metrics in Prometheus's text format, in an order that does not change. The
// error says why there are no numbers among them, and can wrap what stats.Open returns; what
// is written says so too. Others can call Write while w takes its time.
func (c *Collector) Write(w io.Writer) error {
	r := c.Read()
	if err := r.Write(w); err != nil {
		return err
	}
	return r.err
}

// Read reads everything.
func (c *Collector) Read() *Reading {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last != nil && time.Since(c.last.at) < c.MaxAge {
		return c.last
	}
	r := &Reading{at: time.Now()}
	leftOut := 0
	leftOut, r.err = c.readFilter(r)
	r.label(leftOut, c.Engines)
	if c.Reload != nil {
		r.reload = c.Reload.outcome()
	}
	if c.LostByReaders != nil {
		lost := c.LostByReaders()
		r.lostByReaders = &lost
	}
	failed := !r.successful()
	if c.Log != nil && failed != c.failed {
		if failed {
			c.Log.Error("metrics cannot be read", "err", r.err)
		} else {
			c.Log.Info("metrics can be read again")
		}
	}
	c.failed = failed
	if c.MaxAge > 0 {
		c.last = r
	}
	return r
}

// readFilter reads the filter. leftOut is how many containers it leaves out.
func (c *Collector) readFilter(r *Reading) (leftOut int, err error) {
	if c.Filter == nil {
		return 0, errNoFilter
	}
	if r.status, err = c.Filter.StatusAfter(c.status); err != nil {
		return 0, err
	}
	c.status = r.status
	if c.Engines != nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		r.uncertain = c.Engines.AddUncovered(ctx, c.Filter, r.status) != nil
	}
	counters, err := stats.Open(c.Filter, c.Root)
	if err != nil {
		return 0, err
	}
	defer counters.Close()
	most := 0
	if c.Containers {
		most = MaxContainers
	}
	if r.stats, leftOut, err = counters.ReadFirst(most, r.status); err != nil {
		return 0, err
	}
	if r.missed, err = counters.Missed(); err != nil {
		return 0, err
	}
	return leftOut, counters.AddState(r.status)
}

// Reload is the success of the service at putting its configuration in force. The zero value
// is that of a service that has not tried yet.
type Reload struct {
	mu   sync.Mutex
	last outcome
}

// outcome is that of the attempts so far.
type outcome struct {
	tried, successful bool      // the last one
	last              time.Time // when one was successful
}

// Done notes an attempt.
func (r *Reload) Done(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last.tried, r.last.successful = true, err == nil
	if r.last.successful {
		r.last.last = time.Now()
	}
}

func (r *Reload) outcome() outcome {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}
