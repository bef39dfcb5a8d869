package web

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/egressbpf/egressbpf/internal/events"
)

const (
	// kept is how many records somebody who asks for records gets at first.
	kept = 50
	// queued is how many records wait for a reader that does not keep up.
	queued = 100
)

// Recent are the last records of a stream, and those to come. The zero value has none.
type Recent struct {
	mu      sync.Mutex
	last    []events.Record
	readers map[*reader]bool
}

// reader is somebody who follows the records.
type reader struct {
	records chan events.Record
	// lost is how many found no room in records, since when.
	lost  uint64
	since time.Time
}

// Follow adds the records of a source until that ends, which is no error, or ctx does.
func (r *Recent) Follow(ctx context.Context, source events.Source) error {
	for {
		record, err := source.Next(ctx)
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		r.Add(record)
	}
}

// Add adds a record, and waits for nobody. That a stream has begun is nothing to show.
func (r *Recent) Add(record events.Record) {
	if record.Type == events.Start {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.last) == kept {
		r.last = append(r.last[:0], r.last[1:]...)
	}
	r.last = append(r.last, record)
	for reader := range r.readers {
		reader.add(record)
	}
}

// add queues a record, and before it how many were lost.
func (r *reader) add(record events.Record) {
	if r.lost > 0 {
		lost := events.Record{Type: events.Lost, Time: record.Time, Stage: events.StageReader, Count: r.lost, Since: &r.since}
		select {
		case r.records <- lost:
			r.lost = 0
		default:
		}
	}
	if r.lost == 0 {
		select {
		case r.records <- record:
			return
		default:
			r.since = record.Time
		}
	}
	r.lost++
}

// Last returns the last records, the oldest first.
func (r *Recent) Last() []events.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]events.Record{}, r.last...)
}

// Records returns the last records and those that come until ctx ends; then it closes the
// channel. Who does not keep up loses some and is told so by a record of type lost.
func (r *Recent) Records(ctx context.Context) <-chan events.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	// The last ones have room.
	follow := &reader{records: make(chan events.Record, kept+queued)}
	for _, record := range r.last {
		follow.records <- record
	}
	if r.readers == nil {
		r.readers = map[*reader]bool{}
	}
	r.readers[follow] = true
	context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.readers, follow)
		close(follow.records)
	})
	return follow.records
}
