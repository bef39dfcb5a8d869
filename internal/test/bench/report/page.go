package report

import (
	"bytes"
	"cmp"
	_ "embed"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"slices"
	"strings"
	"text/template"

	"github.com/egressbpf/egressbpf/internal/test/bench/results"
)

//go:embed page.md.tmpl
var pageText string

// page is what page.md.tmpl reads.
type page struct {
	data
	// Plots are those that could be drawn, by their names.
	Plots map[string]bool
	Notes []note
}

// note explains why a bound does not hold.
type note struct{ Title, Text string }

// markdown returns the page. Notes are read from files that are named after bounds.
func (d data) markdown(plots map[string]bool, notes fs.FS) ([]byte, error) {
	p := page{data: d, Plots: plots}
	for _, b := range d.bounds() {
		text, err := fs.ReadFile(notes, b.id+".md")
		switch {
		case err == nil:
			p.Notes = append(p.Notes, note{b.what, strings.TrimSpace(string(text))})
		case b.broken():
			p.Notes = append(p.Notes, note{b.what, "Not explained yet: the explanation belongs in `docs/performance/notes/" + b.id + ".md`."})
		}
	}
	t, err := template.New("page").Parse(pageText)
	if err != nil {
		return nil, err
	}
	var text bytes.Buffer
	if err := t.Execute(&text, p); err != nil {
		return nil, err
	}
	return text.Bytes(), nil
}

var escape = strings.NewReplacer("\n", " ", "|", `\|`, "<", "&lt;")

// table writes a table in Markdown. Columns after the first few are aligned to the right.
func table(head []string, left int, rows [][]string) string {
	var s strings.Builder
	line := func(cells []string) { fmt.Fprintf(&s, "| %s |\n", strings.Join(cells, " | ")) }
	line(head)
	rule := make([]string, len(head))
	for i := range head {
		rule[i] = "---"
		if i >= left {
			rule[i] = "---:"
		}
	}
	fmt.Fprintf(&s, "|%s|\n", strings.Join(rule, "|"))
	for _, r := range rows {
		cells := make([]string, len(head))
		for i, c := range r {
			cells[i] = escape.Replace(c)
		}
		line(cells)
	}
	return s.String()
}

// BoundsTable is the table of what must hold.
func (p page) BoundsTable() string {
	var rows [][]string
	for _, b := range p.bounds() {
		for i, r := range b.rows {
			what, must := b.what, b.must
			if i > 0 {
				what, must = "", ""
			}
			rows = append(rows, []string{what, r.what, must, r.measured, r.verdict.String()})
		}
	}
	return table([]string{"what", "case", "must hold", "measured", "holds?"}, 5, rows)
}

// BoundsSummary counts the verdicts.
func (p page) BoundsSummary() string {
	n := map[verdict]int{}
	all := 0
	for _, b := range p.bounds() {
		for _, r := range b.rows {
			n[r.verdict]++
			all++
		}
	}
	text := fmt.Sprintf("Of %s, %d hold", count(all, "case"), n[holds]+n[holdsWithinNoise])
	if n[exceeded] > 0 {
		text += fmt.Sprintf(", %d do not hold", n[exceeded])
	}
	if n[notMeasured] > 0 {
		text += fmt.Sprintf(", and %d were not measured", n[notMeasured])
	}
	return text + "."
}

// comparison is an operation of traffic, with egressbpf and with the three rules.
type comparison struct {
	what        string
	more, ratio figure
	unit        string
}

// text says how much egressbpf costs more or less.
func (c comparison) text() string {
	word := "more"
	if c.ratio.median < 1 {
		word = "less"
	}
	lo, hi := c.ratio.q1, c.ratio.q3
	if c.ratio.median < 1 {
		lo, hi = hi, lo
	}
	// The sign is in the word, unless the spread has both.
	of := func(v float64) string { return percentage(100 * (v - 1)) }
	if (lo-1)*(hi-1) > 0 {
		of = percent
	}
	return fmt.Sprintf("%s: %s %s, which is %s (%s to %s)", c.what, quantity(c.unit)(math.Abs(c.more.median)), word,
		percent(c.ratio.median), of(lo), of(hi))
}

