package cri

import (
	"context"
	"fmt"
	"math/rand/v2"
	"regexp"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Action says what an [Event] is about.
type Action string

const (
	// Resync comes first, and after the runtime could not be reached: the caller has to ask
	// for all containers. Events follow for everything that happens after it.
	Resync Action = "resync"
	// Lost comes once when the runtime cannot be reached any more, or not yet.
	Lost Action = "lost"
	// Start and Stop are about a container or a sandbox.
	Start Action = "start"
	Stop  Action = "stop"
)

// Event says that something has happened.
type Event struct {
	Action Action
	// ID is the Container's; empty if the event is not about one.
	ID string
	// Err says why the runtime was Lost.
	Err error
}

// Watch calls fn for what happens to containers and sandboxes, one call at a time, until ctx
// ends, and returns the error of ctx.
//
// Not all runtimes tell events, and none says which it has dropped. So what has happened is always
// found by comparing two lists. An event of the runtime, or a send on made, which says that a pod
// has been made, is only a reason to ask for a list at once; without either, Watch asks now and
// then.
func (c *Client) Watch(ctx context.Context, made <-chan struct{}, fn func(Event)) error {
	ctx, cancel := context.WithCancel(ctx)
	var following sync.WaitGroup
	defer following.Wait()
	defer cancel()
	events := newFollower()
	following.Go(func() { events.run(ctx, c) })

	var known map[string]bool // nil while the runtime cannot be reached
	told := false             // that it cannot
	retry := c.pace.retryMin
	var hurry time.Time // until when a new pod is awaited
	var learnt time.Time
	for {
		from := time.Now()
		r, now, err := c.ids(ctx)
		took := time.Since(from)
		wait := c.pace.often
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			if known = nil; !told {
				told = true
				fn(Event{Action: Lost, Err: err})
			}
			// Random, so that not all nodes of a rack come back in step.
			wait = retry/2 + rand.N(retry/2+1)
			retry = min(2*retry, c.pace.retryMax)
		default:
			if known == nil {
				fn(Event{Action: Resync})
				events.reached()
			} else {
				compare(known, now, fn)
			}
			if time.Since(learnt) >= c.pace.rarely {
				compare(nil, c.learn(ctx, r), fn)
				learnt = time.Now()
			}
			known, told, retry = now, false, c.pace.retryMin
			if events.live() {
				wait = c.pace.rarely
			}
		}
		// On a node with many pods, or pods with many labels, a list costs much, and whoever makes
		// pods decides how often there is a reason for one.
		rest := min(c.pace.often, 10*took)
		if time.Now().Before(hurry) {
			wait = min(wait, max(c.pace.soon, rest))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-made:
			hurry = time.Now().Add(c.pace.soonFor)
			if pause(ctx, max(c.pace.soon, rest)) != nil {
				return ctx.Err()
			}
		case <-events.told:
			// Events come in bursts.
			if pause(ctx, max(c.pace.soon/5, rest)) != nil {
				return ctx.Err()
			}
		case <-time.After(wait):
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// compare tells what has stopped and started between two lists, which say of each id whether it is
// that of a sandbox.
func compare(before, now map[string]bool, fn func(Event)) {
	for id := range before {
		if _, ok := now[id]; !ok {
			fn(Event{Action: Stop, ID: id})
		}
	}
	// Sandboxes come first: what holds for their containers is to be known before these run.
	for _, sandbox := range []bool{true, false} {
		for id, is := range now {
			if _, ok := before[id]; !ok && is == sandbox {
				fn(Event{Action: Start, ID: id})
			}
		}
	}
}

// ids asks for all that runs, and says which ids are those of sandboxes.
func (c *Client) ids(ctx context.Context) (running, map[string]bool, error) {
	r, err := c.list(ctx, "")
	if err != nil {
		return r, nil, err
	}
	c.forget(r) // pods come and go for as long as the node runs
	all := make(map[string]bool, len(r.sandboxes)+len(r.containers))
	for id := range r.containers {
		all[id] = false
	}
	for id := range r.sandboxes {
		all[id] = true
	}
	return r, all, nil
}

// follower follows the runtime's own events.
type follower struct {
	told chan struct{} // has room for one
	// again has room for one, and says that the runtime can be reached again.
	again chan struct{}
	mu    sync.Mutex
	open  bool
}

func newFollower() *follower {
	return &follower{told: make(chan struct{}, 1), again: make(chan struct{}, 1)}
}

// live says whether the runtime tells events.
func (f *follower) live() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.open
}

func (f *follower) set(open bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open = open
}

// run follows events until ctx ends, and tries again while there are none. A runtime that has no
// events is asked again after it could not be reached, when another version may have been started,
// and otherwise hardly ever: some log each such call as an error.
func (f *follower) run(ctx context.Context, c *Client) {
	for ctx.Err() == nil {
		err := f.stream(ctx, c) // the lists say whether the runtime can be reached
		f.set(false)
		f.signal()
		if status.Code(err) == codes.Unimplemented {
			select {
			case <-ctx.Done():
			case <-f.again:
			case <-time.After(60 * c.pace.rarely): // it may have been away for too short a time to be missed
			}
			continue
		}
		if pause(ctx, c.pace.rarely) != nil {
			return
		}
	}
}

// reached says that the runtime can be reached, perhaps for the first time.
func (f *follower) reached() {
	select {
	case f.again <- struct{}{}:
	default:
	}
}

func (c *Client) version(ctx context.Context, api runtime.RuntimeServiceClient) (*runtime.VersionResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, c.pace.answer)
	defer cancel()
	return api.Version(ctx, &runtime.VersionRequest{})
}

// sharesEvents are versions that may tell each event to only one of those who follow them.
var sharesEvents = regexp.MustCompile(`^(containerd v?(1|2\.0)|cri-o v?1\.2[67])\.`)

// takesEvents says whether another who follows a runtime's events, such as a kubelet with EventedPLEG,
// would miss those that are told here.
func takesEvents(v *runtime.VersionResponse) bool {
	return sharesEvents.MatchString(v.GetRuntimeName() + " " + v.GetRuntimeVersion())
}

func (f *follower) stream(ctx context.Context, c *Client) error {
	api, err := c.api()
	if err != nil {
		return err
	}
	if version, err := c.version(ctx, api); err != nil || takesEvents(version) {
		return err
	}
	stream, err := api.GetContainerEvents(ctx, &runtime.GetEventsRequest{})
	if err != nil {
		return fmt.Errorf("follow events: %w", err)
	}
	for {
		// A stream that is open may have no events, in CRI-O unless it is configured. Only an
		// event shows that there are any.
		if _, err := stream.Recv(); err != nil {
			return err
		}
		f.set(true)
		f.signal()
	}
}

func (f *follower) signal() {
	select {
	case f.told <- struct{}{}:
	default:
	}
}
