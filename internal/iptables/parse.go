// Package iptables reads what iptables-save prints and says the same as a policy:
// which destinations containers may not reach and how many mail connections they
// may open. What cannot be said, or means something else, it names with its line.
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
	Name string // for the places in notes, such as the file's name
	Text string
	// Live: these are all rules in force, so that a chain to which none jumps does nothing.
	Live bool
}

// ErrNoRules is returned for a text in which no line is a rule or a chain.
var ErrNoRules = errors.New("no rules: want the output of iptables-save or ip6tables-save")

// table is one table of one dump. Each is a filter of its own: a packet passes
// only if every one of them lets it through.
type table struct {
	source string
	v6     bool
	name   string
	chains map[string]*chain
	order  []*chain
	stray  []*rule  // lines that could be about any chain
	hidden []string // comments that tell of rules that are not shown
	named  bool     // by a line of its own, so that another one has to end it
	live   bool     // see [Source]
}

type chain struct {
	name   string
	policy string // "": none
	rules  []*rule
}

// rule is one line.
type rule struct {
	place   place
	text    string // as it stands in the dump, without counters
	match   match
	target  string // "": none
	isGoto  bool
	garbled string // what of the line makes no sense; such a rule decides nothing here
}

// place is where a rule stands.
type place struct {
	source string
	line   int
}

func (p place) String() string { return fmt.Sprintf("%s:%d", p.source, p.line) }