// Comparisons are what egressbpf costs against the three rules.
type Comparisons struct {
	Rules                 string // which of the three rules
	Dearer, Cheaper, Same []string
}

// Against compares the whole tool with the three rules, of the first kind that was measured,
// in the operations of which OneWayUDP does not speak.
func (p page) Against() Comparisons {
	for _, rules := range threeRules {
		c := Comparisons{Rules: rules}
		for _, whole := range p.costs(traffic, func(c results.Cost) bool { return c.Filter == tool && len(c.Samples) > 0 }) {
			if whole.Operation == udp4 && whole.CPUs == 1 {
				continue
			}
			if smallest, err := p.find(traffic, whole.Operation, tool, few, whole.CPUs); err != nil || smallest.Containers != whole.Containers {
				continue
			}
			costs, err := p.against(whole.Operation, rules, whole.CPUs)
			if err != nil {
				continue
			}
			cmp := comparison{
				what:  describe(whole.Operation, whole.CPUs),
				more:  summarise(perRound(moreThan, costs...)),
				ratio: summarise(perRound(timesOf, costs...)),
				unit:  whole.Unit,
			}
			switch {
			case cmp.ratio.low > 1:
				c.Dearer = append(c.Dearer, cmp.text())
			case cmp.ratio.high < 1:
				c.Cheaper = append(c.Cheaper, cmp.text())
			default:
				c.Same = append(c.Same, cmp.what)
			}
		}
		if len(c.Dearer)+len(c.Cheaper)+len(c.Same) > 0 {
			return c
		}
	}
	return Comparisons{}
}

// OneWayUDP says first what a UDP packet of one container costs.
func (p page) OneWayUDP() string {
	var first error
	for _, rules := range threeRules {
		costs, err := p.against(udp4, rules, 1)
		if err != nil {
			first = cmp.Or(first, err)
			continue
		}
		more, share := summarise(perRound(moreThan, costs...)), summarise(perRound(timesOf, costs...))
		verdict := "dearer"
		switch {
		case more.high < 0:
			verdict = "cheaper"
		case more.low <= 0:
			return fmt.Sprintf("For one container that sends UDP packets one way, egressbpf costs as much as the three rules (%s), within noise: %s ns a packet more or less.",
				rules, more.text(signed(nanoseconds)))
		}
		sign := 1.0
		if more.median < 0 {
			sign = -1
		}
		as := func(v float64) string { return nanoseconds(sign * v) }
		f := figure{median: more.median, q1: more.q1, q3: more.q3}
		if sign < 0 {
			f.q1, f.q3 = more.q3, more.q1
		}
		return fmt.Sprintf("For one container that sends UDP packets one way, egressbpf is **%s than the three rules** (%s), by %s ns a packet, or %s.",
			verdict, rules, f.text(as), percent(share.median))
	}
	return "Whether egressbpf is dearer than the three rules for one-way UDP was not measured: " + first.Error() + "."
}

// Crossing says from how many containers on egressbpf is cheaper for a UDP packet.
func (p page) Crossing() string {
	w, err := p.walk(udp4)
	if err != nil {
		return "From how many containers on egressbpf is cheaper was not measured: " + err.Error() + "."
	}
	f := w.crossing()
	first, last := w.rules[0].Containers, w.rules[len(w.rules)-1].Containers
	switch {
	case math.IsInf(f.median, 1):
		return fmt.Sprintf("With rules for each container, egressbpf is not cheaper for up to %s.", count(last, "container"))
	case f.median <= float64(first) && first == 1:
		return "With rules for each container, egressbpf is cheaper from the first container on."
	case f.median <= float64(first):
		return fmt.Sprintf("With rules for each container, egressbpf is cheaper with %s; fewer were not measured.", count(first, "container"))
	}
	text := fmt.Sprintf("With rules for each container, egressbpf is **cheaper from %s on** for a UDP packet", count(int(math.Ceil(f.median)), "container"))
	if lo, hi := wholeNumber(f.q1), wholeNumber(f.q3); lo != hi {
		text += fmt.Sprintf(" (%s to %s)", lo, hi)
	}
	return text + "."
}

