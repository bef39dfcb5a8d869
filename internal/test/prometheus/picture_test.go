package prometheus

import (
	"bytes"
	"cmp"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"image/color"
	"io"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"

	"github.com/egressbpf/egressbpf/internal/test/plots"
)

// The size of a cell of the dashboard's grid, in points.
const (
	cellWidth, cellHeight = 42, 30
	margin                = 8
)

var (
	black  = color.Gray{0x22}
	faint  = color.Gray{0x77}
	around = color.Gray{0xf4}
	// named are the colours of thresholds.
	named = map[string]color.Color{"green": plots.Colours[3], "red": plots.Colours[1], "orange": plots.Colours[2], "text": black}
)

// canvas is a part of the picture.
type canvas struct{ draw.Canvas }

// write writes a text below y, and cuts it off where there is no more room.
func (c canvas) write(x, y, width, size vg.Length, ink color.Color, align text.XAlignment, s string) {
	style := text.Style{Color: ink, Font: plots.Font(size), XAlign: align, YAlign: text.YTop, Handler: plot.DefaultTextHandler}
	if runes := []rune(s); style.Width(s) > width {
		for len(runes) > 0 && style.Width(string(runes)+"…") > width {
			runes = runes[:len(runes)-1]
		}
		s = string(runes) + "…"
	}
	c.FillText(style, vg.Point{X: x, Y: y}, s)
}

func (c canvas) box(x0, y0, x1, y1 vg.Length, ink color.Color) {
	c.FillPolygon(ink, []vg.Point{{X: x0, Y: y0}, {X: x0, Y: y1}, {X: x1, Y: y1}, {X: x1, Y: y0}})
}

// draw draws the dashboard's panels with what their queries resulted in, as Grafana might.
func (b board) draw(all answers, period time.Duration) []byte {
	rows := 0
	for _, p := range b.Panels {
		rows = max(rows, p.GridPos.Y+p.GridPos.H)
	}
	const above = 24
	size := vg.Length(rows*cellHeight + above)
	out := vgsvg.New(24*cellWidth, size)
	page := canvas{draw.New(out)}
	page.box(page.Min.X, page.Min.Y, page.Max.X, page.Max.Y, around)
	page.write(margin, size-6, 24*cellWidth-2*margin, 10, faint, text.XLeft,
		"The queries of dist/grafana/egressbpf.json, answered by a real Prometheus about made-up containers. Drawn by egressbpf's tests, not by Grafana, which shows them in its own way.")
	for _, p := range b.Panels {
		g := p.GridPos
		top := size - above - vg.Length(g.Y*cellHeight)
		c := canvas{draw.Canvas{Canvas: page.Canvas.Canvas, Rectangle: vg.Rectangle{
			Min: vg.Point{X: vg.Length(g.X*cellWidth) + 3, Y: top - vg.Length(g.H*cellHeight) + 3},
			Max: vg.Point{X: vg.Length((g.X+g.W)*cellWidth) - 3, Y: top - 3},
		}}}
		if p.Type == "row" {
			c.write(c.Min.X+margin, c.Max.Y-3, c.Size().X, 13, black, text.XLeft, p.Title)
			continue
		}
		c.box(c.Min.X, c.Min.Y, c.Max.X, c.Max.Y, color.White)
		c.write(c.Min.X+margin, c.Max.Y-6, c.Size().X-2*margin, 10, black, text.XLeft, p.Title)
		body := canvas{draw.Crop(c.Canvas, margin, -margin, margin, -24)}
		map[string]func(canvas, panel, map[string][]series, time.Duration){
			"stat": drawStat, "table": drawTable, "bargauge": drawBars, "timeseries": drawLines,
		}[p.Type](body, p, all[p.ID], period)
	}
	var svg bytes.Buffer
	if _, err := out.WriteTo(&svg); err != nil {
		panic(err) // a buffer does not fail
	}
	return plots.Portable(svg.Bytes())
}

// in writes a value in the panel's unit.
func (p panel) in(value float64) string {
	short := func(v float64) string {
		places := 2
		if d := p.FieldConfig.Defaults.Decimals; d != nil {
			places = *d
		}
		text := strconv.FormatFloat(v, 'f', places, 64)
		if strings.Contains(text, ".") {
			text = strings.TrimRight(strings.TrimRight(text, "0"), ".")
		}
		return text
	}
	switch unit := p.FieldConfig.Defaults.Unit; unit {
	case "percentunit":
		return short(100*value) + "%"
	case "pps":
		return short(value) + " p/s"
	case "cps":
		return short(value) + " c/s"
	case "Bps":
		return short(value) + " B/s"
	default:
		return short(value)
	}
}

// colour is that of the last threshold that the value reaches.
func colour(steps []step, value float64) color.Color {
	var ink color.Color = black
	for _, s := range steps {
		if s.Value == nil || value >= *s.Value {
			ink = named[s.Color]
		}
	}
	return ink
}

var inLegend = regexp.MustCompile(`\{\{(\w+)\}\}`)

