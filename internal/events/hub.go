package events

import (
	"context"
	"io"
	"sync"
	"time"
)

const (
	// queue is how many records can wait for one subscriber.
	queue = 1024
	// retry is how long a Hub waits before it opens its source again.
	retry = 5 * time.Second
)

// Hub hands the records of one source to several subscribers. A slow one disturbs nobody: what
// its queue has no room for is lost to it, and it is told how much that was.
type Hub struct {
	// Open opens the source, and again after an error. The Hub closes it.
	Open func() (SourceCloser, error)
	// Failed is told why the source cannot be read, once until it can be again.
	Failed func(error)

	mu          sync.Mutex
	subscribers map[*Subscription]bool
	ended       bool
	lost        uint64
}

// SourceCloser is a [Source] that has to be closed.
type SourceCloser interface {
	Source
	io.Closer
}

// Run reads from the source until ctx ends. Then subscriptions end.
func (h *Hub) Run(ctx context.Context) {
	defer h.end()
	told := false
	for ctx.Err() == nil {
		err := h.read(ctx, func() { told = false })
		if ctx.Err() != nil {
			return
		}
		if !told && err != nil && h.Failed != nil {
			h.Failed(err)
			told = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
}

// read reads until an error, and calls opened if the source could be opened.
func (h *Hub) read(ctx context.Context, opened func()) error {
	source, err := h.Open()
	if err != nil {
		return err
	}
	defer source.Close()
	opened()
	for {
		record, err := source.Next(ctx)
		if err != nil {
			return err
		}
		h.publish(record)
	}
}

func (h *Hub) publish(record Record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.subscribers {
		h.lost += s.push(record)
	}
}

func (h *Hub) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	for s := range h.subscribers {
		close(s.records)
	}
	h.subscribers = nil
}

// Lost returns how many records subscribers have lost.
func (h *Hub) Lost() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lost
}

// Subscription is what a subscriber of a [Hub] gets. It is a [Source].
type Subscription struct {
	hub     *Hub
	records chan Record
	// lost is how many records did not fit since, which the hub's lock guards.
	lost  uint64
	since time.Time
}

// Subscribe returns what is published from now on. The caller closes the Subscription.
func (h *Hub) Subscribe() *Subscription {
	// One place is for the record that tells what was lost.
	s := &Subscription{hub: h, records: make(chan Record, queue+1)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended {
		close(s.records)
		return s
	}
	if h.subscribers == nil {
		h.subscribers = map[*Subscription]bool{}
	}
	h.subscribers[s] = true
	return s
}

// push queues a record, and returns how many were lost by that.
func (s *Subscription) push(record Record) uint64 {
	if len(s.records) >= queue {
		if s.lost == 0 {
			s.since = record.Time
		}
		n := uint64(1)
		if record.Type == Suppressed || record.Type == Lost {
			n = record.Count
		}
		s.lost += n
		return n
	}
	if s.lost > 0 {
		since := s.since
		s.records <- Record{Type: Lost, Time: record.Time, Node: record.Node, Stage: StageReader, Count: s.lost, Since: &since}
		s.lost = 0
	}
	s.records <- record
	return 0
}

// Next implements [Source]. The error is io.EOF once the Hub has ended.
func (s *Subscription) Next(ctx context.Context) (Record, error) {
	select {
	case record, ok := <-s.records:
		if !ok {
			return Record{}, io.EOF
		}
		return record, nil
	case <-ctx.Done():
		return Record{}, ctx.Err()
	}
}

// Close ends the subscription.
func (s *Subscription) Close() error {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	delete(s.hub.subscribers, s)
	return nil
}
