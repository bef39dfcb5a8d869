package iptables

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
)

// aliases are the long and the old spellings of options.
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
		// The values of the option. An exclamation mark among them belongs to the
		// option: so it was written before iptables 1.4.3.
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
	switch name {
	case "-j", "-g":
		if len(values) != 1 || not || r.target != "" {
			r.garbled = "no target, or more than one"
			return nil
		}
		r.target, r.isGoto = values[0], name == "-g"
		return nil
	case "-m":
		if len(values) != 1 {
			return errUnknown
		}
		return h.load(values[0])
	case "-c", "--comment":
		return nil
	case "--reject-with", "--log-prefix", "--log-level", "--log-tcp-sequence", "--log-tcp-options", "--log-ip-options",
		"--log-uid", "--log-macdecode", "--nflog-group", "--nflog-prefix", "--nflog-size", "--nflog-threshold", "--nflog-range":
		if r.target == "" {
			return errUnknown
		}
		return nil
	case "--syn":
		if len(values) > 0 {
			return errUnknown
		}
		r.match.flags([]string{"FIN", "SYN", "RST", "ACK"}, []string{"SYN"}, not)
		return nil
	case "--tcp-flags":
		if len(values) != 2 {
			return errUnknown
		}
		r.match.flags(flagList(values[0]), flagList(values[1]), not)
		return nil
	case "-s", "-i", "-o", "-d", "--dst-range", "-p", "--dport", "--dports", "--ctstate", "--ctdir":
		if len(values) != 1 {
			return errUnknown
		}
		return r.match.option(name, values[0], not)
	}
	if h.module == "" {
		return errUnknown
	}
	return h.option(name, values, not)
}

// load loads a match module. Most modules do nothing without options; those that need none
// are not known here.
func (h *hashlimit) load(module string) error {
	switch module {
	case "socket", "rpfilter", "unclean", "eui64", "ah", "esp":
		return errUnknown
	case "hashlimit", "limit", "recent":
		if h.module != "" && h.module != module {
			return errUnknown // two limits in one rule
		}
		h.module = module
	}
	if strings.ContainsAny(module, "[]") {
		return errUnknown
	}
	return nil
}

// option reads an option that has one value.
func (m *match) option(name, v string, not bool) (err error) {
	switch name {
	case "-s", "-i", "-o":
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
	case "-d":
		if m.dst != nil {
			return errUnknown
		}
		p, err := network(v)
		if err != nil {
			return err
		}
		if p.Bits() > 0 || not {
			m.dst, m.dstNot = []netip.Prefix{p}, not
		}
	case "--dst-range":
		if m.dst != nil {
			return errUnknown
		}
		m.dst, err = addressRange(v)
		m.dstNot = not
	case "-p":
		switch {
		case m.proto != 0:
			return errUnknown
		case v != "all" && v != "0":
			m.proto, err = protocol(v)
			m.protoNot = not
		case not:
			return errUnknown
		}
	case "--dport", "--dports":
		if m.ports != nil {
			return errUnknown
		}
		m.ports, err = portList(v)
		m.portsNot = not
	case "--ctstate":
		states := strings.Split(v, ",")
		m.connection(slices.Contains(states, "NEW") != not, slices.Contains(states, "ESTABLISHED") != not)
	case "--ctdir":
		m.notNew = m.notNew || (v == "REPLY") != not
	}
	return err
}

// flags reads a condition on TCP flags: of the flags in mask, exactly those in set are set.
func (m *match) flags(mask, set []string, not bool) {
	only := func(flag string) bool {
		return slices.Contains(mask, flag) == slices.Contains(set, flag) &&
			!slices.ContainsFunc(set, func(f string) bool { return f != flag })
	}
	isNew := only("SYN") != not
	isOld := (!slices.Contains(set, "SYN") && slices.Contains(mask, "ACK") == slices.Contains(set, "ACK")) != not
	m.connection(isNew, isOld)
}

// connection reads a condition on a packet's place in its connection: whether it holds for
// the first packet, and whether it holds for packets of an existing connection.
func (m *match) connection(isNew, isOld bool) {
	m.notNew, m.notOld = m.notNew || !isNew, m.notOld || !isOld
	m.newOnly = m.newOnly || isNew && !isOld
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
