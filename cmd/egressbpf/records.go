package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/loader"
)

// recordPrinter prints records in the format of monitor's flags.
type recordPrinter struct {
	stdout, stderr io.Writer
	output         output
	fields         []string // empty for the usual ones
	color          bool
	line           func() []byte // the JSON of a stored record; nil if it was not stored
	begun          bool          // the object of type start was written
}

func newRecordPrinter(o *monitorOptions, source events.Source, stdout, stderr io.Writer) *recordPrinter {
	p := &recordPrinter{stdout: stdout, stderr: stderr, output: o.output, fields: o.fields}
	p.color = o.color == "always" || o.color == automatic && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && isTerminal(stdout)
	if stored, ok := source.(*events.Stored); ok {
		p.line = stored.Line
	}
	if len(p.fields) == 0 && o.output != jsonText {
		p.fields = []string{"time", "container", "process", refused, "destination", why}
	}
	return p
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// These columns are not keys of records: they join some.
const (
	refused = "refused" // hook, protocol or family
	why     = "why"     // reason, rule, blocked
)

// columnWidths are those of columns in a table. Others are as wide as their header or otherWidth.
var columnWidths = map[string]int{
	"time": len(timeForm), "since": len(timeForm), "container": 20, "container.name": 20, "process": 24, refused: 14,
	"source": 21, "destination": 21, "source.address": 15, "destination.address": 15, "container.id": 64, "rule": 24,
}

const otherWidth = 12

const timeForm = "2006-01-02 15:04:05.000"

func columnWidth(key string) int {
	if w, ok := columnWidths[key]; ok {
		return w
	}
	return max(len(key), otherWidth)
}

// begin prints the header of a table.
func (p *recordPrinter) begin() error {
	if p.output != table {
		return nil
	}
	var header []string
	for _, key := range p.fields {
		if key == why {
			key = "reason"
		}
		header = append(header, strings.ToUpper(key))
	}
	return p.row(header, nil)
}

// print prints a record; in a line of its own, which is written at once.
func (p *recordPrinter) print(r events.Record) error {
	if p.output == jsonText {
		return p.json(r)
	}
	switch r.Type {
	case events.Refusal:
		var values, styles []string
		tree := sync.OnceValues(func() (map[string]any, error) { return recordTree(r) })
		for _, key := range p.fields {
			values, styles = append(values, fieldText(r, tree, key)), append(styles, fieldStyle(r, key))
		}
		return p.row(values, styles)
	case events.Suppressed:
		who := "a container"
		if r.Container != nil {
			who = containerText(r.Container)
		}
		fmt.Fprintf(p.stderr, "warning: refusals not shown: %d of %s since %s, because there were too many\n", r.Count, who, sinceText(r.Since))
	case events.Lost:
		cause := "egressbpf was too slow"
		if r.Stage == events.StageKernel {
			cause = "a buffer in the kernel was full"
		}
		fmt.Fprintf(p.stderr, "warning: refusals not shown: %d, because %s\n", r.Count, cause)
	}
	return nil
}

// row prints values, in columns for a table.
func (p *recordPrinter) row(values, styles []string) error {
	const gap = "  "
	var b strings.Builder
	for i, value := range values {
		padding := 0
		if p.output == table && i < len(values)-1 {
			w := columnWidth(p.fields[i])
			// A name may be cut off. Anything else moves what follows if it is too long.
			if key := p.fields[i]; key == "container" || key == "process" {
				value = cutText(value, w)
			}
			padding = max(0, w-utf8.RuneCountInString(value))
		}
		if p.color && styles != nil && styles[i] != "" {
			value = styles[i] + value + stylePlain
		}
		b.WriteString(value + strings.Repeat(" ", padding))
		if i < len(values)-1 {
			b.WriteString(gap)
		}
	}
	b.WriteByte('\n')
	_, err := io.WriteString(p.stdout, b.String())
	return err
}

func cutText(s string, width int) string {
	if runes := []rune(s); len(runes) > width {
		return string(runes[:width-1]) + "…"
	}
	return s
}

const (
	stylePlain  = "\x1b[0m"
	styleBold   = "\x1b[1m"
	styleFaint  = "\x1b[2m"
	styleRed    = "\x1b[31m"
	styleYellow = "\x1b[33m"
)

func fieldStyle(r events.Record, key string) string {
	switch key {
	case "time":
		return styleFaint
	case "container", "container.name":
		return styleBold
	case "reason", why:
		if passed(r) {
			return styleYellow
		}
		return styleRed
	}
	return ""
}

// passed says whether a refusal is one in name alone, since the mode is audit.
func passed(r events.Record) bool { return r.Blocked != nil && !*r.Blocked }

// fieldText returns a field of a refusal, safe to print. Few fields need the tree.
func fieldText(r events.Record, tree func() (map[string]any, error), key string) string {
	switch key {
	case "time":
		return timeText(r.Time)
	case "since":
		return sinceText(r.Since)
	case "container":
		return containerText(r.Container)
	case "k8s":
		if r.K8s == nil {
			return notKnown
		}
		return word(r.K8s.Namespace + "/" + r.K8s.Pod + "/" + r.K8s.Container)
	case "process":
		if r.Process == nil {
			return notKnown
		}
		return fmt.Sprintf("%s[%d]", word(r.Process.Comm), r.Process.PID)
	case "source":
		return endpointText(r.Source)
	case "destination":
		return endpointText(r.Destination)
	case refused:
		var what []string
		for _, w := range []string{r.Hook, r.Protocol, r.Family} {
			if w != "" {
				what = append(what, word(w))
			}
		}
		if len(what) == 0 {
			return notKnown
		}
		return strings.Join(what, " ")
	case why:
		if r.Reason == "" {
			return notKnown
		}
		text := word(r.Reason)
		if r.Rule != "" {
			text += " (" + printable(r.Rule) + ")"
		}
		if passed(r) {
			text += ", passed in audit mode"
		}
		return text
	}
	t, err := tree()
	if err != nil {
		return notKnown // a time that JSON has no form for
	}
	switch v := recordValue(t, key).(type) {
	case nil:
		return notKnown
	case string:
		if v == "" {
			return notKnown
		}
		return word(v)
	default:
		return word(fmt.Sprint(v))
	}
}

// notKnown stands for values that are not known.
const notKnown = "-"

func timeText(t time.Time) string {
	if t.IsZero() {
		return notKnown
	}
	return t.Local().Format(timeForm)
}

func sinceText(t *time.Time) string {
	if t == nil {
		return notKnown
	}
	return timeText(*t)
}

func containerText(c *events.Container) string {
	const short = 12 // as docker ps shows ids
	switch {
	case c == nil:
		return notKnown
	case c.Name != "":
		return word(c.Name)
	case len(c.ID) == 64:
		return word(c.ID[:short])
	case c.ID != "":
		return word(c.ID)
	case c.Cgroup != "":
		return word(c.Cgroup)
	}
	return notKnown
}

func endpointText(e *events.Endpoint) string {
	switch {
	case e == nil, !e.Address.IsValid():
		return notKnown
	case e.Port == 0:
		return word(e.Address.String())
	}
	return word(netip.AddrPortFrom(e.Address, e.Port).String())
}

// word makes a text safe to print as one word, which cannot be taken for several: see
// printable.
func word(s string) string {
	if strings.ContainsAny(s, ` "`) || s == notKnown {
		return strconv.Quote(s)
	}
	return printable(s)
}

// json prints the object of a record, and before the first one an object of type start if the
// stream has none.
func (p *recordPrinter) json(r events.Record) error {
	if !p.begun && r.Type != events.Start {
		start := events.Record{Type: events.Start, Time: time.Now().UTC(), Version: loader.Version()}
		if err := p.object(start, nil); err != nil {
			return err
		}
	}
	p.begun = true
	if p.line == nil {
		return p.object(r, nil)
	}
	return p.object(r, p.line())
}

// object prints the object of a record, as it was stored if it was.
func (p *recordPrinter) object(r events.Record, stored json.RawMessage) error {
	var object any = r
	if len(p.fields) > 0 {
		t, err := recordTree(r)
		if err != nil {
			return err
		}
		object = recordPart(t, p.fields)
	} else if stored != nil {
		object = stored
	}
	var b bytes.Buffer
	if err := writeJSON(&b, object); err != nil {
		return err
	}
	_, err := io.WriteString(p.stdout, escapeJSON(b.String()))
	return err
}

// escapeJSON replaces characters in a line of JSON that a terminal could obey by escapes that mean
// the same.
func escapeJSON(line string) string {
	obeyed := func(r rune) bool { return r != '\n' && !strconv.IsPrint(r) }
	if utf8.ValidString(line) && !strings.ContainsFunc(line, obeyed) {
		return line
	}
	var b strings.Builder
	for _, r := range line {
		if !obeyed(r) {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	return b.String()
}

// recordTree is a record as its JSON is.
func recordTree(r events.Record) (t map[string]any, err error) {
	text, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	return t, dec.Decode(&t)
}

// recordValue returns the value of a key such as container.name; nil if there is none.
func recordValue(t map[string]any, key string) any {
	outer, inner, nested := strings.Cut(key, ".")
	if !nested {
		return t[key]
	}
	object, _ := t[outer].(map[string]any)
	return object[inner]
}

// recordPart returns the part of a tree that has the keys, and the type.
func recordPart(t map[string]any, keys []string) map[string]any {
	part := map[string]any{"type": t["type"]}
	for _, key := range keys {
		value := recordValue(t, key)
		outer, inner, nested := strings.Cut(key, ".")
		switch object, _ := part[outer].(map[string]any); {
		case value == nil:
		case !nested:
			part[key] = value
		case object == nil:
			part[outer] = map[string]any{inner: value}
		default:
			object[inner] = value
		}
	}
	return part
}
