package metrics

import (
	"io"
	"strconv"
	"strings"
)

// kind is the type of a metric.
type kind string

const (
	gauge   kind = "gauge"
	counter kind = "counter"
)

// family is a metric with all its series.
type family struct {
	kind       kind
	name, help string
	// labels are the names of the labels.
	labels []string
	// tell adds the series of a reading.
	tell func(r *Reading, to *text)
}

// flushAt is how much text is written at a time, in bytes.
const flushAt = 32 << 10

// text writes Prometheus's text format, version 0.0.4. Libraries make objects of each series and
// check each label; for thousands of containers that costs several times what reading them does.
type text struct {
	w   io.Writer
	err error
	buf []byte
	// family is being written, and its head before the first series.
	family *family
	headed bool
}

func (t *text) begin(f *family) { t.family, t.headed = f, false }

// line begins a series, up to its labels.
func (t *text) line() {
	f := t.family
	if !t.headed {
		t.headed = true
		t.buf = append(t.buf, "# HELP egressbpf_"+f.name+" "+escapeHelp.Replace(f.help)+"\n# TYPE egressbpf_"+f.name+" "+string(f.kind)+"\n"...)
	}
	t.buf = append(t.buf, "egressbpf_"...)
	t.buf = append(t.buf, f.name...)
}

// end ends a series.
func (t *text) end() {
	t.buf = append(t.buf, '\n')
	if len(t.buf) >= flushAt {
		t.flush()
	}
}

func (t *text) flush() {
	if t.err == nil && len(t.buf) > 0 {
		_, t.err = t.w.Write(t.buf)
	}
	t.buf = t.buf[:0]
}

// labelled writes the labels of a series.
func (t *text) labelled(values []string) {
	for i, value := range values {
		if i == 0 {
			t.buf = append(t.buf, '{')
		} else {
			t.buf = append(t.buf, ',')
		}
		t.buf = append(t.buf, t.family.labels[i]...)
		t.buf = append(t.buf, `="`...)
		t.buf = append(t.buf, escape(value)...)
		t.buf = append(t.buf, '"')
	}
	if len(values) > 0 {
		t.buf = append(t.buf, '}')
	}
	t.buf = append(t.buf, ' ')
}

// gauge adds a series with the values of the family's labels.
func (t *text) gauge(value float64, values ...string) {
	t.line()
	t.labelled(values)
	t.buf = strconv.AppendFloat(t.buf, value, 'g', -1, 64)
	t.end()
}

// counter is gauge for counts, which it writes in full.
func (t *text) counter(n uint64, values ...string) {
	t.line()
	t.labelled(values)
	t.buf = strconv.AppendUint(t.buf, n, 10)
	t.end()
}

// of begins a series of a container, whose labels are written already. If last is not empty, it
// is the value of the family's last label.
func (t *text) of(c *labelled, last string) {
	t.line()
	t.buf = append(t.buf, '{')
	t.buf = append(t.buf, c.labels...)
	if last != "" {
		t.buf = append(t.buf, ',')
		t.buf = append(t.buf, t.family.labels[len(t.family.labels)-1]...)
		t.buf = append(t.buf, `="`...)
		t.buf = append(t.buf, last...)
		t.buf = append(t.buf, '"')
	}
	t.buf = append(t.buf, "} "...)
}

// count adds a count of a container, and measure another number.
func (t *text) count(c *labelled, n uint64, last string) {
	t.of(c, last)
	t.buf = strconv.AppendUint(t.buf, n, 10)
	t.end()
}

func (t *text) measure(c *labelled, value float64) {
	t.of(c, "")
	t.buf = strconv.AppendFloat(t.buf, value, 'g', -1, 64)
	t.end()
}

var (
	escapeHelp  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	escapeLabel = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)

// escape makes the text of a label's value of what others may have chosen.
func escape(s string) string { return escapeLabel.Replace(valid(s)) }

// valid replaces what is not UTF-8.
func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func number(b bool) int {
	if b {
		return 1
	}
	return 0
}
