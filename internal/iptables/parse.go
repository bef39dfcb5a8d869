// Package iptables reads the output of iptables-save and turns it into a policy that does
// the same: which destinations containers may not reach, and how many mail connections they
// may open. It names each rule that a policy cannot express, or expresses differently, with
// its line.
package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// Source is one dump of rules.
type Source struct {
	Name string // for the places in notes, such as the name of the file
	Text string
	// Live says that the dump has all rules in force, so that a chain without a jump to
	// it does nothing.
	Live bool
}

// ErrNoRules means that no line of a text is a rule or a chain.
var ErrNoRules = errors.New("no rules: want the output of iptables-save or ip6tables-save")

// table is one table of one dump. Each table is a filter of its own: a packet passes only
// if every table lets it through.
type table struct {
	source string
	v6     bool
	name   string
	chains map[string]*chain
	order  []*chain
	stray  []*rule  // lines that could belong to any chain
	hidden []string // comments about rules that the dump does not show
	named  bool     // the table began with a line of its own, so that COMMIT has to end it
	live   bool     // see [Source]
}

type chain struct {
	name   string
	policy string // "" if it has none
	rules  []*rule
}

// rule is one line.
type rule struct {
	at      position
	text    string // as it stands in the dump, without counters
	match   match
	target  string // "" if it has none
	isGoto  bool
	garbled string // the part that makes no sense; such a rule decides nothing here
}

// position is where a rule stands in a source.
type position struct {
	source string
	line   int
}

func (p position) String() string { return fmt.Sprintf("%s:%d", p.source, p.line) }

// match is the condition of a rule: the rule applies if all parts of the condition hold.
type match struct {
	dst      []netip.Prefix // nil for any
	dstNot   bool
	proto    uint8 // 0 for any
	protoNot bool
	ports    []portRange // destination ports; nil for any
	portsNot bool

	src, in, out negatable // "" for any

	// notNew says that the first packet of a connection that a container opens does not
	// match, and notOld that a later packet does not match.
	notNew, notOld bool
	newOnly        bool // an option names only the first packet

	limit *limit
	sets  string // the list of module recent that every packet is put on
	// others are conditions that a policy cannot express.
	others []condition

	// The fields below are filled in by [site.resolve].
	conditions []condition
	except     []netip.Prefix // destinations behind the device that the rule excludes
	assumed    bool           // except is an assumption: the usual network
	never      string         // why no packet of a container matches; "" if one may
}

type negatable struct {
	value string
	not   bool
}

func (n negatable) String() string {
	if n.not {
		return "! " + n.value
	}
	return n.value
}

// condition is a property of a packet that is not known here. It is the same property in
// every rule that names it in the same words.
type condition struct {
	text string
	not  bool
}

// origin reports whether the condition is about the container that sends the packet, or
// about the device by which the packet leaves.
func (c condition) origin() bool {
	return strings.HasPrefix(c.text, "-i ") || strings.HasPrefix(c.text, "-o ") || strings.HasPrefix(c.text, "-s ")
}

func (c condition) String() string { return negatable{c.text, c.not}.String() }

type portRange struct{ low, high uint16 }

func (r portRange) contains(port uint16) bool { return r.low <= port && port <= r.high }

// limit is a condition that holds for a number of packets in a time.
type limit struct {
	module string
	rate   policy.Rate
	burst  uint32
	over   bool          // holds for packets above the limit instead of those within it
	per    []string      // what has a limit of its own: srcip, dstip, srcport, dstport
	mask   int           // number of bits of srcip that count; -1 for all
	expire time.Duration // how long a quiet source is remembered; 0 if not given
	recent string        // name of the list, for module recent
	window uint64        // seconds, for module recent
	hits   uint64
}

// parse reads the tables of a dump.
func parse(src Source) ([]*table, error) {
	d := dump{source: src}
	n := 0
	for text := range strings.Lines(src.Text) {
		n++
		d.line(n, strings.TrimSpace(text))
	}
	if d.table != nil && d.table.named {
		return nil, fmt.Errorf("%s: cut off: the table %s has no COMMIT", src.Name, d.table.name)
	}
	if !d.seen && len(d.hidden) > 0 {
		d.begin("filter")
	} else if !d.seen {
		return nil, fmt.Errorf("%s: %w", src.Name, ErrNoRules)
	}
	d.tables[0].hidden = d.hidden
	return d.tables, nil
}

// dump is what has been read of a dump.
type dump struct {
	source Source
	tables []*table
	table  *table // the table that lines belong to; nil if none has begun
	v6     bool
	known  bool // a header has set v6
	seen   bool // a rule or a chain has been read
	hidden []string
}

func (d *dump) begin(name string) {
	d.table = &table{source: d.source.Name, live: d.source.Live, v6: d.v6, name: name, chains: map[string]*chain{}}
	d.tables = append(d.tables, d.table)
}

