package container

import (
	"context"
	"errors"
)

// ErrNoContainer means that no container has an id or a name.
var ErrNoContainer = errors.New("no such container")

// Source is an engine that can be asked for its containers, such as Docker. Its methods may
// be called concurrently.
//
// An engine is trusted for what only the engine knows, and for nothing that could be
// checked. Whatever it answers, or if it does not, each call takes a bounded time and a
// bounded amount of memory, and no id, name or error contains characters that could control
// a terminal. A source leaves the cgroup of a container and the cgroup's id empty: the
// kernel tells these.
//
// If an engine cannot be reached, List and Inspect return an error. The error wraps
// fs.ErrNotExist if there is no engine to reach, as on a host without it: that matters only
// to users who named this engine. Watch keeps trying.
type Source interface {
	// Name is the engine's name in messages.
	Name() string
	// Host is the engine's address in messages.
	Host() string
	// Local says whether the engine is certainly on this machine, so that the processes
	// that it names are this machine's.
	Local() bool
	// Started says whether the engine runs, as far as that is known without asking it.
	// Asking could start it.
	Started() bool
	// Dormant says whether the engine is left alone, by Watch too, until Started says that it
	// runs: most hosts have no such engine.
	Dormant() bool
	// List returns all running containers.
	List(ctx context.Context) ([]Container, error)
	// Inspect returns the container with a whole id. The error wraps ErrNoContainer if
	// there is none. Besides another error, Inspect may return what it could find out, with
	// the container's ID.
	Inspect(ctx context.Context, id string) (Container, error)
	// Watch calls fn for what happens to containers, one call at a time, until ctx
	// ends, and returns the error of ctx. While fn runs, events of one container may be
	// merged.
	Watch(ctx context.Context, fn func(Event)) error
	// Close releases what the source holds. It does not end calls in progress.
	Close() error
}

// Action says what an [Event] is about.
type Action string

const (
	// Resync comes first, after each reconnection, and after events were missed: the
	// caller has to list all containers. Events follow for everything that happens
	// after it.
	Resync Action = "resync"
	// Lost comes once when the engine cannot be reached any more, or cannot be reached
	// yet.
	Lost Action = "lost"
	// Changed means that a container was started, or that its description changed.
	Changed Action = "changed"
	// Gone means that a container does not run any more.
	Gone Action = "gone"
)

// Event is a message of a source.
type Event struct {
	// Source is the source of the event.
	Source Source
	Action Action
	// ID is the container's id; empty if the event is not about a container.
	ID string
	// Err says why a source was Lost.
	Err error
}
