package events

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// readAll returns the records before the error, which is never nil, and their lines.
func readAll(t testing.TB, in io.Reader) (records []Record, lines []string, err error) {
	t.Helper()
	s := ReadStored(in, "events.json")
	defer s.Close()
	for {
		r, err := s.Next(t.Context())
		if err != nil {
			if _, again := s.Next(t.Context()); !errors.Is(again, err) {
				t.Errorf("after %v: %v", err, again)
			}
			return records, lines, err
		}
		records, lines = append(records, r), append(lines, string(s.Line()))
	}
}

const storedRefusal = `{"type":"refusal","time":"2026-11-28T12:00:00.123456789Z","node":"host1","container":{"id":"0123","name":"web","image":"nginx:1","cgroup":"/docker/0123","cgroup_id":123},` +
	`"k8s":{"namespace":"shop","pod":"web-0","pod_uid":"u","container":"nginx"},"hook":"connect","reason":"blocked","rule":"preset aws","would_block":true,"blocked":false,` +
	`"protocol":"tcp","source":{"address":"172.17.0.2","port":40000},"destination":{"address":"169.254.169.254","port":80},"process":{"pid":4711,"comm":"curl","uid":0},"bytes":60}`

func TestStored(t *testing.T) {
	yes, no := true, false
	at := time.Date(2026, 11, 28, 12, 0, 0, 123456789, time.UTC)
	want := Record{
		Type: Refusal, Time: at, Node: "host1",
		Container: &Container{"0123", "web", "nginx:1", "/docker/0123", 123}, K8s: &K8s{"shop", "web-0", "u", "nginx"},
		Hook: HookConnect, Reason: ReasonBlocked, Rule: "preset aws", WouldBlock: &yes, Blocked: &no, Protocol: "tcp",
		Source: &Endpoint{netip.MustParseAddr("172.17.0.2"), 40000}, Destination: &Endpoint{netip.MustParseAddr("169.254.169.254"), 80},
		Process: &Process{4711, "curl", 0}, Bytes: 60,
	}
	got, _, err := readAll(t, strings.NewReader(storedRefusal))
	if err != io.EOF || len(got) != 1 || !reflect.DeepEqual(got[0], want) {
		t.Errorf("got %+v, %v", got, err)
	}
	again, err := json.Marshal(want)
	check(t, err)
	if string(again) != storedRefusal {
		t.Errorf("marshalled to %s", again)
	}
}

