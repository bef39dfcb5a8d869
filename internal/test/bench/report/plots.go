package report

import (
	"bytes"
	"cmp"
	"fmt"
	"image/color"
	"math"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"

	"github.com/egressbpf/egressbpf/internal/test/bench/results"
	"github.com/egressbpf/egressbpf/internal/test/plots"
)

const width = 8 * vg.Inch

// plots draws what there is data for, by name.
func (d data) plots() (map[string][]byte, error) {
	all := map[string][]byte{}
	for name, draw := range map[string]func() ([]byte, error){
		"ratios": d.ratiosPlot, "refused": d.refusedPlot, "containers": d.containersPlot,
		"programs": d.programsPlot, "limiter": d.limiterPlot,
	} {
		svg, err := draw()
		if err != nil {
			return nil, fmt.Errorf("plot %s: %w", name, err)
		}
		if svg != nil {
			all[name] = svg
		}
	}
	return all, nil
}

// series is what one filter has in each row of a plot of dots. A row may have none.
type series struct {
	name   string
	values []*figure
}

// dots draws a row for each name, and a dot with the quartiles for each series in it.
func dots(axis string, reference float64, rows []string, all []series) ([]byte, error) {
	all = slices.DeleteFunc(all, func(s series) bool {
		return !slices.ContainsFunc(s.values, func(f *figure) bool { return f != nil })
	})
	if len(all) == 0 {
		return nil, nil
	}
	p := newPlot()
	p.X.Label.Text = axis
	p.X.Tick.Marker = separated{plot.DefaultTicks{}}
	n := len(rows)
	var ticks []plot.Tick
	for i, r := range rows {
		ticks = append(ticks, plot.Tick{Value: float64(n - 1 - i), Label: r})
	}
	p.Y.Tick.Marker = plot.ConstantTicks(ticks)
	p.Y.Tick.Length = 0
	p.Add(grid{rows: n, at: reference})
	var used []int
	for i, s := range all {
		var points quartiles
		for row, f := range s.values {
			if f == nil || math.IsInf(f.q3, 0) || math.IsInf(f.median, 0) {
				continue
			}
			y := float64(n-1-row) + 0.7*(0.5-(float64(i)+0.5)/float64(len(all)))
			points.add(f.median, y, f.median-f.q1, f.q3-f.median)
		}
		if err := points.draw(p, s.name, look(s.name, &used), false); err != nil {
			return nil, err
		}
	}
	p.X.Min, p.X.Max = min(p.X.Min, reference), max(p.X.Max, reference)
	margin := (p.X.Max - p.X.Min) / 30
	p.X.Min, p.X.Max = p.X.Min-margin, p.X.Max+margin
	p.Y.Min, p.Y.Max = -0.5, float64(n)-0.5
	perRow := max(16, 7*vg.Length(len(all)))
	return svg(p, vg.Length(n)*perRow+45)
}

// filterOf is the filter of a series that is called by a label.
func filterOf(series string) string {
	filter, _, _ := strings.Cut(series, ",")
	return filter
}

// look chooses the colour and the shape of a series: the same in all plots, as far as they are
// not in use.
func look(series string, used *[]int) int {
	filter := filterOf(series)
	i := max(0, slices.Index([]string{tool, nftRules, legacyRules, hashlimit, nftablesSet, addressDeny, none}, filter))
	if filter == perContainer {
		i = 1
	}
	for range plots.Colours {
		if !slices.Contains(*used, i) {
			break
		}
		i = (i + 1) % len(plots.Colours)
	}
	*used = append(*used, i)
	return i
}

// quartiles are dots with whiskers.
type quartiles struct {
	plotter.XYs
	plotter.XErrors
	plotter.YErrors
}

func (q *quartiles) add(x, y, below, above float64) {
	q.XYs = append(q.XYs, plotter.XY{X: x, Y: y})
	e := struct{ Low, High float64 }{-below, above}
	q.XErrors = append(q.XErrors, e)
	q.YErrors = append(q.YErrors, e)
}