func wholeNumber(v float64) string {
	if math.IsInf(v, 1) {
		return "more than measured"
	}
	return decimal(math.Ceil(v), 0)
}

// CrossingTable has a row for each operation that was measured with rules for each container.
func (p page) CrossingTable() string {
	var rows [][]string
	for _, w := range p.walks() {
		f := w.crossing()
		var measured []string
		for _, c := range w.rules {
			measured = append(measured, decimal(float64(c.Containers), 0))
		}
		from := wholeNumber(f.median)
		if f.median <= float64(w.rules[0].Containers) {
			from = "at most " + from
		}
		spread := ""
		if lo, hi := wholeNumber(f.q1), wholeNumber(f.q3); lo != hi {
			spread = lo + " to " + hi
		}
		rows = append(rows, []string{describe(w.operation, 1), from, spread, strings.Join(measured, "; ")})
	}
	if len(rows) == 0 {
		return ""
	}
	return table([]string{"operation", "cheaper from", "quartiles", "containers measured"}, 1, rows)
}

// UnitIsThree says whether the cost of one container's rules is that of the three rules.
func (p page) UnitIsThree() bool {
	return slices.ContainsFunc(p.walks(), func(w walk) bool { return w.three })
}

// ToolContainers says with how many containers the tool was measured beside the rules of each.
func (p page) ToolContainers() string {
	w, err := p.walk(udp4)
	if err != nil {
		return ""
	}
	var all []string
	for _, c := range w.tool {
		all = append(all, decimal(float64(c.Containers), 0))
	}
	return strings.Join(all, ", ")
}

// Group is the tables of a kind of operation.
type Group struct{ Title, Table string }

// variant is a column, or a table, of a group.
type variant struct {
	operation, version string
	cpus               int
}

// Traffic groups the operations that differ in the IP version alone.
func (p page) Traffic() (all []Group) {
	type group struct {
		title    string
		variants []variant
	}
	var groups []*group
	for _, c := range p.costs(traffic, nil) {
		k, version := kind(c.Operation)
		heading := title(k)
		if c.CPUs > 1 {
			heading += ", " + count(c.CPUs, "CPU")
		}
		i := slices.IndexFunc(groups, func(g *group) bool { return g.title == heading })
		if i < 0 {
			i = len(groups)
			groups = append(groups, &group{title: heading})
		}
		if v := (variant{c.Operation, version, c.CPUs}); !slices.Contains(groups[i].variants, v) {
			groups[i].variants = append(groups[i].variants, v)
		}
	}
	for _, g := range groups {
		slices.SortStableFunc(g.variants, func(a, b variant) int { return strings.Compare(a.version, b.version) })
		all = append(all, Group{g.title, p.trafficTable(g.variants)})
	}
	return all
}

