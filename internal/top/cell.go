package top

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/charmbracelet/x/ansi"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/text"
)

// cell returns text that takes up exactly width columns of a terminal, and has nothing in it
// that a terminal obeys.
func cell(s string, width int, right bool) string {
	s, w := fit(s, width)
	padding := strings.Repeat(" ", width-w)
	if right {
		return padding + s
	}
	return s + padding
}

// fit cuts text to at most width columns, as cell does, and returns how many it takes up.
func fit(s string, width int) (string, int) {
	const (
		ellipsis = "…"
		// maxCluster bounds the bytes of one character with its accents: terminals bound
		// them too, each in its own way.
		maxCluster = 16
	)
	var b strings.Builder
	w, short, shortWidth := 0, "", 0 // short has room for the ellipsis
	for s != "" {
		cluster, cw := ansi.FirstGraphemeCluster(s, ansi.GraphemeWidth)
		s = s[len(cluster):]
		// Terminals do not agree about how wide a sequence of characters is that are shown
		// as one, such as a flag, nor where an accent goes that has no letter.
		if cw == 0 || cw != ansi.StringWidthWc(cluster) || len(cluster) > maxCluster || obeyed(cluster) {
			cluster, cw = "\uFFFD", 1
		}
		if w+cw > width {
			if width < 1 {
				return "", 0
			}
			return short + ellipsis, shortWidth + 1
		}
		b.WriteString(cluster)
		if w += cw; w < width {
			short, shortWidth = b.String(), w
		}
	}
	return b.String(), w
}

// obeyed says whether a terminal could take text for something else than characters to show.
func obeyed(s string) bool {
	return !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) })
}

// printable is text.Printable, but for text that is not known.
func printable(s string) string {
	if s == "" {
		return ""
	}
	return text.Printable(s)
}

// compact returns a number in at most 6 columns.
func compact(n float64) string {
	switch {
	case n < 1e6:
		return strconv.FormatFloat(n, 'f', 0, 64)
	case n < 1e9:
		return fmt.Sprintf("%.1fM", n/1e6)
	case n < 1e12:
		return fmt.Sprintf("%.1fG", n/1e9)
	}
	return fmt.Sprintf("%.1fT", n/1e12)
}

func rateText(perSecond float64) string {
	switch {
	case perSecond == 0:
		return "0"
	case perSecond < 0.05:
		return "<0.1"
	case perSecond < 1000:
		return strconv.FormatFloat(perSecond, 'f', 1, 64)
	}
	return compact(perSecond)
}

func tokensText(b stats.Bucket) string {
	switch {
	case !b.Known():
		return ""
	case b.Tokens == nil:
		return "unlimited"
	case b.Burst < 1000:
		return fmt.Sprintf("%.1f/%d", *b.Tokens, b.Burst)
	}
	return compact(*b.Tokens) + "/" + compact(float64(b.Burst))
}

// ageText returns how long ago something was, in at most 4 columns.
func ageText(at, now time.Time) string {
	if at.IsZero() {
		return ""
	}
	age := max(0, now.Round(0).Sub(at)) // by the wall clock: a host that slept is older
	switch {
	case age < time.Minute:
		return fmt.Sprintf("%ds", age/time.Second)
	case age < time.Hour:
		return fmt.Sprintf("%dm", age/time.Minute)
	case age < 48*time.Hour:
		return fmt.Sprintf("%dh", age/time.Hour)
	}
	return fmt.Sprintf("%dd", age/(24*time.Hour))
}

// title is what the row's container is called. It may not be printable.
func (r *row) title() string {
	const short = 12 // as docker ps shows ids
	switch {
	case r.key == others:
		return "(others)"
	case r.name != "":
		return r.name
	case len(r.id) == 64:
		return r.id[:short]
	}
	return r.id
}

// destination is what a refusal was for: an address, or a socket of a family.
func destination(e *events.Record) string {
	switch {
	case e == nil:
		return ""
	case e.Destination == nil && e.Family != "":
		return e.Family + " socket"
	case e.Destination == nil:
		return ""
	}
	return endpoint(e.Destination)
}

func process(e *events.Record) string {
	if e == nil || e.Process == nil {
		return ""
	}
	return e.Process.Comm
}
