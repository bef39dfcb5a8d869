package main

import (
	"cmp"
	"encoding/xml"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/charmbracelet/x/ansi"
)

// The size of a terminal, and of one of its cells in a picture.
const (
	columns, lines = 80, 24

	cellWidth, cellHeight, fontSize, margin = 9, 19, 15, 14
)

const background, foreground = "#161b22", "#e6edf3"

// palette has the colours 0 to 7 and the bright ones.
var palette = [16]string{
	"#484f58", "#ff7b72", "#3fb950", "#d29922", "#58a6ff", "#bc8cff", "#39c5cf", "#b1bac4",
	"#6e7681", "#ffa198", "#56d364", "#e3b341", "#79c0ff", "#d2a8ff", "#56d4dd", "#ffffff",
}

// style is how text looks; its colours are empty if they are the usual ones.
type style struct {
	bold, faint, underline, reverse bool
	fg, bg                          string
}

// set obeys a parameter of SGR (ECMA-48, 8.3.117), and says whether it is known.
func (s *style) set(n int) bool {
	switch {
	case n == 0:
		*s = style{}
	case n == 1:
		s.bold = true
	case n == 2:
		s.faint = true
	case n == 4:
		s.underline = true
	case n == 7:
		s.reverse = true
	case n == 22:
		s.bold, s.faint = false, false
	case n == 24:
		s.underline = false
	case n == 27:
		s.reverse = false
	case n >= 30 && n <= 37:
		s.fg = palette[n-30]
	case n == 39:
		s.fg = ""
	case n >= 40 && n <= 47:
		s.bg = palette[n-40]
	case n == 49:
		s.bg = ""
	case n >= 90 && n <= 97:
		s.fg = palette[n-90+8]
	case n >= 100 && n <= 107:
		s.bg = palette[n-100+8]
	default:
		return false
	}
	return true
}

// blank says whether a space in the style cannot be seen.
func (s style) blank() bool { return !s.underline && !s.reverse && s.bg == "" }

// draw returns text that begins at a cell and takes up some columns. It takes up exactly these
// in every font.
func (s style) draw(text string, x, y, width int) string {
	var b strings.Builder
	fg, bg := cmp.Or(s.fg, foreground), s.bg
	if s.reverse {
		fg, bg = cmp.Or(s.bg, background), fg
	}
	left, top := margin+x*cellWidth, margin+y*cellHeight
	if bg != "" {
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", left, top, width*cellWidth, cellHeight, bg)
	}
	if strings.Trim(text, " ") == "" && !s.underline {
		return b.String()
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" textLength="%d"`, left, top+fontSize, width*cellWidth)
	if fg != foreground {
		fmt.Fprintf(&b, ` fill="%s"`, fg)
	}
	if s.bold {
		b.WriteString(` font-weight="bold"`)
	}
	if s.faint {
		b.WriteString(` fill-opacity="0.6"`)
	}
	if s.underline {
		b.WriteString(` text-decoration="underline"`)
	}
	b.WriteString(">")
	// Other spaces are shown as one; not all browsers obey xml:space.
	_ = xml.EscapeText(&b, []byte(strings.ReplaceAll(text, " ", "\u00a0"))) // a Builder has no errors
	b.WriteString("</text>\n")
	return b.String()
}

// svg draws what is on a terminal, as `tmux capture-pane -e -p` tells it. Sequences that are not
// known are an error: the picture would show something else than the terminal.
func svg(screen string) (string, error) {
	var b strings.Builder
	width, height := columns*cellWidth+2*margin, lines*cellHeight+2*margin
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d">
<rect x="0.5" y="0.5" width="%d" height="%d" rx="8" fill="%s" stroke="#484f58"/>
<g font-family="ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', monospace" font-size="%d" fill="%s">
`, width, height, width-1, height-1, background, fontSize, foreground)
	var (
		look    style
		run     string // of text in one style
		x, y, w int    // where it begins, and its width
		state   byte
		parser  = ansi.NewParser()
	)
	flush := func() {
		if w > 0 {
			b.WriteString(look.draw(run, x, y, w))
		}
		run, x, w = "", x+w, 0
	}
	for screen != "" {
		sequence, cells, n, after := ansi.DecodeSequence(screen, state, parser)
		screen, state = screen[n:], after
		switch {
		case sequence == "\n":
			flush()
			x, y = 0, y+1
		case sequence == " " && look.blank() && x+w < columns:
			// How it looks depends on what was there before, and nobody sees it.
			flush()
			x++
		case w > 0 && unicode.IsMark([]rune(sequence)[0]): // an accent of an ASCII letter
			run += sequence
		case cells > 0 && utf8.ValidString(sequence) && x+w+cells <= columns && y < lines:
			// Where a font has wide characters at all, they come from another one.
			if cells > 1 {
				flush()
			}
			run, w = run+sequence, w+cells
			if cells > 1 {
				flush()
			}
		case cells > 0 && utf8.ValidString(sequence):
			return "", fmt.Errorf("line %d, column %d: %q is not on a terminal of %dx%d", y+1, x+w+1, sequence, columns, lines)
		case ansi.HasCsiPrefix(sequence) && parser.Command() == 'm':
			next, known := look, true
			parser.Params().ForEach(0, func(_, n int, more bool) { known = known && !more && next.set(n) })
			if len(parser.Params()) == 0 {
				known = next.set(0)
			}
			if known {
				if next != look {
					flush()
				}
				look = next
				continue
			}
			fallthrough
		default:
			return "", fmt.Errorf("line %d, column %d: unknown sequence %q", y+1, x+w+1, sequence)
		}
	}
	flush()
	b.WriteString("</g>\n</svg>\n")
	return b.String(), nil
}