func (p page) trafficTable(variants []variant) string {
	head := []string{"filter"}
	type line struct {
		filter               string
		containers, prefixes int
	}
	var lines []line
	for _, v := range variants {
		prefix := ""
		if v.version != "" {
			prefix = "IPv" + v.version + ": "
		}
		unit := ""
		for _, c := range p.costs(traffic, func(c results.Cost) bool { return c.Operation == v.operation && c.CPUs == v.cpus }) {
			unit = cmp.Or(unit, c.Unit)
			if l := (line{c.Filter, c.Containers, c.Prefixes}); !slices.Contains(lines, l) {
				lines = append(lines, l)
			}
		}
		head = append(head, prefix+unit, "over no filter, "+unit, "ratio to no filter")
	}
	slices.SortStableFunc(lines, func(a, b line) int {
		return cmp.Or(cmp.Compare(rank(a.filter), rank(b.filter)), cmp.Compare(a.containers, b.containers), cmp.Compare(a.prefixes, b.prefixes))
	})
	var rows [][]string
	for _, l := range lines {
		cells := []string{label(results.Cost{Filter: l.filter, Containers: l.containers, Prefixes: l.prefixes})}
		for _, v := range variants {
			all := p.costs(traffic, func(c results.Cost) bool {
				return c.Operation == v.operation && c.CPUs == v.cpus && (line{c.Filter, c.Containers, c.Prefixes}) == l
			})
			switch {
			case len(all) == 0:
				cells = append(cells, "not measured", "", "")
				continue
			case len(all[0].Samples) == 0:
				cells = append(cells, "not measured: "+all[0].Missing, "", "")
				continue
			}
			c := all[0]
			cells = append(cells, nanoseconds(summarise(c.Samples).median))
			base, err := p.noFilter(c)
			if err != nil || l.filter == none || l.filter == noneLegacy {
				cells = append(cells, "", "")
				continue
			}
			cells = append(cells,
				summarise(perRound(over, c, base)).text(signed(nanoseconds)),
				summarise(perRound(ratioTo, c, base)).text(ratio))
		}
		rows = append(rows, cells)
	}
	return table(head, 1, rows)
}

// EmptyProgram says what an empty program takes alone.
func (p page) EmptyProgram() string {
	for _, c := range p.costs(programs, isEmpty) {
		if len(c.Samples) > 0 {
			return "An empty program takes " + nanoseconds(summarise(c.Samples).median) + " ns."
		}
	}
	return "An empty program was not measured."
}

// Crowd says what other containers add to a packet in the programs alone.
func (p page) Crowd() string {
	crowded, err := p.find(programs, crowdedPass, tool, few, 1)
	if err != nil {
		return ""
	}
	alone, err := p.find(programs, pass, tool, few, 1)
	if err != nil {
		return ""
	}
	f := summarise(perRound(over, crowded, alone))
	return fmt.Sprintf("In [the programs alone](#the-programs-alone), “%s” takes %s ns more than “%s”.", crowdedPass, f.text(nanoseconds), pass)
}

// label is a cost's filter as it is called in a table.
func label(c results.Cost) string {
	text := c.Filter
	if c.Containers > 1 {
		text += ", " + count(c.Containers, "container")
	}
	if c.Prefixes > 0 {
		text += ", " + count(c.Prefixes, "prefix")
	}
	return text
}

// ProgramsTable is what the programs cost alone.
func (p page) ProgramsTable() string {
	var rows [][]string
	for _, c := range p.programs() {
		cells := []string{c.Operation, label(c.Cost)}
		instructions := ""
		if c.Instructions > 0 {
			instructions = decimal(float64(c.Instructions), 0)
		}
		switch {
		case len(c.Samples) == 0:
			cells = append(cells, "not measured: "+c.Missing, "")
		case c.over == nil:
			cells = append(cells, nanoseconds(summarise(c.Samples).median), "not measured")
		default:
			cells = append(cells, nanoseconds(summarise(c.Samples).median), c.over.text(signed(nanoseconds)))
		}
		rows = append(rows, append(cells, instructions))
	}
	if len(rows) == 0 {
		return "Not measured: the results have no programs.\n"
	}
	return table([]string{"packet", "program", "ns", "over an empty program, ns", "instructions verified"}, 2, rows)
}

