package suggest

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// width is how long a line of a comment gets, without its indentation.
const width = 90

// comment adds text to the comment of a key.
func (s *suggestion) comment(key, text string) {
	s.Comments[key] = append(s.Comments[key], wrap(text)...)
}

// wrap breaks text into lines. The lines that follow the first are indented.
func wrap(text string) (lines []string) {
	indent := text[:len(text)-len(strings.TrimLeft(text, " "))]
	line := ""
	for word := range strings.FieldsSeq(text) {
		switch {
		case line == "":
			line = indent + word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width:
			lines = append(lines, line)
			line = indent + "  " + word
		default:
			line += " " + word
		}
	}
	return append(lines, line)
}

func entry(list string, i int) string { return fmt.Sprintf("%s[%d]", list, i) }

// title is what comments call a container. Its names may hold anything.
func (c *observed) title() string {
	const short, longest = 12, 64
	if name := c.ruleName(); name != "" {
		return shortened(name, longest)
	}
	text := shortened(visible(c.ID), longest)
	if cgroup.ContainerID(c.ID) != "" {
		text = c.ID[:short]
	}
	if c.Name == "" {
		return text
	}
	return shortened(visible(c.Name), longest) + " (" + text + ")"
}

// visible quotes a name that is none of Docker's.
func visible(name string) string {
	if docker.MatchString(name) {
		return name
	}
	return strconv.QuoteToASCII(name)
}

func shortened(text string, most int) string {
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}

// leave notes what stays refused.
func (s *suggestion) leave(format string, args ...any) {
	s.left = append(s.left, fmt.Sprintf(format, args...))
	s.Left++
}

// others tells of what belongs to no container.
func (s *suggestion) others() {
	r := s.of.records
	onHost := "on the host: no rule for a container opens that"
	if s.of.Config.Mode == policy.Audit {
		onHost = "on the host. Most or all of them are counted for a container too: in mode audit a packet that the container was not refused is judged there again"
	}
	for _, l := range []struct {
		n    uint64
		text string
	}{
		{r.onHost, onHost},
		{r.strangers, "of containers that are not known"},
		{r.unusable, "in records that lack what they must have"},
		{r.lost, "lost before they were recorded"},
	} {
		if l.n > 0 {
			s.leave("%s %s", plural(l.n, "refusal"), l.text)
		}
	}
	for _, c := range s.of.containers {
		var n uint64
		for _, p := range c.suppressed {
			if !s.of.isCounted(c, p) {
				n += min(p.n, most)
			}
		}
		if n > 0 {
			s.leave("%s: %s that the records only count", c.title(), plural(n, "refusal"))
		}
	}
}

// head says what the file is, and what it rests on.
func (s *suggestion) head() {
	add := func(format string, args ...any) { s.comment("", fmt.Sprintf(format, args...)) }
	add("Suggested by egressbpf from what was refused, or would have been in mode audit. An attack looks the same as a need: remove each entry that you cannot explain.")
	from := s.of.from()
	switch {
	case s.of.Since.IsZero() && from.IsZero():
		add("Nothing is in force here, and there are no records.")
	case s.of.Since.IsZero():
		add("Nothing is in force here: this adds to the default policy, by %s from %s to %s.", plural(s.of.records.n, "record"), moment(from), moment(s.of.records.last))
	default:
		add("Policy in force since %s, for %s.", moment(s.of.Since), duration(s.of.Now.Sub(s.of.Since)))
		if began := s.of.began(); s.of.Since.Sub(began) > time.Minute {
			add("What was counted before, since %s, is in here too.", moment(began))
		}
		if !s.of.records.first.IsZero() {
			add("%s from %s to %s.", plural(s.of.records.n, "record"), moment(s.of.records.first), moment(s.of.records.last))
		}
	}
	const week = 7 * 24 * time.Hour
	until := s.of.Now
	if s.of.Since.IsZero() {
		until = s.of.records.last
	}
	if observed := until.Sub(from); observed < week {
		s.Short = true
		add("That is less than a week: what containers do rarely is not in here.")
	}
	if !s.of.Since.IsZero() && s.of.Config.Mode != policy.Audit {
		add("The mode in force is not audit: destinations are known from records alone, and mail that was refused counts again each time that it was repeated.")
	}
	if s.of.records.enforced > 0 {
		add("%s of refusals that were enforced: what was repeated counts each time.", plural(s.of.records.enforced, "record"))
	}
	s.Nothing = s.Added == 0 && s.Left == 0
	if s.Nothing {
		add("Nothing was refused.")
	}
	if len(s.left) > 0 {
		const most = 40
		add("Left refused:")
		for i, text := range s.left {
			if i == most {
				add("  and %d more", len(s.left)-most)
				break
			}
			add("  %s", text)
		}
	}
}

func plural(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.FormatUint(n, 10) + " " + noun + "s"
}

func times(n uint64) string {
	if n == 1 {
		return "once"
	}
	return strconv.FormatUint(n, 10) + " times"
}

func moment(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

// duration shows the two largest units.
func duration(d time.Duration) string {
	day := 24 * time.Hour
	switch d = max(d, 0).Truncate(time.Minute); {
	case d >= day:
		return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dm", d/time.Minute)
}

func asIs(s string) string { return s }

// familyName returns the name of a socket family, or its number if it has none here.
func familyName(n uint16) string {
	if f := policy.FamiliesOf([]uint{uint(n)}); f != "" {
		return string(f)
	}
	return strconv.Itoa(int(n))
}

func joined(ports []uint16) string {
	var texts []string
	for _, p := range ports {
		texts = append(texts, strconv.Itoa(int(p)))
	}
	return strings.Join(texts, ", ")
}
