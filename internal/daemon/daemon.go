// Package daemon keeps the filter in force, and applies the policy's rules to containers as
// they start. The filter stays in force without it.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/rules"
)

// patience is how long one step may take.
var patience = 20 * time.Second

// firstAnswer is how long the daemon waits for what the sources know when it takes over, and revocation if the rules
// are others.
const firstAnswer, revocation = time.Second, 5 * time.Second

// coveragePatience is how long the daemon looks for containers that are not covered.
// Containers that start meanwhile wait for their rules.
const coveragePatience = 2 * time.Second

// soon is how long the daemon waits before it looks through all cgroups for a container that
// has started. Others may start meanwhile, and until then they get the defaults.
const soon = 100 * time.Millisecond

// checkEvery is how often the daemon checks that the filter is as it should be, and
// lookEvery how often it looks for a changed config file.
var checkEvery, lookEvery = 30 * time.Second, time.Second

// Notify tells the service manager a state, as sd_notify(3) does.
type Notify func(state string)

// Daemon is what [Daemon.Run] works with.
type Daemon struct {
	Filter *loader.Filter
	Root   cgroup.Root
	// Containers is the inventory, which follows the events of its sources.
	Containers *container.Inventory
	// Load reads the configuration. File is the file that Load reads; empty if there is
	// none.
	Load func() (policy.Config, error)
	File string
	Log  *slog.Logger
	// Notify and Watchdog belong to the service manager. It expects a message from the
	// daemon within each Watchdog; none if that is 0.
	Notify   Notify
	Watchdog time.Duration
	// Reload makes the daemon read the configuration again.
	Reload <-chan os.Signal
	// Loaded is told how each attempt to put the configuration in force went; nil if nobody
	// wants to know.
	Loaded func(error)
	// InForce is told each configuration that is put in force; nil if nobody wants to know.
	InForce func(policy.Config)

	config policy.Config
	// background is what Run has started, and waits for when it ends.
	background sync.WaitGroup
	// control changes what holds for containers.
	control *loader.Control
	// due is when the rules are to be applied to all containers again; nil if nothing asks
	// for that. behind is whether they could not be applied to all last time.
	due    <-chan time.Time
	behind bool
	revoke bool // rules have changed: containers that no source knows lose what earlier rules gave them
	again  bool // a configuration was read, but could not be put in force
	// tookOver is whether the last attach has found a policy in force.
	tookOver bool
	// optional are the hooks and defences that the last attach put in force although
	// the filter works without them. Which these are depends on the kernel.
	optional []string
	// fingerprint is the filter's fingerprint at the last look. It changes with
	// whatever others do to the filter.
	fingerprint string
	// served tells other commands that this process is running.
	served *os.File
	// short is whether little room for containers was left at the last look.
	short bool
	// uncovered are the ids of the containers that were not covered at the last look.
	uncovered map[string]bool
	// attached is the status after the last attach.
	attached *loader.Status
	// pairs tells at lookAt, not before notBefore, that the daemon is to look whether new
	// devices lead to containers; nil if it is not to. nextLook is how long it waits after
	// that, at least, until it looks again.
	pairs             <-chan time.Time
	lookAt, notBefore time.Time
	nextLook          time.Duration
}

