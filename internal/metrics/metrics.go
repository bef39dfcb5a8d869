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

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

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
	// Events tells what was left out of streams of events; nil if nothing can tell. It must
	// not wait.
	Events func() Events
	// Log is told when the filter cannot be read, and when it can be again; nil if nobody
	// wants to know.
	Log *slog.Logger

	mu     sync.Mutex // one reading at a time
	failed bool       // the last reading
}

// errNoFilter means that a Collector has no Filter.
var errNoFilter = errors.New("the filter cannot be read")

// Describe implements [prometheus.Collector].
func (c *Collector) Describe(ch chan<- *prometheus.Desc) { describe(ch) }

// Collect implements [prometheus.Collector].
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.read()
	failed := !r.successful()
	if c.Log != nil && failed != c.failed {
		if failed {
			c.Log.Error("metrics cannot be read", "err", r.err)
		} else {
			c.Log.Info("metrics can be read again")
		}
	}
	c.failed = failed
	r.Collect(ch)
}

// Write writes all metrics in Prometheus's text format, in an order that does not change. The
// error says why there are no numbers among them, and can wrap what stats.Open returns; what
// is written says so too.
func (c *Collector) Write(w io.Writer) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.read()
	registry := prometheus.NewRegistry()
	if err := registry.Register(r); err != nil {
		return err
	}
	families, err := registry.Gather()
	if err != nil {
		return err
	}
	encoder := expfmt.NewEncoder(w, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, family := range families {
		if err := encoder.Encode(family); err != nil {
			return err
		}
	}
	return r.err
}

// read reads everything.
func (c *Collector) read() *reading {
	r := &reading{engines: c.Engines, reload: c.Reload, events: c.Events}
	if c.Filter == nil {
		r.err = errNoFilter
		return r
	}
	if r.status, r.err = c.Filter.Status(); r.err != nil {
		return r
	}
	if c.Engines != nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		r.uncertain = c.Engines.AddUncovered(ctx, c.Filter, r.status) != nil
	}
	counters, err := stats.Open(c.Filter, c.Root)
	if err != nil {
		r.err = err
		return r
	}
	defer counters.Close()
	most := 0
	if c.Containers {
		most = MaxContainers
	}
	if r.stats, r.leftOut, r.err = counters.ReadFirst(most); r.err != nil {
		return r
	}
	r.err = c.Filter.AddState(r.status)
	return r
}

// Events are refusals of which no event told, though each of them was counted.
type Events struct {
	// Lost is how many were lost because a buffer was full, by the stage at which that was
	// (events.StageKernel, events.StageReader). A stage of which nothing is known is missing.
	Lost map[string]uint64
	// Suppressed is how many were left out because a container had too many of them.
	Suppressed uint64
}

// Reload is the success of the service at putting its configuration in force. The zero value
// is that of a service that has not tried yet.
type Reload struct {
	mu         sync.Mutex
	tried      bool
	successful bool
	last       time.Time // of the last success
}

// Done notes an attempt.
func (r *Reload) Done(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tried, r.successful = true, err == nil
	if r.successful {
		r.last = time.Now()
	}
}
