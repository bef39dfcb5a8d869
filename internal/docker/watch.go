package docker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"

	"github.com/egressbpf/egressbpf/internal/text"
)

// Action says what an Event is about.
type Action string

// What happens to a container, or to the view of all containers.
const (
	// Resync comes first, after each reconnection, and when more has happened than the
	// Client keeps: the caller has to ask for all containers. Events follow for
	// everything that happens after it.
	Resync Action = "resync"
	// Lost comes once when there is no connection to the daemon any more, or none yet.
	Lost Action = "lost"

	Start   Action = "start"
	Die     Action = "die"
	Destroy Action = "destroy"
	Rename  Action = "rename"
	Update  Action = "update"
)

// Event says that something has happened to a container.
type Event struct {
	Action Action
	// ID and Name are those of the Container; empty if the event is not about a
	// container.
	ID, Name string
	// Err says why the connection was lost.
	Err error
}

var errNoAnswer = errors.New("no answer in time")

// Watch calls fn for what happens to the daemon's containers, one call at a time, until ctx
// ends, and returns the error of ctx. It reconnects whenever it has to.
//
// While fn runs, events are merged: fn gets only the last event of each container. Start,
// die and destroy take precedence over rename and update, since after them the container
// has to be looked at anew, or not at all.
func (c *Client) Watch(ctx context.Context, fn func(Event)) error {
	q := newQueue()
	following, cancel := context.WithCancel(ctx)
	var follow sync.WaitGroup
	defer follow.Wait()
	defer cancel()
	follow.Go(func() { c.follow(following, q) })
	for {
		e, err := q.next(ctx)
		if err != nil {
			return err
		}
		fn(e)
	}
}

// follow keeps the queue filled until ctx ends.
func (c *Client) follow(ctx context.Context, q *queue) {
	wait := c.pace.retryMin
	for {
		lasted, err := c.stream(ctx, q)
		if ctx.Err() != nil {
			return
		}
		q.lost(fmt.Errorf("events from Docker at %s: %w", c.host, text.Tame(err)))
		if lasted >= c.pace.steady {
			wait = c.pace.retryMin
		}
		// Random, so that many hosts that lose one daemon do not reconnect in step.
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait/2 + rand.N(wait/2+1)):
		}
		wait = min(2*wait, c.pace.retryMax)
	}
}

// stream puts events into the queue as long as one connection lasts. It returns how long
// the connection lasted, and why it ended.
func (c *Client) stream(ctx context.Context, q *queue) (lasted time.Duration, err error) {
	var pings sync.WaitGroup
	defer pings.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := c.connect(); err != nil {
		return 0, err
	}
	conn := c.connection.Load()
	patience := time.AfterFunc(c.pace.answer, func() { cancel(errNoAnswer) })
	defer patience.Stop()

	var opened time.Time
	ready := func() {
		patience.Stop()
		opened = time.Now()
		q.resync()
		pings.Go(func() {
			if err := c.keepAsking(ctx, conn.Client); err != nil {
				cancel(err)
			}
		})
	}
	// The daemon answers before it begins to listen for events. It repeats the events
	// since a time, so that none is missed in between.
	now := time.Now()
	stream := conn.Events(context.WithValue(ctx, streamKey{}, ready), client.EventsListOptions{
		Since:   fmt.Sprintf("%d.%09d", now.Unix(), now.Nanosecond()),
		Filters: make(client.Filters).Add("type", string(events.ContainerEventType)).Add("event", string(Start), string(Die), string(Destroy), string(Rename), string(Update)),
	})
	defer func() {
		if !opened.IsZero() {
			lasted = time.Since(opened)
		}
	}()
	for {
		select {
		case m := <-stream.Messages:
			if e, ok := eventOf(m); ok {
				q.add(e)
			}
		case err := <-stream.Err:
			if cause := context.Cause(ctx); cause != nil {
				return 0, cause
			}
			if err == nil || errors.Is(err, io.EOF) {
				err = errors.New("the connection was closed")
			}
			return 0, err
		}
	}
}

// keepAsking returns an error when the daemon does not answer any more: without events, a
// live stream looks like a dead one.
func (c *Client) keepAsking(ctx context.Context, api *client.Client) error {
	again := time.NewTicker(c.pace.ping)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-again.C:
		}
		asking, cancel := context.WithTimeout(ctx, c.pace.answer)
		_, err := api.Ping(asking, client.PingOptions{})
		cancel()
		if err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// eventOf returns the event in a message. It does not rely on the daemon to send only what
// was asked for.
func eventOf(m events.Message) (Event, bool) {
	e := Event{Action: Action(m.Action), ID: m.Actor.ID, Name: nameOf(m.Actor.Attributes["name"])}
	switch e.Action {
	case Start, Die, Destroy, Rename, Update:
		return e, m.Type == events.ContainerEventType && hexID.MatchString(e.ID)
	}
	return e, false
}

// maxPending is the number of containers for which a queue keeps an event.
const maxPending = 4096

// queue holds the events that have not been delivered.
type queue struct {
	mu      sync.Mutex
	changed chan struct{} // has room for one
	down    error         // to be delivered before the rest
	isDown  bool
	again   bool // a resync is due, before the events
	order   []string
	events  map[string]Event // by id
}

func newQueue() *queue {
	return &queue{changed: make(chan struct{}, 1), events: map[string]Event{}}
}

func (q *queue) signal() {
	select {
	case q.changed <- struct{}{}:
	default:
	}
}

// lost queues one Lost event until the next resync.
func (q *queue) lost(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.isDown {
		return
	}
	q.down, q.isDown, q.again = err, true, false
	q.signal()
}

// resync drops all earlier events, and queues a Resync.
func (q *queue) resync() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.isDown = false
	q.startOver()
}

func (q *queue) startOver() {
	q.again, q.order = true, nil
	clear(q.events)
	q.signal()
}

func (q *queue) add(e Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	before, ok := q.events[e.ID]
	if !ok {
		if len(q.order) == maxPending {
			q.startOver()
			return
		}
		q.order = append(q.order, e.ID)
	} else if minor(e.Action) && !minor(before.Action) {
		e.Action = before.Action
	}
	q.events[e.ID] = e
	q.signal()
}

func minor(a Action) bool { return a == Rename || a == Update }

// next waits for the next event.
func (q *queue) next(ctx context.Context) (Event, error) {
	for {
		if err := ctx.Err(); err != nil {
			return Event{}, err
		}
		if e, ok := q.take(); ok {
			return e, nil
		}
		select {
		case <-ctx.Done():
		case <-q.changed:
		}
	}
}

func (q *queue) take() (Event, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.down != nil:
		err := q.down
		q.down = nil
		return Event{Action: Lost, Err: err}, true
	case q.again:
		q.again = false
		return Event{Action: Resync}, true
	case len(q.order) > 0:
		e := q.events[q.order[0]]
		delete(q.events, q.order[0])
		q.order = q.order[1:]
		return e, true
	}
	return Event{}, false
}