// draw adds the dots to a plot, and to its legend.
func (q *quartiles) draw(p *plot.Plot, name string, i int, vertical bool) error {
	if len(q.XYs) == 0 {
		return nil
	}
	colour := plots.Colours[i%len(plots.Colours)]
	points, err := plotter.NewScatter(q.XYs)
	if err != nil {
		return err
	}
	points.GlyphStyle = draw.GlyphStyle{Color: colour, Radius: 3, Shape: plots.Shapes[i%len(plots.Shapes)]}
	if vertical {
		whiskers, err := plotter.NewYErrorBars(struct {
			plotter.XYer
			plotter.YErrorer
		}{q.XYs, q.YErrors})
		if err != nil {
			return err
		}
		whiskers.Color, whiskers.CapWidth = colour, 4
		p.Add(whiskers)
	} else {
		whiskers, err := plotter.NewXErrorBars(struct {
			plotter.XYer
			plotter.XErrorer
		}{q.XYs, q.XErrors})
		if err != nil {
			return err
		}
		whiskers.Color, whiskers.CapWidth = colour, 4
		p.Add(whiskers)
	}
	p.Add(points)
	p.Legend.Add(name, points)
	return nil
}

// grid separates the rows of a plot of dots, and marks what they are compared with.
type grid struct {
	rows int
	at   float64
}

func (g grid) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	line := draw.LineStyle{Color: plots.Grey, Width: 0.5}
	for i := 1; i < g.rows; i++ {
		c.StrokeLine2(line, c.Min.X, y(float64(i)-0.5), c.Max.X, y(float64(i)-0.5))
	}
	line = draw.LineStyle{Color: color.Gray{0x66}, Width: 1, Dashes: []vg.Length{3, 3}}
	c.StrokeLine2(line, x(g.at), c.Min.Y, x(g.at), c.Max.Y)
}

// separated writes the numbers of an axis as the page does.
type separated struct{ plot.Ticker }

func (s separated) Ticks(least, most float64) []plot.Tick {
	all := s.Ticker.Ticks(least, most)
	for i, t := range all {
		if t.Label == "" {
			continue
		}
		for places := range 6 {
			all[i].Label = decimal(t.Value, places)
			if scale := math.Pow10(places); math.Abs(math.Round(t.Value*scale)/scale-t.Value) < 1e-9 {
				break
			}
		}
	}
	return all
}

func newPlot() *plot.Plot {
	p := plots.New()
	p.Legend.Top, p.Legend.Left = true, true
	p.Legend.Padding = 4
	p.Legend.ThumbnailWidth = 12
	return p
}

// svg draws a plot of this height below its legend.
func svg(p *plot.Plot, height vg.Length) ([]byte, error) {
	const margin = 8
	above := p.Legend.Rectangle(draw.Canvas{}).Size().Y + margin
	size := height + above + 3*margin
	out := vgsvg.New(width, size)
	c := draw.New(out)
	// Readers may see the page on a dark background.
	c.SetColor(color.White)
	c.Fill(c.Rectangle.Path())
	c = draw.Crop(c, margin, -margin, margin, -margin)
	p.Legend.Draw(c)
	p.Legend = plot.NewLegend()
	p.Draw(draw.Crop(c, 0, 0, 0, -above-margin/2))
	var text bytes.Buffer
	if _, err := out.WriteTo(&text); err != nil {
		return nil, err
	}
	return plots.Portable(text.Bytes()), nil
}

// compared are the filters in plots of traffic.
var compared = []string{tool, nftRules, legacyRules, hashlimit, nftablesSet, addressDeny}

// trafficPlot draws the operations on one CPU for which want is true.
// If over is true, a value is derived from the cost and that of no filter, else from the cost.
func (d data) trafficPlot(axis string, reference float64, want func(results.Cost) bool, over bool, derive func([]float64) float64) ([]byte, error) {
	var rows, operations []string
	for _, c := range d.costs(traffic, func(c results.Cost) bool { return c.CPUs == 1 && c.Filter == tool && want(c) }) {
		if !slices.Contains(operations, c.Operation) {
			operations = append(operations, c.Operation)
			rows = append(rows, describe(c.Operation, 1))
		}
	}
	filters := compared
	if !over {
		filters = append([]string{none}, compared...)
	}
	var all []series
	for _, filter := range filters {
		s := series{name: filter, values: make([]*figure, len(operations))}
		if prefixes := d.fewestPrefixes(filter); prefixes > 0 {
			s.name = label(results.Cost{Filter: filter, Prefixes: prefixes})
		}
		for i, op := range operations {
			c, err := d.find(traffic, op, filter, few, 1)
			if err != nil {
				continue
			}
			costs := []results.Cost{c}
			if over {
				b, err := d.noFilter(c)
				if err != nil {
					continue
				}
				costs = append(costs, b)
			}
			f := summarise(perRound(derive, costs...))
			s.values[i] = &f
		}
		all = append(all, s)
	}
	return dots(axis, reference, rows, all)
}

func isRefused(c results.Cost) bool {
	return strings.HasPrefix(c.Operation, "refused ")
}