// name is what the legend calls a series.
func (q target) name(s series) string {
	return strings.TrimSpace(inLegend.ReplaceAllStringFunc(q.LegendFormat, func(label string) string {
		return s.Metric[label[2:len(label)-2]]
	}))
}

func drawStat(c canvas, p panel, results map[string][]series, _ time.Duration) {
	shown, ink := "No data", color.Color(faint)
	if r := results["A"]; len(r) > 0 {
		shown, ink = p.in(r[0].Value.value), colour(p.FieldConfig.Defaults.Thresholds.Steps, r[0].Value.value)
	}
	c.write(c.Center().X, c.Center().Y+22, c.Size().X, 36, ink, text.XCenter, shown)
}

func drawBars(c canvas, p panel, results map[string][]series, _ time.Duration) {
	const height = 22
	most := 1.0
	for _, s := range results["A"] {
		most = max(most, s.Value.value)
	}
	names, values := 0.5*c.Size().X, vg.Length(34)
	y := c.Max.Y
	for _, s := range results["A"] {
		if y -= height; y < c.Min.Y {
			return
		}
		left, room := c.Min.X+names+margin, c.Size().X-names-values-margin
		ink := colour(p.FieldConfig.Defaults.Thresholds.Steps, s.Value.value)
		c.write(c.Min.X, y+height-5, names, 10, black, text.XLeft, p.Targets[0].name(s))
		c.box(left, y+4, left+room, y+height-2, around)
		c.box(left, y+4, left+room*vg.Length(s.Value.value/most), y+height-2, ink)
		c.write(c.Max.X, y+height-5, values, 10, ink, text.XRight, p.in(s.Value.value))
	}
}

// cell is the text of a table's cell and the value behind it, if that is a number.
type cell struct {
	text  string
	value *float64
}

// table is what the panel's transformations make of its results: columns in their order, with
// the names that they get, and rows.
func (p panel) table(results map[string][]series) (columns []string, rows []map[string]cell) {
	var by string
	var order map[string]int
	var renamed map[string]string
	for _, t := range p.Transformations {
		by = cmp.Or(by, t.Options.ByField)
		if t.ID == "organize" {
			order, renamed = t.Options.IndexByName, t.Options.RenameByName
		}
	}
	fields := slices.SortedFunc(maps.Keys(order), func(a, b string) int { return cmp.Compare(order[a], order[b]) })
	call := func(field string) string { return cmp.Or(renamed[field], field) }
	for _, f := range fields {
		columns = append(columns, call(f))
	}
	joined := map[string]map[string]cell{}
	for _, ref := range slices.Sorted(maps.Keys(results)) {
		for _, s := range results[ref] {
			row := map[string]cell{}
			field := "Value"
			if by != "" {
				field += " #" + ref
				if known := joined[s.Metric[by]]; known != nil {
					row = known
				}
			}
			for label, value := range s.Metric {
				row[call(label)] = cell{text: value}
			}
			row[call(field)] = cell{p.in(s.Value.value), &s.Value.value}
			if by == "" || joined[s.Metric[by]] == nil {
				rows = append(rows, row)
			}
			if by != "" {
				joined[s.Metric[by]] = row
			}
		}
	}
	return columns, rows
}

func drawTable(c canvas, p panel, results map[string][]series, _ time.Duration) {
	const height = 20
	columns, rows := p.table(results)
	weights := make([]vg.Length, len(columns))
	var sum vg.Length
	for i, name := range columns {
		weights[i] = 1
		if name == "container" {
			weights[i] = 2
		}
		sum += weights[i]
	}
	at := func(y vg.Length, write func(i int, x, width vg.Length)) {
		x := c.Min.X
		for i := range columns {
			width := c.Size().X * weights[i] / sum
			write(i, x, width-margin)
			x += width
		}
		c.StrokeLine2(draw.LineStyle{Color: plots.Grey, Width: 0.5}, c.Min.X, y-height+2, c.Max.X, y-height+2)
	}
	y := c.Max.Y
	at(y, func(i int, x, width vg.Length) { c.write(x, y-4, width, 10, faint, text.XLeft, columns[i]) })
	for _, row := range rows {
		if y -= height; y-height < c.Min.Y {
			return
		}
		at(y, func(i int, x, width vg.Length) {
			shown, ink := p.override(columns[i], row[columns[i]])
			c.write(x, y-4, width, 10, ink, text.XLeft, shown)
		})
	}
}

// override applies the overrides for a column to one of its cells.
func (p panel) override(column string, of cell) (shown string, ink color.Color) {
	shown, ink = of.text, black
	if of.value == nil {
		return shown, ink
	}
	for _, o := range p.FieldConfig.Overrides {
		if o.Matcher.Options != column {
			continue
		}
		for _, property := range o.Properties {
			var mappings []struct {
				Options map[string]struct{ Color, Text string }
			}
			var thresholds struct{ Steps []step }
			if property.ID == "mappings" && json.Unmarshal(property.Value, &mappings) == nil {
				for _, m := range mappings {
					if to, ok := m.Options[fmt.Sprint(*of.value)]; ok {
						shown, ink = to.Text, named[to.Color]
					}
				}
			}
			if property.ID == "thresholds" && json.Unmarshal(property.Value, &thresholds) == nil {
				ink = colour(thresholds.Steps, *of.value)
			}
		}
	}
	return shown, ink
}

