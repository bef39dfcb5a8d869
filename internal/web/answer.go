package web

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/egressbpf/egressbpf/internal/events"
)

// The process that serves asks by messages of one byte each, one after the other. The answer is
// a message of one byte: accepted, with the end of a pipe from which to read what was asked
// for; or busy.
const (
	askMetrics = 'm' // Prometheus's text format
	askPage    = 'p' // a Page as JSON
	askEvents  = 'e' // records as lines of JSON, until the reader closes the pipe

	accepted = 'a'
	busy     = 'b'
)

// What the process that serves can take of the service. It may have been taken over: it gets
// answers that anybody gets, so many at the same time, and none is waited for.
const (
	perSecond = 10
	burst     = 20
	// answerPatience is for those who do not read their answer.
	answerPatience = 20 * time.Second
)

var atOnce = map[byte]int{askMetrics: 2, askPage: 4, askEvents: 8}

// Source is what is served.
type Source struct {
	// Metrics writes metrics in Prometheus's text format. If there are no numbers, what it
	// writes says why; an error is one of the writer alone.
	Metrics func(io.Writer) error
	// Page returns what the page shows, except for the records.
	Page func() Page
	// Recent are the refusals that the page shows; nil if they are not known.
	Recent *Recent
}

// answers answers a process that serves.
type answers struct {
	source Source
	slots  map[byte]chan struct{}
	rate   *rate.Limiter
}

func newAnswers(source Source) *answers {
	a := &answers{source: source, slots: map[byte]chan struct{}{}, rate: rate.NewLimiter(perSecond, burst)}
	for what, n := range atOnce {
		a.slots[what] = make(chan struct{}, n)
	}
	return a
}

// errQuestion means that a process asks what it cannot ask.
var errQuestion = errors.New("it asks for something that there is not")

// serve answers until asked is closed, or something else is asked than there is.
func (a *answers) serve(ctx context.Context, asked *net.UnixConn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		var question [2]byte
		n, err := asked.Read(question[:])
		if err != nil || n == 0 {
			return nil
		}
		if n != 1 || a.slots[question[0]] == nil {
			return errQuestion
		}
		if err := asked.SetWriteDeadline(time.Now().Add(answerPatience)); err != nil {
			return err
		}
		if err := a.answer(ctx, asked, question[0]); err != nil {
			return err
		}
	}
}

// answer answers one question.
func (a *answers) answer(ctx context.Context, asked *net.UnixConn, what byte) error {
	slot := a.slots[what]
	select {
	case slot <- struct{}{}:
	default:
		_, err := asked.Write([]byte{busy})
		return err
	}
	free := func() { <-slot }
	if !a.rate.Allow() {
		free()
		_, err := asked.Write([]byte{busy})
		return err
	}
	from, to, err := os.Pipe()
	if err != nil {
		free()
		return err
	}
	defer from.Close()
	if _, _, err := asked.WriteMsgUnix([]byte{accepted}, unix.UnixRights(int(from.Fd())), nil); err != nil {
		free()
		to.Close()
		return err
	}
	go func() {
		defer free()
		defer to.Close()
		a.write(ctx, to, what)
	}()
	return nil
}

// patient gives up on a reader that reads nothing for a while.
type patient struct{ *os.File }

func (p patient) Write(text []byte) (int, error) {
	if err := p.SetWriteDeadline(time.Now().Add(answerPatience)); err != nil {
		return 0, err
	}
	return p.File.Write(text)
}

// write writes an answer. Nobody is told of errors: the reader sees an answer that ends early.
func (a *answers) write(ctx context.Context, to *os.File, what byte) {
	// A reader that takes little by little may not take forever.
	if what != askEvents {
		end := time.AfterFunc(2*answerPatience, func() { to.Close() })
		defer end.Stop()
	}
	encode := json.NewEncoder(patient{to})
	switch what {
	case askMetrics:
		if a.source.Metrics(patient{to}) == nil {
			_, _ = io.WriteString(patient{to}, endOfMetrics)
		}
	case askPage:
		page := a.source.Page()
		page.Records = []events.Record{}
		if a.source.Recent != nil {
			page.Records = a.source.Recent.Last()
		}
		_ = encode.Encode(page)
	case askEvents:
		if a.source.Recent == nil {
			return
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		records := a.source.Recent.Records(ctx)
		// The pipe tells that nobody reads any more only to those who write.
		tick := time.NewTicker(beat)
		defer tick.Stop()
		for {
			select {
			case record, more := <-records:
				if !more || encode.Encode(record) != nil {
					return
				}
			case <-tick.C:
				if _, err := (patient{to}).Write([]byte("\n")); err != nil {
					return
				}
			}
		}
	}
}
