package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// Inventory is what is known about the containers on this host. Watch, Find, Name and
// AddUncovered may be called at any time. The other methods must not be called concurrently
// with each other.
type Inventory struct {
	accounts []*account
	wake     chan struct{} // has room for one
}

// account is what one source has told.
type account struct {
	Source
	// mu is held to change what follows, and to read it where it may be changed meanwhile.
	mu      sync.RWMutex
	running map[string]Container // by id
	stale   bool                 // the source has to list all containers again
	partly  bool                 // the source did not tell all about the last container
	lost    bool                 // the source cannot be reached
	// failed is why the source did not answer last time, and retry when to ask it again.
	failed error
	retry  time.Time
}

// retryAfter is how long Refresh leaves alone a source that has not answered, and does not let
// the others wait for it.
const retryAfter = 30 * time.Second

// NewInventory returns an Inventory of what the sources tell. The caller closes the
// Inventory, and not the sources.
func NewInventory(sources ...Source) *Inventory {
	v := &Inventory{wake: make(chan struct{}, 1)}
	for _, s := range sources {
		v.accounts = append(v.accounts, &account{Source: s, running: map[string]Container{}})
	}
	return v
}

// Close closes the sources.
func (v *Inventory) Close() error {
	var errs []error
	for _, a := range v.accounts {
		errs = append(errs, a.Close())
	}
	return errors.Join(errs...)
}

// Started says whether the engine of any source runs, as far as that is known without
// asking an engine.
func (v *Inventory) Started() bool {
	return slices.ContainsFunc(v.accounts, func(a *account) bool { return a.Started() })
}

// Refresh asks all sources for their containers, but not one that has just failed to answer. It
// goes on after an error; the errors are joined, with those of before. That there is no engine is
// an error only if there is none of any source. If a source does not answer, what it told before
// stays.
func (v *Inventory) Refresh(ctx context.Context) error {
	var absent, errs []error
	answered := false
	for _, a := range v.accounts {
		if !a.stale || !time.Now().Before(a.retry) {
			_ = a.refresh(ctx) // it is kept
		}
		switch {
		case a.failed == nil:
			answered = answered || a.Started()
		case errors.Is(a.failed, fs.ErrNotExist):
			absent = append(absent, a.failed)
		default:
			errs = append(errs, a.failed)
		}
	}
	if len(errs) > 0 || answered {
		return errors.Join(errs...)
	}
	return errors.Join(absent...)
}

// Ask asks all sources at once for their containers, and returns when all have answered or ctx has ended. Those
// that do not answer are not Stale for that: Watch begins with a Resync.
func (v *Inventory) Ask(ctx context.Context) {
	var all sync.WaitGroup
	for _, a := range v.accounts {
		all.Go(func() {
			if a.refresh(ctx) != nil {
				a.mu.Lock()
				defer a.mu.Unlock()
				a.stale = false
			}
		})
	}
	all.Wait()
}

