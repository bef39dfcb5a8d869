package top

import (
	"slices"
	"strings"

	tea "charm.land/bubbletea/v2"

	"github.com/egressbpf/egressbpf/internal/events"
)

// The messages to the model, beside those of the terminal.
type (
	// readMsg is a reading, or why there is none.
	readMsg struct {
		Reading
		err error
	}
	recordsMsg []events.Record
	// endMsg says that there are no more events, and why.
	endMsg struct{ err error }
)

// page is what the screen shows.
type page int

const (
	list page = iota
	details
	help
)

// model is the screen and what it is made of.
type model struct {
	title         string // of this host and program
	width, height int
	tally         *tally
	err           error  // of the last reading
	noEvents      string // why there are none; empty if there are

	// What is shown. It stays as it is while the screen is paused.
	summary
	all    []*row
	rows   []*row // of all, those that the filter finds, sorted
	detail *row
	gone   bool // detail's container
	paused bool

	page     page
	under    page // below help
	sort     int
	reverse  bool
	filter   string
	editing  bool // the filter
	chosen   bool // a row is selected
	selected uint64
	offset   int // of the first row
	scroll   int // of the first line of details or help
}

func newModel(o Options) *model {
	m := &model{title: o.Title, tally: newTally(), filter: o.Filter, sort: slices.Index(Columns(), o.Sort)}
	if m.sort < 0 {
		m.sort = slices.Index(Columns(), DefaultSort)
	}
	if o.Events == nil {
		m.noEvents = "no events: destinations and processes are not known"
		if o.NoEvents != nil {
			m.noEvents += " (" + o.NoEvents.Error() + ")"
		}
	}
	return m
}

// Init implements [tea.Model].
func (m *model) Init() tea.Cmd { return nil }

// Update implements [tea.Model].
func (m *model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case readMsg:
		if m.err = msg.err; msg.err == nil {
			m.tally.read(msg.Reading)
			m.update()
		}
	case recordsMsg:
		m.tally.record(msg)
		m.update()
	case endMsg:
		m.noEvents = "no more events: destinations and processes are those of before"
		if msg.err != nil {
			m.noEvents += " (" + msg.err.Error() + ")"
		}
	case tea.PasteMsg:
		if m.editing {
			m.setFilter(m.filter + msg.Content)
		}
	case tea.KeyPressMsg:
		return m, m.press(msg)
	}
	m.clamp()
	return m, nil
}

// update shows what has been added up, unless the screen is paused.
func (m *model) update() {
	if m.paused {
		return
	}
	m.summary, m.all = m.tally.summary, m.tally.snapshot()
	m.arrange()
	if m.detail != nil {
		i := slices.IndexFunc(m.all, func(r *row) bool { return r.key == m.detail.key })
		if m.gone = i < 0; !m.gone {
			m.detail = m.all[i]
		}
	}
}

// arrange filters and sorts the rows. A row stays selected when rows move; if it is not there any
// more, the one that takes its place is.
func (m *model) arrange() {
	was := m.index()
	m.rows = m.rows[:0]
	filter := strings.ToLower(m.filter)
	for _, r := range m.all {
		if r.matches(filter) {
			m.rows = append(m.rows, r)
		}
	}
	slices.SortFunc(m.rows, order(m.sort, m.reverse))
	if m.chosen && m.index() < 0 {
		m.choose(max(0, was))
	}
}

// index is that of the selected row; -1 if there is none.
func (m *model) index() int {
	if !m.chosen {
		return -1
	}
	return slices.IndexFunc(m.rows, func(r *row) bool { return r.key == m.selected })
}

// choose selects a row, or the nearest that there is.
func (m *model) choose(i int) {
	if i = min(max(i, 0), len(m.rows)-1); i >= 0 {
		m.chosen, m.selected = true, m.rows[i].key
	}
}

// clamp keeps the selected row on the screen; without one, the first.
func (m *model) clamp() {
	n := m.listHeight()
	if i := m.index(); i >= 0 {
		m.offset = min(max(m.offset, i-n+1), i)
		m.offset = max(0, min(m.offset, len(m.rows)-n))
	} else {
		m.offset = 0
	}
	if m.page != list {
		m.scroll = max(0, min(m.scroll, len(m.lines())-m.textHeight()))
	}
}

func (m *model) setFilter(s string) {
	const most = 256
	for len(s) > most {
		r := []rune(s)
		s = string(r[:len(r)-1])
	}
	m.filter = s
	m.arrange()
}

// press reacts to a key.
func (m *model) press(key tea.KeyPressMsg) tea.Cmd {
	defer m.clamp()
	name := key.String()
	if name == "ctrl+c" {
		return tea.Quit
	}
	if m.editing {
		m.edit(name, key.Text)
		return nil
	}
	switch name {
	case "q":
		return tea.Quit
	case "ctrl+l":
		return tea.ClearScreen
	case "p", "space":
		m.paused = !m.paused
		m.update()
	case "?":
		if m.page == help {
			m.page = m.under
		} else {
			m.under, m.page, m.scroll = m.page, help, 0
		}
	default:
		if m.page == list {
			m.pressInList(name)
		} else {
			m.pressInText(name)
		}
	}
	return nil
}

func (m *model) pressInList(name string) {
	n := len(columns)
	switch name {
	case "s", "right", ">":
		m.sort, m.reverse = (m.sort+1)%n, false
		m.arrange()
	case "S", "left", "<":
		m.sort, m.reverse = (m.sort+n-1)%n, false
		m.arrange()
	case "r":
		m.reverse = !m.reverse
		m.arrange()
	case "/":
		m.editing = true
	case "enter":
		if !m.chosen {
			m.choose(0)
		}
		if i := m.index(); i >= 0 {
			m.detail, m.gone, m.page, m.scroll = m.rows[i], false, details, 0
		}
	case "esc":
		m.chosen = false
		m.setFilter("")
	default:
		if by, ok := m.motion(name, m.listHeight(), len(m.rows)); ok {
			if !m.chosen {
				m.choose(max(0, by-1)) // the first key selects the first row
			} else {
				m.choose(m.index() + by)
			}
		}
	}
}

func (m *model) pressInText(name string) {
	switch name {
	case "esc", "enter", "backspace":
		if m.page == help {
			m.page = m.under
		} else {
			m.page, m.detail = list, nil
		}
	default:
		if by, ok := m.motion(name, m.textHeight(), len(m.lines())); ok {
			m.scroll += by
		}
	}
}

// motion returns by how many lines a key moves.
func (m *model) motion(name string, height, length int) (by int, ok bool) {
	switch name {
	case "up", "k":
		return -1, true
	case "down", "j":
		return 1, true
	case "pgup":
		return -height, true
	case "pgdown":
		return height, true
	case "home", "g":
		return -length, true
	case "end", "G":
		return length, true
	}
	return 0, false
}

// edit reacts to a key while the filter is typed.
func (m *model) edit(name, typed string) {
	switch name {
	case "enter":
		m.editing = false
	case "esc":
		m.editing = false
		m.setFilter("")
	case "ctrl+u":
		m.setFilter("")
	case "backspace":
		if r := []rune(m.filter); len(r) > 0 {
			m.setFilter(string(r[:len(r)-1]))
		}
	default:
		m.setFilter(m.filter + typed)
	}
}
