package top

import (
	"fmt"
	"strings"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/policy"
)

var (
	bold    = ansi.NewStyle().Bold()
	inverse = ansi.NewStyle().Reverse(true)
	red     = ansi.NewStyle().ForegroundColor(ansi.Red)
	yellow  = ansi.NewStyle().ForegroundColor(ansi.Yellow)
	// underlined marks the column by which the rows are sorted.
	underlined = ansi.NewStyle().Bold().Underline(true)
)

const (
	headLines = 2 // what holds for all containers, and notices
	// fullHeight is that of a screen with a last line for keys.
	fullHeight = 8
)

// listHeight is how many rows there are on the screen.
func (m *model) listHeight() int { return max(1, m.textHeight()-1) }

// textHeight is how many lines there are between the head and the line for keys.
func (m *model) textHeight() int {
	n := m.height - headLines
	if m.footer() != "" {
		n--
	}
	return max(1, n)
}

// View implements [tea.Model].
func (m *model) View() tea.View {
	v := tea.NewView(m.render())
	v.AltScreen = true
	return v
}

// render returns the screen, which has as many lines as the terminal.
func (m *model) render() string {
	if m.width < 1 || m.height < 1 {
		return ""
	}
	lines := []string{m.head(), m.notice()}
	if m.page == list {
		lines = append(lines, m.table()...)
	} else {
		all := m.lines()
		for _, l := range all[min(m.scroll, len(all)):min(m.scroll+m.textHeight(), len(all))] {
			s, _ := fit(l, m.width)
			lines = append(lines, s)
		}
	}
	footer := m.footer()
	room := m.height
	if footer != "" {
		room--
	}
	for len(lines) < room {
		lines = append(lines, "")
	}
	lines = lines[:room]
	if footer != "" {
		lines = append(lines, footer)
	}
	return strings.Join(lines, "\n")
}

