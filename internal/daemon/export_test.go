package daemon

import (
	"context"
	"time"

	"github.com/vishvananda/netlink"

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

// Ports is what the daemon knows of pairs of network devices.
type Ports = ports

// NewPorts returns what a daemon knows that has just begun, and how often it has looked up a
// device since.
func NewPorts() (p *Ports, lookups *int) {
	p, lookups = newPorts(), new(int)
	nameOf := p.nameOf
	p.nameOf = func(index int) string { *lookups++; return nameOf(index) }
	return p, lookups
}

// Leads is what the daemon does about a device of which the kernel tells.
func (p *ports) Leads(l netlink.Link) (device string, ok bool) { return p.leads(l) }

// Pairs makes the daemon look for containers behind a new device, until it gives up. It returns
// the delays after which it looked, as far as it may look at any time.
func (d *Daemon) Pairs(ctx context.Context, name string) (delays []time.Duration) {
	d.newPair(name)
	for d.pairs != nil {
		delays = append(delays, time.Until(d.lookAt).Round(firstLook))
		d.lookForPairs(ctx)
		if d.pairs != nil {
			d.notBefore = time.Time{}
			d.pairs = nil
			d.lookIn(d.nextLook)
		}
	}
	return delays
}
