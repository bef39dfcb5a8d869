package iptables

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// mailPorts are the ports that mark a rule as one about mail.
var mailPorts = []uint16{25, 465, 587, 2525}

const (
	tcp = 6
	// maxPorts limits the ports of one rule, since each port becomes an entry.
	maxPorts = 256
)

var errTooMany = fmt.Errorf("it has more than %d ports or networks, each of which would be an entry", maxPorts)

// everywhere returns the network that contains all addresses of a family.
func everywhere(v6 bool) netip.Prefix {
	if v6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

// entriesOf returns, as policy entries, what all matches together match, and the holes in
// them. Entries without a destination have a prefix of length 0. Without entries, nothing
// matches. The error is errTooMany.
func entriesOf(when []*match, v6 bool) (entries, holes []policy.Rule, err error) {
	all := everywhere(v6)
	entries = []policy.Rule{{Prefix: all}}
	var not [][]policy.Rule
	for _, m := range when {
		sides, err := m.sides(all)
		if err != nil {
			return nil, nil, err
		}
		for _, s := range sides {
			if s.not {
				not = append(not, s.list)
			} else if entries, err = intersections(nil, entries, s.list); err != nil {
				return nil, nil, err
			}
		}
	}
	for _, list := range not {
		entries = slices.DeleteFunc(entries, func(e policy.Rule) bool {
			return slices.ContainsFunc(list, func(n policy.Rule) bool { return covers(n, e) })
		})
	}
	for _, list := range not {
		if holes, err = intersections(holes, entries, list); err != nil {
			return nil, nil, err
		}
	}
	return entries, holes, nil
}

// side is one condition of a match: that a packet is in one of the entries, or in none of
// them.
type side struct {
	not  bool
	list []policy.Rule
}

func (m *match) sides(all netip.Prefix) (sides []side, err error) {
	if m.proto != 0 {
		sides = append(sides, side{m.protoNot, []policy.Rule{{Prefix: all, Proto: m.proto}}})
	}
	if m.dst != nil {
		sides = append(sides, side{m.dstNot, destinations(m.dst)})
	}
	if m.except != nil {
		sides = append(sides, side{true, destinations(m.except)})
	}
	if m.ports != nil {
		list, err := portEntries(m.ports, all)
		if err != nil {
			return nil, err
		}
		sides = append(sides, side{m.portsNot, list})
	}
	return sides, nil
}

func destinations(prefixes []netip.Prefix) (list []policy.Rule) {
	for _, p := range prefixes {
		list = append(list, policy.Rule{Prefix: p})
	}
	return list
}

func portEntries(ports []portRange, all netip.Prefix) (list []policy.Rule, err error) {
	for _, r := range ports {
		if r.low == 0 && r.high == 65535 {
			return []policy.Rule{{Prefix: all}}, nil
		}
		if int(r.high)-int(r.low) >= maxPorts {
			return nil, errTooMany
		}
		for n := int(r.low); n <= int(r.high); n++ {
			if n != 0 {
				list = append(list, policy.Rule{Prefix: all, Port: uint16(n)})
			}
		}
	}
	return list, nil
}

// intersections adds to a list what an entry of one list and an entry of the other both
// match, without duplicates. The error is errTooMany.
func intersections(to, some, others []policy.Rule) ([]policy.Rule, error) {
	for _, a := range some {
		for _, b := range others {
			if c, ok := intersect(a, b); ok && !slices.Contains(to, c) {
				if to = append(to, c); len(to) > maxPorts {
					return nil, errTooMany
				}
			}
		}
	}
	return to, nil
}

// intersect returns what both entries match.
func intersect(a, b policy.Rule) (policy.Rule, bool) {
	if !a.Prefix.Overlaps(b.Prefix) || differ(a.Proto, b.Proto) || differ(a.Port, b.Port) {
		return policy.Rule{}, false
	}
	if b.Prefix.Bits() > a.Prefix.Bits() {
		a.Prefix = b.Prefix
	}
	a.Proto, a.Port = max(a.Proto, b.Proto), max(a.Port, b.Port)
	return a, a.Port == 0 || a.Proto == 0 || hasPorts(a.Proto)
}

// differ reports whether a and b exclude each other; 0 stands for any value.
func differ[T uint8 | uint16](a, b T) bool { return a != b && a != 0 && b != 0 }

// covers reports whether an entry matches everything that another one matches.
func covers(wide, narrow policy.Rule) bool {
	c, ok := intersect(narrow, wide)
	return ok && c == narrow
}

// mailOf returns the ports of matches that are about mail; nil if they are not. They are
// about mail if one of their ports is a mail port.
func mailOf(when []*match, v6 bool) []uint16 {
	entries, _, err := entriesOf(when, v6)
	if err != nil {
		return nil
	}
	var ports []uint16
	for _, e := range entries {
		if e.Proto != tcp || e.Port == 0 {
			return nil
		}
		ports = append(ports, e.Port)
	}
	if !slices.ContainsFunc(ports, func(p uint16) bool { return slices.Contains(mailPorts, p) }) {
		return nil
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// about reports whether matches are about what egressbpf is for: metadata services or mail.
func about(when []*match, v6 bool) bool {
	if len(mailOf(when, v6)) > 0 {
		return true
	}
	entries, _, _ := entriesOf(when, v6)
	return slices.ContainsFunc(entries, func(e policy.Rule) bool { return e.Prefix.Bits() > 0 && overlapsMetadata(e.Prefix) })
}

func overlapsMetadata(p netip.Prefix) bool {
	rules, _ := policy.Preset(policy.Metadata)
	return slices.ContainsFunc(rules, func(r policy.Rule) bool { return r.Prefix.Overlaps(p) })
}