func (d *dump) line(n int, text string) {
	if m := header.FindStringSubmatch(text); m != nil {
		d.v6, d.known, d.table = m[1] == "ip6tables", true, nil
	}
	switch {
	case strings.HasPrefix(text, "#") && strings.Contains(text, "incompatible"):
		d.hidden = append(d.hidden, strings.TrimSpace(text[1:]))
	case text == "" || text[0] == '#':
	case text == "COMMIT":
		d.table = nil
	case text[0] == '*':
		d.begin(text[1:])
		d.table.named = true
	default:
		if d.table == nil { // iptables -S prints no line for the table
			d.begin("filter")
		}
		d.command(position{d.source.Name, n}, text)
	}
}

// command reads a line about a chain of the table. A command of another kind, and a line
// that cannot be read, may have been meant for any chain.
func (d *dump) command(at position, text string) {
	stray := func(why string) {
		d.table.stray = append(d.table.stray, &rule{at: at, text: text, garbled: why})
	}
	words, err := split(text)
	if err != nil {
		stray(err.Error())
		return
	}
	if len(words) > 1 && strings.HasPrefix(words[0], "[") {
		words = words[1:] // counters before the rule
		text = strings.TrimSpace(text[strings.IndexByte(text, ']')+1:])
	}
	name := words[0]
	if len(name) > 1 && name[0] == ':' {
		if c := d.chain(name[1:]); len(words) > 1 && words[1] != "-" {
			c.policy = words[1]
		}
		return
	}
	if len(words) > 1 {
		switch name {
		case "-P", "--policy", "-N", "--new-chain":
			if c := d.chain(words[1]); len(words) > 2 {
				c.policy = words[2]
			}
			return
		case "-A", "--append":
			c := d.chain(words[1])
			d.rule(c, len(c.rules), &rule{at: at, text: text}, words[2:])
			return
		case "-I", "--insert":
			c := d.chain(words[1])
			i, rest := 0, words[2:]
			if len(rest) > 0 {
				if n, err := strconv.Atoi(rest[0]); err == nil {
					i, rest = max(0, min(n-1, len(c.rules))), rest[1:]
				}
			}
			d.rule(c, i, &rule{at: at, text: text}, rest)
			return
		}
	}
	if strings.HasPrefix(name, "-") {
		stray("it is not a rule, a chain or a policy")
		return
	}
	stray("it is not a line that iptables-save prints")
}

// rule inserts a rule at index i of a chain.
func (d *dump) rule(c *chain, i int, r *rule, words []string) {
	r.parse(words)
	c.rules = slices.Insert(c.rules, i, r)
	if !d.known && r.v6() {
		d.table.v6 = true
	}
}

// chain returns a chain of the table. The chain need not be declared before.
func (d *dump) chain(name string) *chain {
	d.seen = true
	c := d.table.chains[name]
	if c == nil {
		c = &chain{name: name}
		d.table.chains[name] = c
		d.table.order = append(d.table.order, c)
	}
	return c
}

var header = regexp.MustCompile(`^# Generated by (ip6?tables)\S*-save\b`)

// reached reports whether the chain name is the chain from, or one that from leads to.
func (t *table) reached(from, name string) bool {
	seen := map[string]bool{}
	var walk func(at string) bool
	walk = func(at string) bool {
		if at == name {
			return true
		}
		c := t.chains[at]
		if c == nil || seen[at] {
			return false
		}
		seen[at] = true
		return slices.ContainsFunc(c.rules, func(r *rule) bool { return walk(r.target) })
	}
	return walk(from)
}

// split splits a line into words as iptables-restore does: quotes keep a word together, and
// in quotes a backslash takes the next byte as it is.
func split(line string) (words []string, err error) {
	for i := 0; i < len(line); {
		if line[i] == ' ' || line[i] == '\t' {
			i++
			continue
		}
		var word strings.Builder
		quote := byte(0)
		for ; i < len(line); i++ {
			c := line[i]
			switch {
			case quote == 0 && (c == ' ' || c == '\t'):
			case quote == 0 && (c == '"' || c == '\''):
				quote = c
				continue
			case quote != 0 && c == '\\' && i+1 < len(line):
				i++
				word.WriteByte(line[i])
				continue
			case quote != 0 && c == quote:
				quote = 0
				continue
			default:
				word.WriteByte(c)
				continue
			}
			break
		}
		if quote != 0 {
			return nil, errors.New("a quote is not closed")
		}
		words = append(words, word.String())
	}
	return words, nil
}

// v6 reports whether the rule can only be a rule of ip6tables.
func (r *rule) v6() bool {
	for _, p := range r.match.dst {
		if p.Addr().Is6() {
			return true
		}
	}
	if p, err := network(r.match.src.value); err == nil && p.Addr().Is6() {
		return true
	}
	return r.match.proto == 58 || strings.Contains(r.text, "--reject-with icmp6-")
}
