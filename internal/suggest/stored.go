package suggest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/egressbpf/egressbpf/internal/events"
)

// ErrMalformed means that a line of stored records is none.
var ErrMalformed = errors.New("not a record of `egressbpf monitor --output json`")

// longestLine bounds a record.
const longestLine = 1 << 20

// Stored is the [events.Source] of records in JSON, one a line. Types that it does not know it
// passes on, since later versions may write more.
type Stored struct {
	name string
	in   *bufio.Reader
	line int
	// CutOff says that the last line was cut off, as by a writer that was stopped.
	CutOff bool
}

// NewStored returns the Source of what is in a file, which is called name in errors.
func NewStored(name string, in io.Reader) *Stored {
	return &Stored{name: name, in: bufio.NewReaderSize(in, longestLine)}
}

// Next implements [events.Source]. The error can wrap ErrMalformed.
func (s *Stored) Next(ctx context.Context) (events.Record, error) {
	for {
		if err := ctx.Err(); err != nil {
			return events.Record{}, err
		}
		line, err := s.in.ReadSlice('\n')
		last := errors.Is(err, io.EOF)
		s.line++
		switch {
		case last && len(line) == 0:
			return events.Record{}, io.EOF
		case errors.Is(err, bufio.ErrBufferFull):
			return events.Record{}, fmt.Errorf("%s:%d: %w: longer than %d bytes", s.name, s.line, ErrMalformed, longestLine)
		case err != nil && !last:
			return events.Record{}, fmt.Errorf("read %s: %w", s.name, err)
		}
		if len(line) == 1 && line[0] == '\n' {
			continue
		}
		var r events.Record
		err = json.Unmarshal(line, &r)
		if err == nil && r.Type == "" {
			err = errors.New("it has no type")
		}
		if err != nil && last {
			s.CutOff = true
			return events.Record{}, io.EOF
		}
		if err != nil {
			return events.Record{}, fmt.Errorf("%s:%d: %w: %w", s.name, s.line, ErrMalformed, err)
		}
		return r, nil
	}
}