// match is when a rule applies: when all of it does.
type match struct {
	dst      []netip.Prefix // nil: any
	dstNot   bool
	proto    uint8 // 0: any
	protoNot bool
	ports    []portRange // destination ports; nil: any
	portsNot bool

	src, in, out negatable // "": any

	// notNew and notOld: the first packet of a connection that a container opens
	// does not match, a later one does not.
	notNew, notOld bool
	newOnly        string // the option that says so

	limit *limit
	sets  string // the list of module recent that every packet is put on
	// others are conditions that a policy has no words for.
	others []condition

	// Filled in by [site.resolve].
	conditions []condition
	except     []netip.Prefix // destinations behind the device that it excludes
	assumed    bool           // except is what is usual
	never      string         // why no packet of a container matches
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

// condition is something about a packet that is not known here, but is the same
// thing in every rule that says it in the same words.
type condition struct {
	text string
	not  bool
}

// origin reports whether it says which containers the packet comes from, or by
// which device it leaves.
func (c condition) origin() bool {
	return strings.HasPrefix(c.text, "-i ") || strings.HasPrefix(c.text, "-o ") || strings.HasPrefix(c.text, "-s ")
}

func (c condition) String() string { return negatable{c.text, c.not}.String() }

type portRange struct{ low, high uint16 }

func (r portRange) contains(port uint16) bool { return r.low <= port && port <= r.high }

// limit is a condition that is true for so many packets per time.
type limit struct {
	module string
	rate   policy.Rate
	burst  uint32
	over   bool          // true for those above the limit, instead of those within
	per    []string      // what has a limit of its own: srcip, dstip, srcport, dstport
	mask   int           // bits of srcip that count, or -1 for all
	expire time.Duration // after which a quiet source is forgotten; 0 if not given
	recent string        // name of the list, for module recent
	window uint64        // seconds, for module recent
	hits   uint64
}

// parse reads the tables of a dump.
func parse(src Source) (tables []*table, err error) {
	var t *table
	v6, known := false, false
	seen := false
	var hidden []string
	newTable := func(name string) {
		t = &table{source: src.Name, live: src.Live, v6: v6, name: name, chains: map[string]*chain{}}
		tables = append(tables, t)
	}
	n := 0
	for text := range strings.Lines(src.Text) {
		n++
		text = strings.TrimSpace(text)
		if m := header.FindStringSubmatch(text); m != nil {
			v6, known, t = m[1] == "ip6tables", true, nil
		}
		switch {
		case strings.HasPrefix(text, "#") && strings.Contains(text, "incompatible"):
			hidden = append(hidden, strings.TrimSpace(text[1:]))
			continue
		case text == "" || text[0] == '#':
			continue
		case text == "COMMIT":
			t = nil
			if !known {
				v6 = false
			}
			continue
		case text[0] == '*':
			newTable(text[1:])
			t.named = true
			continue
		}
		if t == nil { // as iptables -S prints them
			newTable("filter")
		}
		words, err := split(text)
		if err == nil && len(words) > 1 && strings.HasPrefix(words[0], "[") {
			words = words[1:] // counters, before the rule
			text = strings.TrimSpace(text[strings.IndexByte(text, ']')+1:])
		}
		switch {
		case len(words) > 0 && len(words[0]) > 1 && words[0][0] == ':':
			c := t.chain(words[0][1:])
			if len(words) > 1 && words[1] != "-" {
				c.policy = words[1]
			}
			seen = true
		case len(words) > 1 && (words[0] == "-P" || words[0] == "--policy" || words[0] == "-N" || words[0] == "--new-chain"):
			c := t.chain(words[1])
			if len(words) > 2 {
				c.policy = words[2]
			}
			seen = true
		case len(words) > 1 && (words[0] == "-A" || words[0] == "--append" || words[0] == "-I" || words[0] == "--insert"):
			seen = true
			c := t.chain(words[1])
			r := &rule{place: place{src.Name, n}, text: text}
			rest := words[2:]
			at := len(c.rules)
			if words[0] == "-I" || words[0] == "--insert" {
				at = 0
				if len(rest) > 0 {
					if i, err := strconv.Atoi(rest[0]); err == nil {
						at, rest = max(0, min(i-1, len(c.rules))), rest[1:]
					}
				}
			}
			if err != nil {
				r.garbled = err.Error()
			} else {
				r.parse(rest)
			}
			c.rules = slices.Insert(c.rules, at, r)
			if !known && r.v6() {
				t.v6 = true
			}
		case err != nil || len(words) > 0 && strings.HasPrefix(words[0], "-"):
			// A command of another kind, or one that cannot be read: it may have been
			// meant for any chain.
			why := "it is not a rule, a chain or a policy"
			if err != nil {
				why = err.Error()
			}
			t.stray = append(t.stray, &rule{place: place{src.Name, n}, text: text, garbled: why})
		default:
			t.stray = append(t.stray, &rule{place: place{src.Name, n}, text: text, garbled: "it is not a line that iptables-save prints"})
		}
	}
	if t != nil && t.named {
		return nil, fmt.Errorf("%s: cut off: the table %s has no COMMIT", src.Name, t.name)
	}
	if !seen && len(hidden) > 0 {
		newTable("filter")
	} else if !seen {
		return nil, fmt.Errorf("%s: %w", src.Name, ErrNoRules)
	}
	tables[0].hidden = hidden
	return tables, nil
}

var header = regexp.MustCompile(`^# Generated by (ip6?tables)\S*-save\b`)

// reached reports whether a chain is another one, or one that this leads to.
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

func (t *table) chain(name string) *chain {
	c := t.chains[name]
	if c == nil {
		c = &chain{name: name}
		t.chains[name] = c
		t.order = append(t.order, c)
	}
	return c
}

// split cuts a line into words as iptables-restore does: quotes hold a word
// together, a backslash in them takes the next byte as it is.
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

// aliases are the long and old spellings of options.
var aliases = map[string]string{
	"--source": "-s", "--src": "-s", "--destination": "-d", "--dst": "-d",
	"--protocol": "-p", "--proto": "-p", "--in-interface": "-i", "--out-interface": "-o",
	"--jump": "-j", "--goto": "-g", "--match": "-m", "--set-counters": "-c",
	"--destination-port": "--dport", "--destination-ports": "--dports",
	"--source-port": "--sport", "--source-ports": "--sports", "--state": "--ctstate",
	"--hashlimit": "--hashlimit-upto",
}

// parse reads the words after the chain.
func (r *rule) parse(words []string) {
	given := hashlimit{limit: limit{mask: -1}}
	not := false
	for i := 0; i < len(words); {
		w := words[i]
		i++
		if w == "!" {
			not = true
			continue
		}
		name := w
		if a, ok := aliases[w]; ok {
			name = a
		}
		// The values: an exclamation mark between belongs to the option, as it was
		// written before iptables 1.4.3.
		var values []string
		for ; i < len(words) && !isOption(words[i]); i++ {
			if words[i] == "!" {
				if i+1 < len(words) && isOption(words[i+1]) {
					break
				}
				not = !not
				continue
			}
			values = append(values, words[i])
		}
		// Comments and log prefixes may begin with a dash.
		if len(values) == 0 && i < len(words) && (name == "--comment" || name == "--log-prefix" || name == "--nflog-prefix") {
			values, i = []string{words[i]}, i+1
		}
		if err := r.option(name, values, not, &given); err != nil {
			r.match.others = append(r.match.others, condition{text: strings.TrimSpace(w + " " + strings.Join(values, " ")), not: not})
		}
		not = false
	}
	given.finish(&r.match)
}

func isOption(s string) bool { return len(s) > 1 && s[0] == '-' && !('0' <= s[1] && s[1] <= '9') }

var errUnknown = errors.New("not known here")

func (r *rule) option(name string, values []string, not bool, h *hashlimit) error {
	m := &r.match
	one := func() (string, error) {
		if len(values) != 1 {
			return "", errUnknown
		}
		return values[0], nil
	}
	switch name {
	case "-j", "-g":
		v, err := one()
		if err != nil || not || r.target != "" {
			r.garbled = "no target, or more than one"
			return nil
		}
		r.target, r.isGoto = v, name == "-g"
		return nil
	case "-m":
		// A match module does nothing without its options, save those that
		// have none to give.
		v, err := one()
		if err != nil || strings.ContainsAny(v, "[]") {
			return errUnknown
		}
		switch v {
		case "socket", "rpfilter", "unclean", "eui64", "ah", "esp":
			return errUnknown
		case "hashlimit", "limit", "recent":
			if h.module != "" && h.module != v {
				return errUnknown // two limits in one rule
			}
			h.module = v
		}
		return nil
	case "-c", "--comment":
		return nil
	case "--reject-with", "--log-prefix", "--log-level", "--log-tcp-sequence", "--log-tcp-options", "--log-ip-options",
		"--log-uid", "--log-macdecode", "--nflog-group", "--nflog-prefix", "--nflog-size", "--nflog-threshold", "--nflog-range":
		if r.target == "" {
			return errUnknown
		}
		return nil
	case "-s", "-i", "-o":
		v, err := one()
		if err != nil {
			return err
		}
		to := map[string]*negatable{"-s": &m.src, "-i": &m.in, "-o": &m.out}[name]
		if to.value != "" {
			return errUnknown
		}
		if name == "-s" {
			if _, err := network(v); err != nil {
				return err
			}
		}
		*to = negatable{v, not}
		return nil
	case "-d":
		v, err := one()
		if err != nil || m.dst != nil {
			return errUnknown
		}
		p, err := network(v)
		if err != nil {
			return err
		}
		if p.Bits() == 0 && !not {
			return nil
		}
		m.dst, m.dstNot = []netip.Prefix{p}, not
		return nil
	case "--dst-range":
		v, err := one()
		if err != nil || m.dst != nil {
			return errUnknown
		}
		m.dst, err = addressRange(v)
		m.dstNot = not
		return err
	case "-p":
		v, err := one()
		if err != nil || m.proto != 0 {
			return errUnknown
		}
		if v == "all" || v == "0" {
			if not {
				return errUnknown
			}
			return nil
		}
		m.proto, err = protocol(v)
		m.protoNot = not
		return err
	case "--dport", "--dports":
		v, err := one()
		if err != nil || m.ports != nil {
			return errUnknown
		}
		ports, err := portList(v)
		if err != nil {
			return err
		}
		m.ports, m.portsNot = ports, not
		return nil
	case "--syn":
		if len(values) > 0 {
			return errUnknown
		}
		m.flags([]string{"FIN", "SYN", "RST", "ACK"}, []string{"SYN"}, not)
		return nil
	case "--tcp-flags":
		if len(values) != 2 {
			return errUnknown
		}
		m.flags(flagList(values[0]), flagList(values[1]), not)
		return nil
	case "--ctstate":
		v, err := one()
		if err != nil {
			return err
		}
		states := strings.Split(v, ",")
		isNew := slices.Contains(states, "NEW") != not
		isOld := slices.Contains(states, "ESTABLISHED") != not
		m.notNew, m.notOld = m.notNew || !isNew, m.notOld || !isOld
		if isNew && !isOld {
			m.newOnly = "ctstate " + v
		}
		return nil
	case "--ctdir":
		v, err := one()
		if err != nil {
			return err
		}
		if (v == "REPLY") != not {
			m.notNew = true
		}
		return nil
	}
	if h.module == "" {
		return errUnknown
	}
	return h.option(name, values, not)
}

// flags takes a condition on TCP flags: those of mask that are set are those of set.
func (m *match) flags(mask, set []string, not bool) {
	only := func(flag string) bool {
		return slices.Contains(mask, flag) == slices.Contains(set, flag) &&
			!slices.ContainsFunc(set, func(f string) bool { return f != flag })
	}
	isNew := only("SYN") != not
	isOld := (!slices.Contains(set, "SYN") && slices.Contains(mask, "ACK") == slices.Contains(set, "ACK")) != not
	m.notNew, m.notOld = m.notNew || !isNew, m.notOld || !isOld
	if isNew && !isOld {
		m.newOnly = "syn"
	}
}

func flagList(s string) []string {
	if s == "NONE" {
		return nil
	}
	if s == "ALL" {
		return []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG"}
	}
	return strings.Split(s, ",")
}

// network reads ADDR, ADDR/BITS or ADDR/MASK. A mask with holes is refused.
func network(s string) (netip.Prefix, error) {
	host, bits, ok := strings.Cut(s, "/")
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Zone() != "" || addr.Is4In6() { // a policy takes the last for IPv4, ip6tables does not
		return netip.Prefix{}, errUnknown
	}
	n := addr.BitLen()
	if mask, err := netip.ParseAddr(bits); ok && err == nil {
		if mask.BitLen() != addr.BitLen() {
			return netip.Prefix{}, errUnknown
		}
		n = 0
		for _, b := range mask.AsSlice() {
			for i := 7; i >= 0 && b&(1<<i) != 0; i-- {
				n++
			}
			if b != 0xff {
				break
			}
		}
		if p := netip.PrefixFrom(allOnes(addr), n).Masked(); p.Addr() != mask {
			return netip.Prefix{}, errUnknown
		}
	} else if ok {
		if n, err = strconv.Atoi(bits); err != nil || n < 0 || n > addr.BitLen() {
			return netip.Prefix{}, errUnknown
		}
	}
	return netip.PrefixFrom(addr, n).Masked(), nil
}

func allOnes(like netip.Addr) netip.Addr {
	b := like.AsSlice()
	for i := range b {
		b[i] = 0xff
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// addressRange returns the networks that make up FROM-TO.
func addressRange(s string) ([]netip.Prefix, error) {
	from, to, ok := strings.Cut(s, "-")
	if !ok {
		to = from
	}
	a, err := netip.ParseAddr(from)
	b, err2 := netip.ParseAddr(to)
	if err != nil || err2 != nil || a.BitLen() != b.BitLen() || b.Less(a) || a.Zone()+b.Zone() != "" || a.Is4In6() || b.Is4In6() {
		return nil, errUnknown
	}
	var list []netip.Prefix
	for {
		bits := a.BitLen()
		for bits > 0 {
			p := netip.PrefixFrom(a, bits-1)
			if p.Masked().Addr() != a || b.Less(last(p)) {
				break
			}
			bits--
		}
		p := netip.PrefixFrom(a, bits)
		list = append(list, p)
		end := last(p)
		if end == b {
			return list, nil
		}
		a = end.Next()
	}
}

// last returns the highest address of a network.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

var protocols = map[string]uint8{
	"tcp": 6, "udp": 17, "udplite": 136, "sctp": 132, "dccp": 33, "icmp": 1, "ipv6-icmp": 58, "icmpv6": 58,
	"igmp": 2, "ipencap": 4, "ipip": 4, "ipv6": 41, "gre": 47, "esp": 50, "ah": 51, "ospf": 89, "vrrp": 112, "l2tp": 115,
}

func protocol(s string) (uint8, error) {
	if n, ok := protocols[strings.ToLower(s)]; ok {
		return n, nil
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n == 0 {
		return 0, errUnknown
	}
	return uint8(n), nil
}

var services = map[string]uint16{
	"smtp": 25, "mail": 25, "smtps": 465, "ssmtp": 465, "urd": 465, "submissions": 465, "submission": 587,
	"domain": 53, "http": 80, "https": 443, "ntp": 123,
}

// portList reads ports and ranges of ports between commas.
func portList(s string) ([]portRange, error) {
	var list []portRange
	for item := range strings.SplitSeq(s, ",") {
		low, high, isRange := strings.Cut(item, ":")
		if !isRange {
			high = low
		} else if low == "" {
			low = "0"
		}
		if high == "" {
			high = "65535"
		}
		a, err := port(low)
		b, err2 := port(high)
		if err != nil || err2 != nil || b < a {
			return nil, errUnknown
		}
		list = append(list, portRange{a, b})
	}
	return list, nil
}

func port(s string) (uint16, error) {
	if n, ok := services[s]; ok {
		return n, nil
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err
}

// v6 reports whether the rule can only be one of ip6tables.
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