// LimitersTable is how exact the limiters are.
func (p page) LimitersTable() string {
	var rows [][]string
	for _, l := range p.sortedLimits() {
		cells := []string{l.Filter, fmt.Sprint(max(1, l.CPUs)), limit(l)}
		if l.Missing != "" {
			rows = append(rows, append(cells, "not measured: "+l.Missing))
			continue
		}
		rows = append(rows, append(cells, number(l.Seconds), decimal(float64(l.Asked), 0), decimal(float64(l.Admitted), 0),
			decimal(l.Allowed, 1), ratio(quotient(float64(l.Admitted), l.Allowed)), decimal(beyond(l.Admitted, l.Allowed), 0)))
	}
	if len(rows) == 0 {
		return "Not measured: the results have no limiters.\n"
	}
	return table([]string{"limiter", "CPUs", "limit", "seconds", "asked for", "admitted", "allowed", "admitted ÷ allowed", "too many"}, 1, rows)
}

func (d data) sortedLimits() []results.Limiter {
	all := slices.Clone(d.Limits)
	slices.SortStableFunc(all, func(a, b results.Limiter) int { return cmp.Compare(rank(a.Filter), rank(b.Filter)) })
	return all
}

func limit(l results.Limiter) string {
	rate := plain(l.PerSecond) + "/second"
	if l.PerSecond < 1 {
		rate = plain(60*l.PerSecond) + "/minute"
	}
	return rate + fmt.Sprintf(", burst %d", l.Burst)
}

// CommandsTable is what commands cost, and memory.
func (p page) CommandsTable() string {
	var rows [][]string
	based := false
	for _, c := range p.costs(commands, nil) {
		containers := ""
		if c.Containers > 0 {
			containers = decimal(float64(c.Containers), 0)
		}
		cells := []string{c.Operation, c.Filter, containers}
		if len(c.Samples) == 0 {
			rows = append(rows, append(cells, "not measured: "+c.Missing))
			continue
		}
		as := quantity(c.Unit)
		f := summarise(c.Samples)
		spread := ""
		if f.rounds > 1 {
			spread = fmt.Sprintf("%s to %s", as(f.q1), as(f.q3))
		}
		cells = append(cells, as(f.median), spread)
		if base, err := p.find(commands, c.Operation, none, c.Containers, c.CPUs); err == nil && c.Filter != none && base.Unit == c.Unit {
			based = true
			cells = append(cells, summarise(perRound(over, c, base)).text(signed(as)))
		}
		rows = append(rows, cells)
	}
	if len(rows) == 0 {
		return "Not measured: the results have no commands.\n"
	}
	head := []string{"what", "filter", "containers", "median", "quartiles"}
	if based {
		head = append(head, "over no filter")
	}
	return table(head, 2, rows)
}

// Rounds says how many rounds there were.
func (p page) Rounds() string {
	var all []string
	for _, part := range []string{programs, traffic, commands} {
		least, most := 0, 0
		for _, c := range p.costs(part, func(c results.Cost) bool { return len(c.Samples) > 0 }) {
			n := len(c.Samples)
			if least == 0 || n < least {
				least = n
			}
			most = max(most, n)
		}
		switch {
		case most == 0:
		case least == most:
			all = append(all, fmt.Sprintf("%s: %d", part, most))
		default:
			all = append(all, fmt.Sprintf("%s: %d to %d", part, least, most))
		}
	}
	if len(all) == 0 {
		return "none"
	}
	return strings.Join(all, "; ")
}

// MachineTable says where the measurements were taken.
func (p page) MachineTable() string {
	m := p.Machine
	text := func(s string) string { return cmp.Or(s, "not recorded") }
	when := "not recorded"
	if !m.Time.IsZero() {
		when = m.Time.UTC().Format("2 January 2006, 15:04 UTC")
	}
	rows := [][]string{
		{"measured", when},
		{"egressbpf", text(m.Version)},
		{"kernel", text(m.Kernel)},
		{"CPU", text(m.CPU)},
		{"CPUs", fmt.Sprint(m.CPUs)},
		{"used by other processes before the run", number(m.Busy) + " CPUs"},
	}
	for _, name := range slices.Sorted(maps.Keys(m.Tools)) {
		rows = append(rows, []string{name, text(m.Tools[name])})
	}
	return table([]string{"", ""}, 2, rows)
}
