package iptables

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// mailPorts are the ports by which a rule is known to be about mail.
var mailPorts = []uint16{25, 465, 587, 2525}

const (
	tcp = 6
	// maxPorts are the ports of one rule: each is an entry of its own.
	maxPorts = 256
)

var errTooMany = fmt.Errorf("it has more than %d ports or networks, each of which would be an entry", maxPorts)

// everywhere returns the network that all addresses of a family are in.
func everywhere(v6 bool) netip.Prefix {
	if v6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

// entriesOf returns what all matches together are about as entries of a policy, those
// without a destination with a prefix of length 0, and the holes in them. No entries:
// nothing matches. The error is errTooMany.
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

// side is one of the things that a match asks of a packet: to be, or not to be, in one of
// the entries.
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

// intersections adds to a list, without duplicates, what an entry of one list and one of the
// other are both about. The error is errTooMany.
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

// intersect returns what both entries are about.
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

// differ reports whether nothing is both a and b, where 0 is anything.
func differ[T uint8 | uint16](a, b T) bool { return a != b && a != 0 && b != 0 }

// covers reports whether an entry is about all that another one is about.
func covers(wide, narrow policy.Rule) bool {
	c, ok := intersect(narrow, wide)
	return ok && c == narrow
}

// mailOf returns the ports of matches that are about mail, which have a port of mail
// among them, or nil.
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

// about reports whether matches are about what egressbpf is for: a metadata service, or
// mail.
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