// head is the line about all containers.
func (m *model) head() string {
	state, style := "enforcing", bold
	switch {
	case m.at.IsZero():
		state = "reading the counters"
	case m.err != nil:
		state, style = "not known whether it is enforcing", red.Bold()
	case m.mode == string(policy.Audit):
		state, style = "audit: nothing is refused", yellow.Bold()
	case !m.enforcing:
		state, style = "NOT ENFORCING", red.Bold()
	}
	left := state
	if !m.at.IsZero() {
		left += fmt.Sprintf("  %s refused/s  %d in all  %s", rateText(m.rate), m.total, plural(m.containers, "container"))
	}
	left, w := fit(left, m.width)
	var right string
	if room := m.width - w - 2; room >= 8 {
		right = "  " + cell(m.title, room, true)
	}
	if !strings.HasPrefix(left, state) {
		return style.Styled(left) + right
	}
	return style.Styled(state) + left[len(state):] + right
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// notice is the line about what is not as usual.
func (m *model) notice() string {
	style := yellow
	var parts []string
	if m.err != nil {
		style = red
		parts = append(parts, "cannot read the counters, trying again: "+m.err.Error())
	}
	if m.paused {
		parts = append(parts, "paused, p to go on")
	}
	if m.filter != "" && !m.editing {
		parts = append(parts, fmt.Sprintf("filter %s: %d of %d", printable(m.filter), len(m.rows), len(m.all)))
	}
	if m.noEvents != "" {
		parts = append(parts, m.noEvents)
	}
	if m.lost > 0 {
		parts = append(parts, plural(int(m.lost), "event")+" lost")
	}
	s, _ := fit(strings.Join(parts, "; "), m.width)
	if s == "" {
		return ""
	}
	return style.Styled(s)
}

// footer is the last line: the filter while it is typed, else the most important keys.
func (m *model) footer() string {
	if m.editing {
		// The end of what is typed has to be seen.
		prompt := "filter: " + printable(m.filter)
		for ansi.StringWidth(prompt) >= m.width && prompt != "" {
			prompt = string([]rune(prompt)[1:])
		}
		s, _ := fit(prompt, m.width-1)
		return s + inverse.Styled(" ")
	}
	if m.height < fullHeight {
		return ""
	}
	keys := "q quit  ? help  / filter  s sort  r reverse  p pause  enter details"
	if m.page != list {
		keys = "esc back  q quit  up/down scroll  p pause"
	}
	s, _ := fit(keys, m.width)
	return s
}

// table returns the header and the rows that are on the screen.
func (m *model) table() []string {
	widths := layout(m.width)
	var header []string
	for i, c := range columns {
		if widths[i] == 0 {
			continue
		}
		title, style := c.title, bold
		if i == m.sort {
			style = underlined
			if m.reverse {
				title = "-" + title
			}
		}
		header = append(header, style.Styled(cell(title, widths[i], c.right)))
	}
	lines := []string{strings.Join(header, " ")}
	switch {
	case m.at.IsZero():
		return lines
	case len(m.all) == 0:
		return append(lines, "no containers, and nothing was refused")
	case len(m.rows) == 0:
		s, _ := fit("none of "+plural(len(m.all), "row")+" matches the filter; esc shows all", m.width)
		return append(lines, s)
	}
	selected := m.index()
	for i := m.offset; i < min(m.offset+m.listHeight(), len(m.rows)); i++ {
		r := m.rows[i]
		var cells []string
		for j, c := range columns {
			if widths[j] > 0 {
				cells = append(cells, cell(c.text(r, m.at), widths[j], c.right))
			}
		}
		line := strings.Join(cells, " ")
		switch {
		case i == selected:
			line = inverse.Styled(line)
		case r.rate > 0:
			line = red.Styled(line)
		}
		lines = append(lines, line)
	}
	return lines
}

// lines are those of the details or the help, before they are cut to the screen.
func (m *model) lines() []string {
	if m.page == help {
		return strings.Split(helpText, "\n")
	}
	return m.detailLines()
}

func (m *model) detailLines() []string {
	r := m.detail
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	add("%s", printable(r.title()))
	if r.key == others {
		add("refusals of containers that are gone,")
		add("and on the host of unknown containers")
	} else {
		add("id      %s", printable(r.id))
		add("cgroup  %s", printable(r.cgroup))
	}
	if m.gone {
		add("gone    this is the last that was known")
	}
	if r.smtp.Known() {
		limit := "unlimited"
		if r.smtp.Tokens != nil {
			limit = fmt.Sprintf("%.1f tokens left, %s, burst %d", *r.smtp.Tokens, r.smtp.Rate, r.smtp.Burst)
		}
		add("mail    %d connections let through; %s", r.smtp.Allowed, limit)
	}
	add("")
	cells := func(first string, rest ...string) {
		line := cell(first, reasonWidth, false)
		for _, s := range rest { // a number takes up 6 columns
			line += cell(s, 7, true)
		}
		lines = append(lines, line)
	}
	n := func(n uint64) string { return compact(float64(n)) }
	cells("REASON", "PACKETS", "CALLS", "HOST", "NOW/S")
	for i, c := range r.counts {
		var now counts
		now[i] = r.recent[i]
		rate := 0.0
		if all := r.recent.total(); all > 0 {
			rate = r.rate * float64(now.total()) / float64(all)
		}
		cells(reasonNames[i], n(c.Packets), n(c.Calls), n(c.Host), rateText(rate))
	}
	add("")
	if len(r.log) == 0 {
		add("no events of the last refusals")
		return lines
	}
	to := min(51, max(22, m.width-61))
	add("%s %s %s %s PROCESS, RULE", cell("AGE", 4, true), cell("REASON", reasonWidth, false), cell("HOOK", 7, false), cell("DESTINATION", to, false))
	for i := len(r.log) - 1; i >= 0; i-- {
		lines = append(lines, cell(ageText(r.log[i].Time, m.at), 4, true)+" "+m.entry(r, &r.log[i], to))
	}
	return lines
}

// entry is a record as the details list it.
func (m *model) entry(r *row, e *events.Record, to int) string {
	if e.Type == events.Suppressed {
		return fmt.Sprintf("and %d more that are not listed", e.Count)
	}
	var rest []string
	if r.key == others && e.Container != nil {
		rest = append(rest, printable((&row{key: 1, id: e.Container.ID, name: e.Container.Name}).title()))
	}
	if e.Process != nil {
		rest = append(rest, fmt.Sprintf("%s[%d]", printable(e.Process.Comm), e.Process.PID))
	}
	if e.Interface != "" {
		rest = append(rest, "by "+printable(e.Interface))
	}
	if e.Rule != "" {
		rest = append(rest, printable(e.Rule))
	}
	where := printable(destination(e))
	if e.Protocol != "" {
		where += "/" + printable(e.Protocol)
	}
	return fmt.Sprintf("%s %s %s %s", cell(printable(e.Reason), reasonWidth, false), cell(printable(e.Hook), 7, false), cell(where, to, false), strings.Join(rest, ", "))
}

const helpText = `up down pgup pgdown home end
         select a row, or scroll
enter    details of the row
esc      back; in the list, no filter
         and no selection
/        filter by name, id, destination
         or process; esc clears
s S      sort by the next or last column
         (also right and left)
r        reverse the order
p space  pause, go on
ctrl+l   draw the screen again
q        quit (also ctrl+c)

NOW/S    refusals per second, between
         the last two readings
TOTAL    refusals since the container
         started: packets dropped, calls
         refused, packets dropped on the
         host
WHY      the reason for most now; if
         there are none now, in all:
  blocked       a blocked destination
  rate_limited  mail over the limit;
                repeated attempts count
  no_bucket     mail without a bucket
  malformed     hides where it goes
  family        a socket that would
                bypass the filter
  host          dropped on the host
TOKENS   mail connections that can be
         opened right now, and at most
AGE      since the last refusal
DESTINATION, PROCESS
         of the last refusal that events
         tell; events are best effort,
         numbers are exact
(others) containers that are gone, and
         packets on the host of unknown
         containers`
