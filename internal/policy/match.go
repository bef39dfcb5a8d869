package policy

import (
	"net/netip"
	"slices"
)

// The lists of a policy whose entries hold for destinations, by their keys in the config
// file.
const (
	ListPresets = "presets"
	ListBlock   = "block"
	ListAllow   = "allow"
	ListDNS     = "allow_dns"
	ListExempt  = "smtp.exempt"
)

// Entry is an entry of a policy that holds for a destination.
type Entry struct {
	List string
	Rule Rule
	// Preset is the preset that has the rule, of those that the policy names, and Clouds
	// are the clouds for which it does; empty in other lists.
	Preset string
	Clouds []string
}

// String returns the entry as users know it: `preset aws`, `block 10.0.0.0/8`.
func (e Entry) String() string {
	switch e.List {
	case ListPresets:
		if len(e.Clouds) == 1 {
			return "preset " + e.Clouds[0]
		}
		return "preset " + e.Preset
	case ListDNS:
		return ListDNS
	}
	return e.List + " " + e.Rule.String()
}

// Match holds the entries of a policy that hold for one destination, in the order of the
// lists.
type Match struct {
	// Allow are those that leave it open, which win over Block and Presets.
	Allow []Entry
	// Block and Presets are those that block it.
	Block, Presets []Entry
	// Exempt are those that exempt mail to it from the limit.
	Exempt []Entry
}

// Blocked reports what [Policy.Blocks] does.
func (m Match) Blocked() bool { return len(m.Allow) == 0 && len(m.Block)+len(m.Presets) > 0 }

// Match returns the entries that hold for a packet, by the rules of [Policy.Blocks].
func (p Policy) Match(dst netip.Addr, proto uint8, port uint16) (m Match) {
	dst = unmap(dst)
	is, maybe := embedded(dst)
	is = append(is, dst)
	matching := func(entries []Entry, addrs []netip.Addr) (found []Entry) {
		for _, e := range entries {
			if slices.ContainsFunc(addrs, func(a netip.Addr) bool { return e.Rule.matches(a, proto, port) }) {
				found = append(found, e)
			}
		}
		return found
	}
	allow, block, presets := p.entriesToAllow(), entriesOf(ListBlock, p.Block), p.presetEntries()
	m.Allow = matching(allow, is)
	// What an address may embed is blocked unless it is allowed itself.
	blocking := is
	for _, a := range maybe {
		if len(matching(allow, []netip.Addr{a})) == 0 {
			blocking = append(blocking, a)
		}
	}
	m.Block, m.Presets = matching(block, blocking), matching(presets, blocking)
	for _, prefix := range p.SMTP.Exempt {
		m.Exempt = append(m.Exempt, matching([]Entry{{List: ListExempt, Rule: Rule{Prefix: prefix}}}, is)...)
	}
	return m
}

// OtherPorts returns the entries that block the address for some port or protocol, and that
// do not hold for a packet of this protocol and port.
func (p Policy) OtherPorts(dst netip.Addr, proto uint8, port uint16) (found []Entry) {
	dst = unmap(dst)
	is, maybe := embedded(dst)
	addrs := append(append(is, dst), maybe...)
	for _, e := range append(entriesOf(ListBlock, p.Block), p.presetEntries()...) {
		if slices.ContainsFunc(addrs, func(a netip.Addr) bool {
			return e.Rule.Prefix.Contains(a) && !e.Rule.matches(a, proto, port)
		}) {
			found = append(found, e)
		}
	}
	return found
}

func entriesOf(list string, rules []Rule) (entries []Entry) {
	for _, r := range rules {
		entries = append(entries, Entry{List: list, Rule: r})
	}
	return entries
}

// entriesToAllow are those of [Policy.Allowed].
func (p Policy) entriesToAllow() []Entry {
	entries := entriesOf(ListAllow, p.Allow)
	if p.AllowDNS {
		p.Allow = nil
		entries = append(entries, entriesOf(ListDNS, p.Allowed())...)
	}
	return entries
}

// presetEntries are those of [Policy.Metadata]; each rule is that of the first preset that
// has it.
func (p Policy) presetEntries() (entries []Entry) {
	for _, name := range p.Presets {
		rules, _ := Preset(name)
		for _, r := range rules {
			if !slices.ContainsFunc(entries, func(e Entry) bool { return e.Rule == r }) {
				entries = append(entries, Entry{List: ListPresets, Rule: r, Preset: name, Clouds: clouds(name, r)})
			}
		}
	}
	return entries
}