func (d data) ratiosPlot() ([]byte, error) {
	return d.trafficPlot("time, divided by the time with no filter (1 = as fast; lower is better)", 1,
		func(c results.Cost) bool { return !isRefused(c) }, true, ratioTo)
}

func (d data) refusedPlot() ([]byte, error) {
	return d.trafficPlot("µs for one attempt (lower is better)", 0, isRefused, false, func(of []float64) float64 { return of[0] / 1e3 })
}

// programsPlot draws what the programs cost over an empty one.
func (d data) programsPlot() ([]byte, error) {
	var rows []string
	var all []series
	for _, p := range d.programs() {
		if p.over == nil {
			continue
		}
		i := slices.Index(rows, p.Operation)
		if i < 0 {
			i = len(rows)
			rows = append(rows, p.Operation)
		}
		at := slices.IndexFunc(all, func(s series) bool { return s.name == label(p.Cost) })
		if at < 0 {
			at = len(all)
			all = append(all, series{name: label(p.Cost)})
		}
		s := &all[at]
		s.values = append(s.values, make([]*figure, max(0, i+1-len(s.values)))...)
		s.values[i] = p.over
	}
	slices.SortStableFunc(all, func(a, b series) int {
		return cmp.Compare(rank(filterOf(a.name)), rank(filterOf(b.name)))
	})
	return dots("ns over an empty program (lower is better)", 0, rows, all)
}

// limiterPlot draws how much of what the limit allows was admitted.
func (d data) limiterPlot() ([]byte, error) {
	var rows []string
	s := series{name: "admitted ÷ allowed"}
	for _, l := range d.sortedLimits() {
		if l.Missing != "" || l.Allowed <= 0 {
			continue
		}
		r := float64(l.Admitted) / l.Allowed
		rows = append(rows, fmt.Sprintf("%s, %s", l.Filter, count(max(1, l.CPUs), "CPU")))
		s.values = append(s.values, &figure{median: r, q1: r, q3: r})
	}
	return dots("connections admitted, divided by those allowed (1 = exact; more is too many)", 1, rows, []series{s})
}

// containersPlot draws what a UDP packet costs with rules for each container.
func (d data) containersPlot() ([]byte, error) {
	w, err := d.walk(udp4)
	if err != nil {
		return nil, nil
	}
	p := newPlot()
	// A label beside a logarithmic axis takes room as if it were in another place.
	p.X.Label.Text, p.Title.Text = "containers", "ns over no filter for each UDP packet (IPv4), by the number of containers"
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.X.Tick.Marker, p.Y.Tick.Marker = separated{plot.LogTicks{Prec: -1}}, separated{plot.LogTicks{Prec: -1}}
	lines := plotter.NewGrid()
	lines.Vertical.Color, lines.Horizontal.Color = plots.Grey, plots.Grey
	p.Add(lines)
	last := float64(w.rules[len(w.rules)-1].Containers)
	var used []int
	for i, of := range []struct {
		name  string
		costs []results.Cost
	}{{tool, w.tool}, {perContainer, w.rules}} {
		var points quartiles
		for _, c := range of.costs {
			f := summarise(perRound(over, c, w.none))
			if f.q1 > 0 { // a logarithm needs it
				points.add(float64(c.Containers), f.median, f.median-f.q1, f.q3-f.median)
			}
		}
		if len(points.XYs) == 0 {
			return nil, nil
		}
		path := points.XYs
		name := of.name
		if end := path[len(path)-1]; end.X < last {
			path = append(slices.Clone(path), plotter.XY{X: last, Y: end.Y})
			name += fmt.Sprintf(" (measured with %s)", count(int(end.X), "container"))
		} else if i == 1 && w.three {
			name += " (for one container: the three rules)"
		}
		line, err := plotter.NewLine(path)
		if err != nil {
			return nil, err
		}
		style := look(of.name, &used)
		line.Color = plots.Colours[style]
		p.Add(line)
		if err := points.draw(p, name, style, true); err != nil {
			return nil, err
		}
	}
	// Whole powers of ten have a number each.
	p.X.Min, p.X.Max = decade(p.X.Min, math.Floor), decade(p.X.Max, math.Ceil)
	p.Y.Min, p.Y.Max = decade(p.Y.Min, math.Floor), decade(p.Y.Max, math.Ceil)
	return svg(p, 4*vg.Inch)
}

func decade(v float64, round func(float64) float64) float64 {
	return math.Pow(10, round(math.Log10(v)))
}
