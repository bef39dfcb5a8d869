package tell

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/notify"
	"github.com/egressbpf/egressbpf/internal/policy"
)

const (
	// maxListed is how many containers and reasons a message lists, if their names are not too
	// long: no line begins after maxText bytes. Discord takes 2000, Telegram and ntfy 4096.
	maxListed = 12
	maxText   = 1300
	// maxName is how many characters of a name a message shows.
	maxName = 80
)

// firstOf returns a message about first refusals.
func firstOf(node string, mode policy.Mode, told []news) notify.Message {
	var b strings.Builder
	n := told[0]
	who := "container " + title(n.container)
	if keyOf(n.container) == "" {
		who = "an unknown container"
	}
	if distinct := containers(told); distinct > 1 {
		who = fmt.Sprintf("%d containers", distinct)
	}
	m := notify.Message{Title: fmt.Sprintf("egressbpf on %s: %s %s", host(node), who, verb(mode))}
	fmt.Fprintf(&b, "%s on %s: %s\n\n", strings.ToUpper(who[:1])+who[1:], host(node), effect(mode))
	if len(told) == 1 {
		detail(&b, n)
	} else {
		list(&b, told, 0)
	}
	hint(&b, node, told)
	m.Text = b.String()
	return m
}

// digestOf returns a message about all refusals since a time. others are of containers that
// are not in the list.
func digestOf(node string, mode policy.Mode, since time.Time, told []news, others uint64) notify.Message {
	var b strings.Builder
	from := since.UTC().Format("2006-01-02 15:04 UTC")
	fmt.Fprintf(&b, "Refusals on %s since %s, besides those told before: %s\n\n", host(node), from, effect(mode))
	list(&b, told, others)
	hint(&b, node, told)
	return notify.Message{Title: fmt.Sprintf("egressbpf on %s: refusals since %s", host(node), from), Text: b.String()}
}

func effect(m policy.Mode) string {
	if m == policy.Audit {
		return "would be refused (mode audit: nothing is refused)."
	}
	return "refused (mode enforce)."
}

// verb says the same in short, also in the log.
func verb(m policy.Mode) string {
	if m == policy.Audit {
		return "would be refused"
	}
	return "refused"
}

func containers(told []news) int {
	all := map[string]bool{}
	for _, n := range told {
		all[keyOf(n.container)] = true
	}
	return len(all)
}

// detail says all that is known about one container and reason.
func detail(b *strings.Builder, n news) {
	row := func(name, value string) {
		if value != "" {
			fmt.Fprintf(b, "%s: %s\n", name, value)
		}
	}
	if id := n.container.ID; id != "" {
		row("container", title(n.container)+" (id "+inert(id)+")")
	}
	row("image", shown(n.container.Image))
	if r := n.example; r != nil {
		if r.K8s != nil {
			row("pod", inert(r.K8s.Namespace)+"/"+inert(r.K8s.Pod))
		}
		if p := r.Process; p != nil {
			row("process", fmt.Sprintf("%s (pid %d, uid %d)", inert(p.Comm), p.PID, p.UID))
		}
		row("destination", destination(*r))
		row("reason", n.reason)
		row("rule", plain(r.Rule))
	} else {
		row("reason", n.reason)
	}
	row("refusals so far", strconv.FormatUint(n.count, 10))
}

// list has a line for each container and reason, and one for those for which there is no room.
func list(b *strings.Builder, told []news, others uint64) {
	listed := 0
	for ; listed < min(len(told), maxListed) && b.Len() < maxText; listed++ {
		n := told[listed]
		who := "unknown container"
		if keyOf(n.container) != "" {
			who = title(n.container)
			if n.container.Name != "" {
				who += " (" + inert(short(n.container.ID)) + ")"
			}
		}
		fmt.Fprintf(b, "- %s: %s, %s", who, n.reason, times(n.count))
		if r := n.example; r != nil {
			if to := destination(*r); to != "" {
				fmt.Fprintf(b, ", latest: %s", to)
			}
			if r.Process != nil {
				fmt.Fprintf(b, " by %s", inert(r.Process.Comm))
			}
		}
		b.WriteByte('\n')
	}
	if rest := told[listed:]; len(rest) > 0 {
		for _, n := range rest {
			others += n.count
		}
		fmt.Fprintf(b, "and %d more containers, %s\n", containers(rest), times(others))
	} else if others > 0 {
		fmt.Fprintf(b, "and more containers, %s\n", times(others))
	}
}

func times(n uint64) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

// hint says how to find out more.
func hint(b *strings.Builder, node string, told []news) {
	command := "egressbpf stats"
	if containers(told) == 1 && hexadecimal(keyOf(told[0].container)) {
		command += " --container " + short(keyOf(told[0].container))
	}
	fmt.Fprintf(b, "\nTo look further, on %s: %s\n", host(node), command)
}

func hexadecimal(id string) bool { return id != "" && strings.Trim(id, "0123456789abcdef") == "" }

// title returns what users call a container.
func title(c events.Container) string { return inert(cmp.Or(c.Name, short(c.ID))) }

// short returns an id as Docker shows it.
func short(id string) string {
	if hexadecimal(id) {
		return id[:min(len(id), 12)]
	}
	return id
}

func shown(s string) string {
	if s == "" {
		return ""
	}
	return inert(s)
}

// destination returns where a refused packet or call was to go, or of which family a refused
// socket was.
func destination(r events.Record) string {
	switch {
	case r.Destination != nil:
		to := r.Destination.Address.String()
		if r.Destination.Port != 0 {
			to = fmt.Sprintf("%s:%d", to, r.Destination.Port)
			if r.Destination.Address.Is6() {
				to = fmt.Sprintf("[%s]:%d", r.Destination.Address, r.Destination.Port)
			}
		}
		if r.Protocol != "" {
			to += "/" + r.Protocol
		}
		return to
	case r.Family != "":
		return "socket of family " + r.Family
	}
	return ""
}

// inert returns a text that others have chosen so that no service takes a part of it for
// markup, a mention, a command or a link. It is in quotes if it has spaces.
func inert(s string) string {
	escaped := plain(s)
	var b strings.Builder
	for i := 0; i < len(escaped); i++ {
		rest := escaped[i+1:]
		switch c := escaped[i]; {
		// As in lists of malicious hosts: these are no links.
		case c == '.' && len(rest) > 0 && letter(rest[0]):
			b.WriteString("[.]")
		case c == ':' && strings.HasPrefix(rest, "//"):
			b.WriteString("[:]")
		case c == '@' && !strings.HasPrefix(rest, "sha256:"):
			b.WriteString(`\x40`)
		default:
			b.WriteByte(c)
		}
	}
	if s == "" || strings.Contains(s, " ") {
		return `"` + b.String() + `"`
	}
	return b.String()
}

func letter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }

// plain escapes everything but letters, digits and some other characters of ASCII, and cuts
// what is too long.
func plain(s string) string {
	var b strings.Builder
	for i, r := range s {
		if b.Len() >= maxName {
			b.WriteString("...")
			break
		}
		switch {
		case r < 0x80 && (letter(byte(r)) || strings.ContainsRune("0123456789 -_.,:/@+=%", r)):
			b.WriteRune(r)
		case r == 0xFFFD && s[i] != 0xEF: // not UTF-8
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
	}
	return b.String()
}

// host returns the name of this host, which its owner has chosen.
func host(node string) string { return cmp.Or(plain(node), "this host") }