// Run puts the filter in force and follows the containers until ctx ends, which is no
// error. An error means that the filter could not be put in force; what was in force before
// stays.
func (d *Daemon) Run(ctx context.Context) error {
	d.control = d.Filter.Control()
	defer d.control.Close()
	file := newWatched(d.File)
	watchCtx, stopWatching := context.WithCancel(ctx)
	defer func() { stopWatching(); d.background.Wait() }()
	// Before the attach, which finds the devices that exist.
	devices := d.devices(watchCtx)
	d.follow(ctx, devices != nil)
	defer d.follow(context.WithoutCancel(ctx), false)
	if err := d.load(ctx); err != nil {
		return err
	}
	defer func() {
		if d.served != nil {
			d.served.Close()
		}
	}()
	if d.tookOver && len(d.config.Containers) > 0 {
		// Or containers would lose what earlier rules gave them, and pods what was noted of them, until their
		// source has told of them, also if the rules still give it.
		patience := firstAnswer
		if d.revoke {
			patience = revocation
		}
		asking, done := context.WithTimeout(ctx, patience)
		d.Containers.Ask(asking)
		done()
	}
	d.apply(ctx)
	d.Notify("READY=1\n" + d.statusText(ctx))

	events := make(chan container.Event)
	d.background.Go(func() {
		d.Containers.Watch(watchCtx, func(e container.Event) {
			select {
			case events <- e:
			case <-watchCtx.Done():
			}
		})
	})

	check, look := time.NewTicker(checkEvery), time.NewTicker(lookEvery)
	defer check.Stop()
	defer look.Stop()
	var watchdog <-chan time.Time
	if d.Watchdog > 0 {
		t := time.NewTicker(d.Watchdog / 2)
		defer t.Stop()
		watchdog = t.C
	}
	for {
		select {
		case <-ctx.Done():
			d.Notify("STOPPING=1")
			d.Log.Info("stopped; the filter stays in force")
			return nil
		case e := <-events:
			d.event(ctx, e)
		case <-d.due:
			d.apply(ctx)
		case new := <-devices:
			d.appeared(ctx, new)
		case <-d.pairs:
			d.lookForPairs(ctx)
		case <-d.Reload:
			d.reload(ctx)
		case <-look.C:
			d.Containers.Wake() // a kubelet may have been started
			if file.changed() {
				d.reload(ctx)
			}
			if d.Filter.Fingerprint() != d.fingerprint {
				d.check(ctx)
			}
		case <-check.C:
			d.check(ctx)
		case <-watchdog:
			d.Notify("WATCHDOG=1")
		}
	}
}

// load reads the configuration and puts it in force.
func (d *Daemon) load(ctx context.Context) error {
	config, err := d.Load()
	d.again = false
	if err == nil {
		err = d.attach(ctx, config)
		d.again = err != nil
	}
	if d.Loaded != nil {
		d.Loaded(err)
	}
	return err
}

// attach puts a configuration in force.
func (d *Daemon) attach(ctx context.Context, config policy.Config) error {
	before, err := d.Filter.Status()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := d.Filter.Attach(ctx, config.Cgroups, config.Policy); err != nil {
		return err
	}
	// What former rules gave is taken back, even from containers that no source knows
	// now.
	d.tookOver = before.Policy != nil
	d.revoke = d.revoke || before.Policy != nil && !reflect.DeepEqual(before.Policy.Containers, config.Containers)
	d.config = config
	if d.InForce != nil {
		d.InForce(config)
	}
	if err := d.serve(); err != nil {
		d.Log.Warn("other commands cannot tell that the service runs", "err", err)
	}
	d.fingerprint = d.Filter.Fingerprint()
	s, err := d.Filter.Status()
	if err != nil {
		return err
	}
	d.optional, d.attached = optional(s), s
	d.Log.Info("in force", "mode", s.Mode, "cgroups", s.Cgroups)
	for _, defence := range s.Defences {
		if !defence.Active {
			d.Log.Warn("no defence "+defence.Name, "reason", defence.Reason)
		}
	}
	return nil
}

// serve tells other commands that this process keeps the filter as it is. A detach removes
// the directory that it uses for this.
func (d *Daemon) serve() error {
	served, err := d.Filter.Serve()
	if err != nil {
		return err
	}
	if d.served != nil {
		d.served.Close()
	}
	d.served = served
	return nil
}

// optional returns the names of the hooks and defences in force that the filter works
// without.
func optional(s *loader.Status) (names []string) {
	for _, h := range s.Hooks {
		// Hooks at devices come and go with the devices, others with the tunnels. The
		// defence reports what is missing.
		if h.Attached && s.Optional(h) && h.Device == "" && !loader.ForTunnels(h) {
			names = append(names, h.Name)
		}
	}
	for _, defence := range s.Defences {
		if defence.Active {
			names = append(names, defence.Name)
		}
	}
	return names
}

