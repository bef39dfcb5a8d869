package top

import (
	"cmp"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/egressbpf/egressbpf/internal/events"
)

// column is one column of the screen.
type column struct {
	name  string // as --sort calls it
	title string
	// min and max are its width. If there is no room for all columns, those with the highest
	// rank are left out; and room that is left makes columns wider, up to max.
	min, max, rank int
	right          bool
	text           func(r *row, now time.Time) string
	// compare sorts what is to be seen first to the beginning.
	compare func(a, b *row) int
}

var columns = []column{
	{"name", "CONTAINER", 9, 64, 0, false,
		func(r *row, _ time.Time) string { return printable(r.title()) },
		func(a, b *row) int { return strings.Compare(a.title(), b.title()) }},
	{"now", "NOW/S", 6, 6, 1, true,
		func(r *row, _ time.Time) string { return rateText(r.rate) },
		byRate},
	{"total", "TOTAL", 6, 6, 2, true,
		func(r *row, _ time.Time) string { return compact(float64(r.total)) },
		byTotal},
	{"why", "WHY", reasonWidth, reasonWidth, 3, false,
		func(r *row, _ time.Time) string { return r.why },
		func(a, b *row) int { return emptyLast(a.why, b.why) }},
	{"tokens", "TOKENS", 7, 9, 6, true,
		func(r *row, _ time.Time) string { return tokensText(r.smtp) },
		byTokens},
	{"last", "AGE", 4, 4, 4, true,
		func(r *row, now time.Time) string { return ageText(r.last, now) },
		byLast},
	{"destination", "DESTINATION", len("169.254.169.254:80"), 47, 5, false,
		func(r *row, _ time.Time) string { return printable(destination(r.newest())) },
		func(a, b *row) int { return emptyLast(destination(a.newest()), destination(b.newest())) }},
	{"process", "PROCESS", 7, 15, 7, false,
		func(r *row, _ time.Time) string { return printable(process(r.newest())) },
		func(a, b *row) int { return emptyLast(process(a.newest()), process(b.newest())) }},
}

// Columns returns the names of the columns by which the screen can be sorted.
func Columns() []string {
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = c.name
	}
	return names
}

// DefaultSort is the column by which the screen is sorted at first.
const DefaultSort = "now"

func byRate(a, b *row) int  { return cmp.Compare(b.rate, a.rate) }
func byTotal(a, b *row) int { return cmp.Compare(b.total, a.total) }
func byLast(a, b *row) int  { return b.last.Compare(a.last) }

func byTokens(a, b *row) int {
	ta, tb := a.smtp.Tokens, b.smtp.Tokens
	if ta == nil || tb == nil {
		return cmp.Compare(btoi(ta == nil), btoi(tb == nil))
	}
	return cmp.Compare(*ta, *tb)
}

func emptyLast(a, b string) int {
	return cmp.Or(cmp.Compare(btoi(a == ""), btoi(b == "")), strings.Compare(a, b))
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// order compares rows by a column, and those that are equal there in an order that is always
// the same.
func order(by int, reverse bool) func(a, b *row) int {
	return func(a, b *row) int {
		first := columns[by].compare(a, b)
		if reverse {
			first = -first
		}
		return cmp.Or(first, byRate(a, b), byLast(a, b), byTotal(a, b), strings.Compare(a.title(), b.title()), cmp.Compare(a.key, b.key))
	}
}

// layout returns the widths of the columns on a screen; 0 for those that are left out. There is
// one space between two columns. Names get the first of the room that is left.
func layout(width int) []int {
	widths := make([]int, len(columns))
	room := width + 1
	for rank := range columns {
		i := 0
		for columns[i].rank != rank {
			i++
		}
		need := columns[i].min + 1
		if need > room && rank > 0 {
			break
		}
		widths[i], room = columns[i].min, room-need
	}
	if room < 0 {
		widths[0] = max(0, width)
	}
	// Replicas differ at the end of their names.
	const telling = 20
	more := max(0, min(room, telling-widths[0]))
	widths[0], room = widths[0]+more, room-more
	for grown := true; grown && room > 0; {
		grown = false
		for i, c := range columns {
			if widths[i] > 0 && widths[i] < c.max && room > 0 {
				widths[i]++
				room--
				grown = true
			}
		}
	}
	return widths
}

func endpoint(e *events.Endpoint) string {
	if e.Port == 0 {
		return e.Address.String()
	}
	return net.JoinHostPort(e.Address.String(), strconv.Itoa(int(e.Port)))
}