// drawLines draws series over time, on top of each other if the panel says so, and a legend with
// the last value of each.
func drawLines(c canvas, p panel, results map[string][]series, period time.Duration) {
	type line struct {
		name string
		series
	}
	var all []line
	for _, q := range p.Targets {
		for _, s := range results[q.RefID] {
			all = append(all, line{q.name(s), s})
		}
	}
	if len(all) == 0 {
		c.write(c.Center().X, c.Center().Y+8, c.Size().X, 14, faint, text.XCenter, "No data")
		return
	}
	slices.SortStableFunc(all, func(a, b line) int { return cmp.Compare(a.name, b.name) })
	const height = 14
	perRow := max(1, int(c.Size().X/200))
	legend := vg.Length((len(all)+perRow-1)/perRow) * height
	for i, l := range all {
		x := c.Min.X + vg.Length(i%perRow)*c.Size().X/vg.Length(perRow)
		y := c.Min.Y + legend - vg.Length(i/perRow)*height
		c.box(x, y-8, x+10, y-4, plots.Colours[i%len(plots.Colours)])
		c.write(x+14, y-1, c.Size().X/vg.Length(perRow)-20, 9, black, text.XLeft, l.name+"  "+p.in(l.Values[len(l.Values)-1].value))
	}

	var last float64
	for _, l := range all {
		last = max(last, l.Values[len(l.Values)-1].at)
	}
	graph := plots.New()
	graph.Y.Min, graph.X.Min, graph.X.Max = 0, -period.Seconds(), 0
	graph.X.Tick.Marker = labels{plot.DefaultTicks{}, func(v float64) string { return fmt.Sprintf("%g s", v) }}
	graph.Y.Tick.Marker = labels{plot.DefaultTicks{}, p.in}
	lines := plotter.NewGrid()
	lines.Vertical.Color, lines.Horizontal.Color = plots.Grey, plots.Grey
	graph.Add(lines)
	stacked := p.FieldConfig.Defaults.Custom.Stacking.Mode == "normal"
	below := map[float64]float64{}
	drawn := make([]*plotter.Line, len(all))
	for i, l := range all {
		var points plotter.XYs
		for _, v := range l.Values {
			if math.IsNaN(v.value) {
				continue
			}
			if stacked {
				below[v.at] += v.value
				v.value = below[v.at]
			}
			points = append(points, plotter.XY{X: v.at - last, Y: v.value})
		}
		if len(points) == 0 {
			continue
		}
		curve, err := plotter.NewLine(points)
		if err != nil {
			panic(err) // only without points
		}
		ink := plots.Colours[i%len(plots.Colours)]
		curve.Color, curve.Width = ink, 1.2
		if stacked {
			curve.FillColor = lighter(ink)
		}
		drawn[i] = curve
		graph.Y.Max = max(graph.Y.Max, 1.05*slices.MaxFunc(points, func(a, b plotter.XY) int { return cmp.Compare(a.Y, b.Y) }).Y)
	}
	for _, curve := range slices.Backward(drawn) {
		if curve != nil {
			graph.Add(curve)
		}
	}
	graph.Y.Min = 0
	if most := p.FieldConfig.Defaults.Max; most != nil {
		graph.Y.Max = *most
	}
	if graph.Y.Max == 0 {
		graph.Y.Max = 1
	}
	graph.Draw(draw.Crop(c.Canvas, 0, 0, legend+4, 0))
}

func lighter(c color.RGBA) color.Color {
	half := func(v uint8) uint8 { return uint8(255 - (255-int(v))/3) }
	return color.RGBA{half(c.R), half(c.G), half(c.B), 0xff}
}

// labels writes the numbers of an axis.
type labels struct {
	plot.Ticker
	write func(float64) string
}

func (l labels) Ticks(least, most float64) []plot.Tick {
	all := l.Ticker.Ticks(least, most)
	for i, t := range all {
		if t.Label != "" {
			all[i].Label = l.write(t.Value)
		}
	}
	return all
}

// checkPicture checks that a picture is whole, and that no name has become part of its markup.
func checkPicture(t *testing.T, picture []byte) {
	t.Helper()
	var shown strings.Builder
	decoder := xml.NewDecoder(bytes.NewReader(picture))
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		check(t, err)
		switch token := token.(type) {
		case xml.StartElement:
			if token.Name.Local == "script" {
				t.Error("a name has become a script")
			}
		case xml.CharData:
			shown.Write(token)
		}
	}
	for _, want := range []string{"Hosts in force", "newsletter", "blocked", "rate_limited", `<script>alert(`} {
		if !strings.Contains(shown.String(), want) {
			t.Errorf("the picture does not show %s", want)
		}
	}
}
