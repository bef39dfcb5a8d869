package events

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
)

// maxLine bounds the line of a record; records that egressbpf writes are far shorter.
const maxLine = 1 << 20

// Stored reads the records of a stream that was stored as JSON, one object a line. It is a
// [Source]. Versions to come may have written the stream: keys that this one does not know are
// ignored, and of records whose type it does not know, only the type is sure to be read.
type Stored struct {
	name  string
	next  chan storedLine
	done  chan struct{}
	close sync.Once
	line  []byte
	err   error
}

type storedLine struct {
	record Record
	text   []byte
	err    error
}

var (
	// ErrMalformed means that a line holds no record.
	ErrMalformed = errors.New("not a record")
	// ErrCutOff means besides that the line is the last and no newline ends it, as after a writer
	// that was stopped.
	ErrCutOff = errors.New("cut off")
)

// ReadStored reads from in, which is called name in errors. The caller closes the Stored, and
// then in.
func ReadStored(in io.Reader, name string) *Stored {
	s := &Stored{name: name, next: make(chan storedLine), done: make(chan struct{})}
	// Reading from a pipe cannot be interrupted: the goroutine ends with the read.
	go s.read(in)
	return s
}

// Next returns the record of the next line that is not blank. The error for a line that holds no
// record gives the line's number, and wraps ErrMalformed. The error for a stream that has ended is io.EOF.
func (s *Stored) Next(ctx context.Context) (Record, error) {
	if s.err != nil {
		return Record{}, s.err
	}
	select {
	case <-ctx.Done():
		return Record{}, ctx.Err()
	case l := <-s.next:
		s.line, s.err = l.text, l.err
		return l.record, l.err
	}
}

// Line returns the JSON of the record that Next has returned, as it was stored.
func (s *Stored) Line() []byte { return s.line }

// Close lets go of the reader, after the read that it is in.
func (s *Stored) Close() error {
	s.close.Do(func() { close(s.done) })
	return nil
}

func (s *Stored) read(in io.Reader) {
	send := func(l storedLine) bool {
		select {
		case <-s.done:
			return false
		case s.next <- l:
			return l.err == nil
		}
	}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxLine)
	cut := false // no newline ends the line
	lines.Split(func(data []byte, atEOF bool) (int, []byte, error) {
		cut = atEOF && !bytes.Contains(data, []byte{'\n'})
		return bufio.ScanLines(data, atEOF)
	})
	n := 0
	for lines.Scan() {
		n++
		text := bytes.TrimSpace(lines.Bytes())
		if len(text) == 0 {
			continue
		}
		r, err := parse(text)
		if err != nil {
			err = fmt.Errorf("%s:%d: %w: %w", s.name, n, ErrMalformed, err)
			if cut {
				err = fmt.Errorf("%w, %w", err, ErrCutOff)
			}
		}
		if !send(storedLine{r, bytes.Clone(text), err}) {
			return
		}
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		send(storedLine{err: fmt.Errorf("%s:%d: %w: the line has more than %d bytes", s.name, n+1, ErrMalformed, maxLine)})
	case err != nil:
		send(storedLine{err: fmt.Errorf("read %s: %w", s.name, err)})
	default:
		send(storedLine{err: io.EOF})
	}
}

// parse reads one record.
func parse(text []byte) (Record, error) {
	var r Record
	err := json.Unmarshal(text, &r)
	if err != nil {
		// A type to come could use a key in another way.
		var other struct{ Type string }
		if json.Unmarshal(text, &other) == nil && other.Type != "" && !slices.Contains([]string{Start, Refusal, Suppressed, Lost}, other.Type) {
			return Record{Type: other.Type}, nil
		}
		const shown = 200 // the error can hold the whole value
		return Record{}, fmt.Errorf("%.*s", shown, err.Error())
	}
	if r.Type == "" {
		return Record{}, errors.New(`want an object with a "type", as egressbpf monitor --output json writes it`)
	}
	return r, nil
}