// reload puts a changed configuration in force. A bad configuration changes nothing.
func (d *Daemon) reload(ctx context.Context) {
	d.Notify(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", monotonic().Microseconds()))
	defer func() { d.Notify("READY=1\n" + d.statusText(ctx)) }()
	if err := d.load(ctx); err != nil {
		d.Log.Error("configuration refused; the previous one stays in force", "err", err)
	}
	// Also after an error, which may have come when the policy was in force already.
	d.apply(ctx)
}

// event takes in an event of a source, and applies the rules if they may be due. For an event
// about a container it looks at that container alone.
func (d *Daemon) event(ctx context.Context, e container.Event) {
	if !d.learn(ctx, e) {
		return
	}
	switch {
	case e.Action != container.Changed:
		d.apply(ctx)
		return
	case d.due != nil:
		// All are looked at soon. Another command may hold the lock for long, and one
		// container after another would wait for it.
		return
	}
	c, ok := d.Containers.Locate(d.Root, e.ID)
	if ok {
		ok = d.applyTo(ctx, c)
	}
	if !ok || d.behind {
		d.due = time.After(soon)
	}
}

// learn takes in an event of a source, and says whether rules may be due.
func (d *Daemon) learn(ctx context.Context, e container.Event) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	lost := d.Containers.Lost(e.Source)
	changed, err := d.Containers.Update(ctx, e)
	name, host := e.Source.Name(), e.Source.Host()
	switch {
	case err == nil && lost && !d.Containers.Lost(e.Source):
		d.Log.Info(name + " answers again")
	case err == nil:
	case e.Action == container.Lost:
		d.Log.Warn(name+" does not answer; new containers get the defaults", "host", host, "err", err)
	case e.Action == container.Resync:
		d.Log.Warn("cannot list the containers of "+name, "host", host, "err", err)
	default:
		d.Log.Warn("cannot look up a container; it may get the defaults until "+name+" answers", "id", e.ID, "err", err)
	}
	return changed
}

// apply brings all containers to the rules.
func (d *Daemon) apply(ctx context.Context) {
	d.due = nil
	changed := 0
	err := d.change(ctx, func(state *maps.State) (err error) {
		changed, err = rules.Apply(d.Root, state, d.config.Policy, d.Containers, d.revoke)
		return err
	})
	if d.behind = err != nil; err != nil {
		d.Log.Error("rules not applied to all containers", "err", err)
		if errors.Is(err, loader.ErrBusy) {
			d.due = time.After(soon)
		}
		return
	}
	d.revoke = false
	if changed > 0 {
		d.Log.Info("rules applied", "containers", changed)
	}
}

// applyTo brings a container to the rules, and says whether it could.
func (d *Daemon) applyTo(ctx context.Context, c container.Container) bool {
	changed := false
	err := d.change(ctx, func(state *maps.State) (err error) {
		changed, err = rules.ApplyTo(d.Root, state, d.config.Policy, c)
		return err
	})
	if err != nil {
		d.Log.Error("rules not applied to a container", "id", c.ID, "err", err)
	} else if changed {
		d.Log.Info("rules applied", "container", cmp.Or(c.Name, c.ID))
	}
	return err == nil
}

func (d *Daemon) change(ctx context.Context, do func(*maps.State) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return d.control.Change(ctx, do)
}

