// Package plots is how plots in the documentation look.
package plots

import (
	"fmt"
	"html"
	"image/color"
	"regexp"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// The palette of Okabe and Ito, which colour-blind readers can tell apart. Each series has a
// shape of its own as well, where there are shapes.
var (
	Colours = []color.RGBA{
		{0x00, 0x72, 0xb2, 0xff}, {0xd5, 0x5e, 0x00, 0xff}, {0xe6, 0x9f, 0x00, 0xff},
		{0x00, 0x9e, 0x73, 0xff}, {0xcc, 0x79, 0xa7, 0xff}, {0x56, 0xb4, 0xe9, 0xff}, {0x00, 0x00, 0x00, 0xff},
	}
	Shapes = []draw.GlyphDrawer{
		draw.CircleGlyph{}, draw.BoxGlyph{}, draw.PyramidGlyph{},
		draw.SquareGlyph{}, draw.TriangleGlyph{}, draw.RingGlyph{}, draw.CrossGlyph{},
	}
	Grey = color.RGBA{0xdd, 0xdd, 0xdd, 0xff}
)

// Font is the font of all texts.
func Font(size vg.Length) font.Font {
	return font.Font{Typeface: "Liberation", Variant: "Sans", Size: size}
}

// New returns an empty plot.
func New() *plot.Plot {
	p := plot.New()
	for _, style := range []*text.Style{
		&p.X.Label.TextStyle, &p.Y.Label.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label, &p.Legend.TextStyle, &p.Title.TextStyle,
	} {
		style.Font = Font(10)
	}
	return p
}

var texts = regexp.MustCompile(`(<text [^>]*)font-family:Liberation Sans;([^>]*font-size:([0-9.]+)px[^>]*)>([^<]*)<`)

// Portable makes texts as wide as they are in Font, since few readers have that font.
func Portable(svg []byte) []byte {
	return texts.ReplaceAllFunc(svg, func(element []byte) []byte {
		part := texts.FindSubmatch(element)
		size, err := strconv.ParseFloat(string(part[3]), 64)
		if err != nil {
			return element
		}
		face := font.DefaultCache.Lookup(Font(0), vg.Points(size))
		width := face.Width(html.UnescapeString(string(part[4]))).Points()
		return fmt.Appendf(nil, `%sfont-family:Liberation Sans,Arial,Helvetica,sans-serif;%s textLength="%.1f" lengthAdjust="spacingAndGlyphs">%s<`,
			part[1], part[2], width, part[4])
	})
}