func (a *account) refresh(ctx context.Context) error {
	all, err := a.List(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stale, a.failed = err != nil, err
	if err != nil {
		a.retry = time.Now().Add(retryAfter)
		return err
	}
	a.lost = false
	a.running = make(map[string]Container, len(all))
	for _, c := range all {
		a.running[c.ID] = c
	}
	return nil
}

// Watch calls fn for events of all sources until ctx ends, which it waits for. Calls for several
// sources may overlap. A source that is Dormant is followed only once Wake has been called after
// it has started.
func (v *Inventory) Watch(ctx context.Context, fn func(Event)) {
	var all sync.WaitGroup
	defer all.Wait()
	watched := map[*account]bool{}
	for {
		for _, a := range v.accounts {
			if !watched[a] && !a.dormant() {
				watched[a] = true
				all.Go(func() { _ = a.Watch(ctx, fn) }) // the error is that of ctx
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-v.wake:
		}
	}
}

// Wake makes Watch look whether a Dormant source has started.
func (v *Inventory) Wake() {
	if slices.ContainsFunc(v.accounts, func(a *account) bool { return a.Dormant() && a.Started() }) {
		select {
		case v.wake <- struct{}{}:
		default:
		}
	}
}

func (a *account) dormant() bool { return a.Dormant() && !a.Started() }

// Update takes in an event, and asks its source for what the event is about. It returns
// whether more or something else may be known about a container than before. The error says
// why the source does not answer, or not all that it was asked. For a lost source, and for one that
// does not tell all, Update returns it once, until the
// source answers again.
func (v *Inventory) Update(ctx context.Context, e Event) (changed bool, err error) {
	a := v.of(e.Source)
	switch e.Action {
	case Lost:
		if a.lost {
			return false, nil
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		a.lost = true
		return false, e.Err
	case Resync:
		return true, a.refresh(ctx)
	case Gone:
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.running, e.ID)
		return false, nil
	}
	if a.stale {
		return false, nil // the source will list all of them anyway
	}
	c, err := a.Inspect(ctx, e.ID)
	if errors.Is(err, ErrNoContainer) {
		return false, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	told := a.partly
	known := a.learn(e.ID, c, err)
	if known && a.partly && told {
		err = nil
	}
	return known, err
}

// learn takes in what Inspect returned for an id, and says whether that is a container. A source
// that does not tell all about one container is still asked for others.
func (a *account) learn(id string, c Container, err error) bool {
	if err != nil && c.ID != id {
		a.stale = true
		return false
	}
	a.running[id], a.partly = c, err != nil
	return true
}

// Learn asks the sources about a container that none of them has told of, and says whether one
// knows it. A source that did not answer when it was last asked is not asked.
func (v *Inventory) Learn(ctx context.Context, id string) bool {
	for _, a := range v.accounts {
		if a.stale {
			continue
		}
		c, err := a.Inspect(ctx, id)
		if errors.Is(err, ErrNoContainer) {
			continue
		}
		a.mu.Lock()
		known := a.learn(id, c, err)
		a.mu.Unlock()
		if known {
			return true
		}
	}
	return false
}

// Stale returns the sources that did not answer when they were last asked. A Resync [Event]
// makes Update ask a source again.
func (v *Inventory) Stale() (sources []Source) {
	for _, a := range v.accounts {
		if a.stale {
			sources = append(sources, a.Source)
		}
	}
	return sources
}

// Lost says whether a source was lost and has not answered since.
func (v *Inventory) Lost(s Source) bool { return v.of(s).lost }

// of returns the account of a source, which must be in the inventory.
func (v *Inventory) of(s Source) *account {
	return v.accounts[slices.IndexFunc(v.accounts, func(a *account) bool { return a.Source == s })]
}

// Find returns the running container with an id, as its source described it.
func (v *Inventory) Find(id string) (Container, bool) {
	for _, a := range v.accounts {
		if c, ok := a.find(id); ok {
			return c, true
		}
	}
	return Container{}, false
}

func (a *account) find(id string) (Container, bool) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	c, ok := a.running[id]
	return c, ok
}

// Name returns the name of the container with an id; empty if no source knows the
// container.
func (v *Inventory) Name(id string) string {
	c, _ := v.Find(id)
	return c.Name
}

// Running returns the containers that have a cgroup with a container's name, with what the
// sources told about them.
func (v *Inventory) Running(root cgroup.Root) (all []Container, err error) {
	found, err := root.Outermost("/", func(rel string) bool { return cgroup.ContainerID(rel) != "" })
	if err != nil {
		return nil, fmt.Errorf("look for containers: %w", err)
	}
	for _, at := range found {
		all = append(all, v.container(at))
	}
	return all, nil
}

// Sandboxes returns the sandboxes that have no cgroup of their own, which are missing from what
// Running has returned: some runtimes run no process for them. Each gets a path in the cgroup of its
// pod, where there is no cgroup.
func (v *Inventory) Sandboxes(root cgroup.Root, running []Container) (all []Container, err error) {
	has := map[string]bool{}
	for _, c := range running {
		has[c.ID] = true
	}
	for _, a := range v.accounts {
		all = append(all, a.sandboxes(has)...)
	}
	if len(all) == 0 {
		return nil, nil
	}
	pods, err := root.Pods()
	if err != nil {
		return nil, fmt.Errorf("look for pods: %w", err)
	}
	placed := all[:0]
	for _, c := range all {
		if pod := pods[c.Pod.UID]; pod != "" {
			c.Cgroup = pod + "/" + c.ID
			placed = append(placed, c)
		}
	}
	return placed, nil
}

// sandboxes returns those that are not among others.
func (a *account) sandboxes(others map[string]bool) (all []Container) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for id, c := range a.running {
		if c.Pod.Container == Sandbox && !others[id] {
			all = append(all, c)
		}
	}
	return all
}

// Locate returns the running container with an id, as Running does, and finds its cgroup by
// the process that its source has named. ok is false if there is no such process in a cgroup
// of that container: then only Running can tell where the container is.
func (v *Inventory) Locate(root cgroup.Root, id string) (c Container, ok bool) {
	told, _ := v.Find(id)
	if told.Pid == 0 {
		return c, false
	}
	rel, err := cgroup.OfProcess(told.Pid)
	if err != nil {
		return c, false
	}
	// The name of the cgroup tells whether the source is right.
	rel = cgroup.OutermostContainer(rel)
	if cgroup.ContainerID(rel) != id {
		return c, false
	}
	at, err := root.ID(rel)
	if err != nil {
		return c, false
	}
	return v.container(cgroup.Cgroup{Rel: rel, ID: at}), true
}

// container returns the container in a cgroup, with what a source told about it.
func (v *Inventory) container(at cgroup.Cgroup) Container {
	is := IdentityOf(at.Rel, at.ID)
	c, _ := v.Find(is.ID)
	is.Name = c.Name
	c.Identity = is
	return c
}
