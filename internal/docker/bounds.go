package docker

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
)

var (
	errTooLarge = errors.New("the answer is too large")
	errNotEvent = errors.New("an event is not valid JSON")
)

// bounds is a transport that limits how much memory an answer can take in the library,
// which reads whatever comes.
type bounds struct{ *http.Transport }

// streamKey is the key of a func() in the context of a request for events. The transport
// calls it when the stream is open.
type streamKey struct{}

func (b bounds) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.Transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	opened, ok := req.Context().Value(streamKey{}).(func())
	// The negotiation of a version uses the same context.
	if ok && resp.StatusCode == http.StatusOK && strings.HasSuffix(req.URL.Path, "/events") {
		resp.Body = newLines(resp.Body)
		opened()
	} else {
		resp.Body = &document{resp.Body, maxDocument}
	}
	return resp, nil
}

// maxDocument is how many bytes of memory one answer may take. It is enough for some
// thousand containers with kilobytes of labels each.
const maxDocument = 256 << 20

// document is an answer that consists of one JSON document. The library reads it whole
// before it decodes it, and the decoded form can be larger by orders of magnitude.
type document struct {
	io.ReadCloser
	left int
}

func (d *document) Read(p []byte) (int, error) {
	n, err := d.ReadCloser.Read(p)
	for _, c := range p[:n] {
		switch c {
		case '{':
			d.left -= 512 // as large as a struct of the library
		case ',', '[':
			d.left -= 64 // an entry of a map
		default:
			d.left -= 8 // in buffers that are copied as they grow
		}
	}
	if d.left < 0 {
		return 0, errTooLarge
	}
	return n, err
}

// maxLine is the largest size of an event, in bytes. An event includes the container's
// labels.
const maxLine = 1 << 20

// lines is a stream of JSON documents, one on each line.
type lines struct {
	io.Closer
	in   *bufio.Scanner
	rest []byte
}

func newLines(body io.ReadCloser) *lines {
	in := bufio.NewScanner(body)
	in.Buffer(nil, maxLine)
	return &lines{Closer: body, in: in}
}

// Read returns only whole documents: a decoder keeps what it has read of a document until
// the document ends.
func (l *lines) Read(p []byte) (int, error) {
	for len(l.rest) == 0 {
		if !l.in.Scan() {
			if err := l.in.Err(); err != nil {
				return 0, err
			}
			return 0, io.EOF
		}
		line := bytes.Trim(l.in.Bytes(), " \t\r\x1e") // RFC 7464
		if len(line) == 0 {
			continue
		}
		if !json.Valid(line) {
			return 0, errNotEvent
		}
		l.rest = append(line, '\n')
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}
