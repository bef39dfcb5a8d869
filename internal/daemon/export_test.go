package daemon

import (
	"context"
	"time"

	"github.com/egressbpf/egressbpf/internal/container"
)

// SetPace makes daemons look more often. It returns how to undo that.
func SetPace(every time.Duration) (restore func()) {
	check, look := checkEvery, lookEvery
	checkEvery, lookEvery = every, every
	return func() { checkEvery, lookEvery = check, look }
}

// SetPatience shortens what a step may take. It returns how to undo that.
func SetPatience(longest time.Duration) (restore func()) {
	before := patience
	patience = longest
	return func() { patience = before }
}

// Begin does what comes before the first event, and returns how to undo that.
func (d *Daemon) Begin(ctx context.Context) (end func(), err error) {
	d.control = d.Filter.Control()
	config, err := d.Load()
	if err == nil {
		err = d.attach(ctx, config)
	}
	return func() { d.served.Close(); d.control.Close() }, err
}

// Event is what follows on an event.
func (d *Daemon) Event(ctx context.Context, e container.Event) { d.event(ctx, e) }

// Check is the periodic check.
func (d *Daemon) Check(ctx context.Context) { d.check(ctx) }
