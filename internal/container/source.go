package container

import (
	"context"
	"errors"
)

// ErrNoContainer means that no container has an id, or goes by a name.
var ErrNoContainer = errors.New("no such container")

// Source is an engine that can be asked what it runs, such as Docker. Its methods may be
// called at the same time.
//
// An engine is believed in what nobody else knows, and in nothing that could be checked:
// whatever it answers, or does not, takes a bounded time and a bounded amount of memory, and
// no id, name or error has characters in it that a terminal could obey. A source leaves the
// cgroup of a container and the id of that empty: these are the kernel's to tell.
//
// Where an engine cannot be reached, List and Inspect return an error. It wraps
// fs.ErrNotExist if there is nothing to be reached, as on a host without that engine, which
// only those need to know who have named it. Watch goes on trying.
type Source interface {
	// Name is what messages call the engine.
	Name() string
	// Host is where it is asked, for messages.
	Host() string
	// Local says whether it is on this machine for certain, so that processes of which it
	// tells are this machine's.
	Local() bool
	// Started says whether the engine runs, as far as can be told without asking it, which
	// could start it.
	Started() bool
	// List returns all running containers.
	List(ctx context.Context) ([]Container, error)
	// Inspect returns the container with a whole id. The error wraps ErrNoContainer if there
	// is none.
	Inspect(ctx context.Context, id string) (Container, error)
	// Watch calls fn, one call at a time, for what becomes of containers, until ctx ends,
	// and returns the error of ctx. While fn is at work, events of one container may be put
	// together.
	Watch(ctx context.Context, fn func(Event)) error
	// Close gives back what the source holds. It does not end what is under way.
	Close() error
}

// Action is what an [Event] is about.
type Action string

const (
	// Resync comes first, after each time without a connection, and when something has been
	// missed: all containers are to be listed. What happens from then on is told.
	Resync Action = "resync"
	// Lost comes once when the engine cannot be reached any more, or not yet.
	Lost Action = "lost"
	// Changed means that a container has been started, or is described otherwise than before.
	Changed Action = "changed"
	// Gone means that a container does not run any more.
	Gone Action = "gone"
)

// Event is what a source tells.
type Event struct {
	// Source is which.
	Source Source
	Action Action
	// ID is the container's; empty if the event is not about one.
	ID string
	// Err says why a source was Lost.
	Err error
}