// check repairs what others have broken, and reports what is wrong.
func (d *Daemon) check(ctx context.Context) {
	for _, source := range d.Containers.Stale() {
		d.learn(ctx, container.Event{Source: source, Action: container.Resync})
	}
	if d.again {
		d.reload(ctx)          // the reason may have passed
		d.Notify("WATCHDOG=1") // both this and what follows can wait for the lock
	}
	d.closeTunnels(ctx)
	if err := d.Filter.ForgetDevices(); err != nil {
		d.Log.Error("cannot remove the buckets of devices that are gone", "err", err)
	}
	d.fingerprint = d.Filter.Fingerprint()
	s, err := d.Filter.Status()
	if err == nil {
		err = d.Filter.AddState(s)
	}
	if err != nil {
		d.Log.Error("cannot read the status", "err", err)
		return
	}
	d.room(s)
	missing := d.missing(s)
	if len(missing) > 0 {
		d.Log.Warn("attaching again", "missing", missing)
		if err := d.attach(ctx, d.config); err != nil {
			d.Log.Error("cannot attach again", "err", err)
		}
	}
	d.apply(ctx)
	if len(missing) > 0 {
		d.Notify(d.statusText(ctx))
	} else {
		d.Notify(d.textOf(ctx, s))
	}
}

// missing returns what another attach should put in force again.
func (d *Daemon) missing(s *loader.Status) (names []string) {
	for _, h := range s.Hooks {
		if (!h.Attached || h.Reason != "") && !s.Optional(h) {
			names = append(names, h.Name)
		}
	}
	now := optional(s)
	for _, name := range d.optional {
		if !slices.Contains(now, name) {
			names = append(names, name)
		}
	}
	// These devices may have been made while the last attach looked for devices.
	for _, device := range s.Unjudged {
		names = append(names, "host_side of "+device)
	}
	for _, name := range s.Unpinned {
		names = append(names, "pin of "+name)
	}
	for _, path := range d.config.Cgroups {
		if !d.policed(s, path) {
			names = append(names, path)
		}
	}
	if len(s.Cgroups) == 0 {
		names = append(names, "all")
	} else if s.Policy == nil || !s.Policy.Equal(d.config.Policy) {
		names = append(names, "the policy, since another one was attached")
	}
	if s.Room != nil && s.Room.Without > 0 && s.Room.Containers < s.Room.Of {
		names = append(names, "buckets that there is room for now")
	}
	return names
}

// policed returns whether a configured cgroup, or one around it, is policed.
func (d *Daemon) policed(s *loader.Status, path string) bool {
	rel, err := d.Root.Rel(path)
	return err != nil || slices.ContainsFunc(s.Cgroups, func(policed string) bool {
		of, err := d.Root.Rel(policed)
		return err == nil && cgroup.Within(rel, of)
	})
}

// room warns when little room for containers is left.
func (d *Daemon) room(s *loader.Status) {
	short := s.Room != nil && s.Room.Short()
	if short && !d.short {
		d.Log.Warn("there is little room for containers: see egressbpf status", "containers", s.Room.Containers, "of", s.Room.Of, "removed", s.Room.Removed, "without", s.Room.Without)
	}
	d.short = short
}

// statusText returns the line that systemctl status shows.
func (d *Daemon) statusText(ctx context.Context) string {
	s, err := d.Filter.Status()
	if err != nil {
		return "STATUS=" + err.Error()
	}
	return d.textOf(ctx, s)
}

// textOf returns that line for a status, to which it adds the uncovered containers that only
// their source knows to be containers.
func (d *Daemon) textOf(ctx context.Context, s *loader.Status) string {
	ctx, cancel := context.WithTimeout(ctx, coveragePatience)
	defer cancel()
	if err := d.Containers.AddUncovered(ctx, d.Filter, s); err != nil {
		d.Log.Warn("cannot check whether all containers are covered", "err", err)
	}
	text := "not enforcing"
	if s.Enforcing {
		text = "enforcing"
	}
	uncovered := map[string]bool{}
	for _, u := range s.Uncovered {
		uncovered[u.ID] = true
		if !d.uncovered[u.ID] {
			d.Log.Warn("container not covered", "id", u.ID, "name", u.Name, "cgroup", u.Cgroup)
		}
	}
	if d.uncovered = uncovered; len(uncovered) > 0 {
		text += fmt.Sprintf(", containers not covered: %d", len(uncovered))
	}
	return "STATUS=" + text
}