func TestStoredStreams(t *testing.T) {
	for _, tt := range []struct {
		what, in string
		types    string // of the records before the end
		err      string // empty: the stream ends
	}{
		{"nothing", "", "", ""},
		{"blank lines", "\n \t\r\n\n", "", ""},
		{"some", `{"type":"start"}` + "\r\n\n" + `{"type":"lost"}` + "\n", "start lost", ""},
		{"no line feed at the end", `{"type":"start"}`, "start", ""},
		{"keys to come", `{"type":"refusal","more":[{}],"container":{"more":1}}`, "refusal", ""},
		{"a type to come", `{"type":"verdict","reason":{"of":["any"]},"time":7,"destination":"::%"}` + "\n" + `{"type":"lost"}`, "verdict lost", ""},
		{"a reason to come", `{"type":"refusal","reason":"quota","hook":"xdp"}`, "refusal", ""},
		{"cut off", `{"type":"start"}` + "\n" + `{"type":"los`, "start", "events.json:2: not a record: unexpected end of JSON input"},
		{"the number counts blank lines", "\n\n{\n", "", "events.json:3: "},
		{"no JSON", "hello", "", "events.json:1: not a record: invalid character 'h'"},
		{"two in a line", `{"type":"start"}{"type":"lost"}`, "", "events.json:1: "},
		{"a list", `[{"type":"start"}]`, "", "events.json:1: "},
		{"null", "null", "", "--output json"},
		{"a number", "7", "", "events.json:1: "},
		{"no type", `{"time":"2026-11-28T12:00:00Z"}`, "", "--output json"},
		{"an empty type", `{"type":"","time":7}`, "", "events.json:1: "},
		{"a type that is no text", `{"type":7}`, "", "events.json:1: "},
		{"a wrong address", `{"type":"refusal","destination":{"address":"example.com"}}`, "", "events.json:1: "},
		{"a wrong time", `{"type":"refusal","time":"yesterday"}`, "", "events.json:1: "},
		{"a wrong port", `{"type":"refusal","destination":{"address":"192.0.2.1","port":65536}}`, "", "65536"},
		{"a negative count", `{"type":"lost","count":-1}`, "", "events.json:1: "},
		{"invalid UTF-8", "{\"type\":\"refusal\",\"process\":{\"comm\":\"a\xff\"}}", "refusal", ""},
		{"a long line", `{"type":"start"}` + "\n\n" + `{"type":"start","node":"` + strings.Repeat("x", maxLine) + `"}`, "start", "events.json:3: not a record: the line has more than 1048576 bytes"},
		{"a line without an end", strings.Repeat(" ", maxLine+1), "", "events.json:1: "},
		{"deep", `{"type":"refusal","more":` + strings.Repeat("[", 20000), "", "events.json:1: "},
	} {
		records, lines, err := readAll(t, strings.NewReader(tt.in))
		var types []string
		for i, r := range records {
			types = append(types, r.Type)
			if lines[i] != strings.TrimSpace(lines[i]) || !strings.Contains(tt.in, lines[i]) {
				t.Errorf("%s: line %q", tt.what, lines[i])
			}
		}
		if got := strings.Join(types, " "); got != tt.types {
			t.Errorf("%s: got %q", tt.what, got)
		}
		if tt.err == "" && err != io.EOF || tt.err != "" && (err == io.EOF || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: got error %v", tt.what, err)
		}
		cut := tt.err != "" && tt.in != "" && !strings.HasSuffix(tt.in, "\n") && len(tt.in) <= maxLine
		if err != io.EOF && (!errors.Is(err, ErrMalformed) || errors.Is(err, ErrCutOff) != cut) {
			t.Errorf("%s: got error %v", tt.what, err)
		}
		if len(err.Error()) > 300 {
			t.Errorf("%s: the error has %d bytes", tt.what, len(err.Error()))
		}
	}
	_, _, err := readAll(t, iotest.ErrReader(io.ErrClosedPipe))
	if !errors.Is(err, io.ErrClosedPipe) || !strings.Contains(err.Error(), "read events.json") {
		t.Errorf("got %v", err)
	}
}

// A stream that does not end gives its records as they come, and can be left.
func TestStoredEndless(t *testing.T) {
	in, out := io.Pipe()
	s := ReadStored(in, "-")
	for range 3 {
		go io.WriteString(out, `{"type":"lost"}`+"\n")
		if r, err := s.Next(t.Context()); err != nil || r.Type != Lost {
			t.Fatalf("got %v, %v", r, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	go io.WriteString(out, `{"type":"start"}`+"\n")
	if r, err := s.Next(t.Context()); err != nil || r.Type != Start {
		t.Errorf("after a wait that was given up: %v, %v", r, err)
	}
	check(t, s.Close())
	check(t, s.Close())
	// The reader takes one more record and lets go.
	_, err := io.WriteString(out, `{"type":"lost"}`+"\n")
	check(t, err)
	check(t, in.Close())
}

func FuzzStored(f *testing.F) {
	f.Add([]byte(storedRefusal))
	f.Add([]byte(`{"type":"start"}` + "\n\n" + `{"type":"later","time":7}` + "\n{"))
	f.Add([]byte("{\"type\":\"refusal\",\"process\":{\"comm\":\"\xff\\u001b[2J\"},\"destination\":{\"address\":\"fe80::1%\\n\"}}"))
	f.Add([]byte(`{"type":"suppressed","since":"2026-11-28T12:00:00.1+01:00","count":18446744073709551615}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		records, lines, err := readAll(t, bytes.NewReader(data))
		if err != io.EOF && !strings.HasPrefix(err.Error(), "events.json:") {
			t.Errorf("no place: %v", err)
		}
		if len(records) > bytes.Count(data, []byte("\n"))+1 {
			t.Errorf("%d records", len(records))
		}
		for i, r := range records {
			if r.Type == "" || !json.Valid([]byte(lines[i])) || strings.Contains(lines[i], "\n") {
				t.Errorf("got %+v of %q", r, lines[i])
			}
			text, err := json.Marshal(r)
			check(t, err)
			again, err := parse(text)
			check(t, err)
			if text2, err := json.Marshal(again); err != nil || !bytes.Equal(text, text2) {
				t.Errorf("%s became %s, %v", text, text2, err)
			}
		}
	})
}
