package iptables

import (
	"maps"
	"net/netip"
	"slices"
)

// spectrum is a set of packets that represents all packets: between two neighbouring values
// of each list, the rules treat all packets alike.
type spectrum struct {
	addrs  []netip.Addr
	protos []uint8
	ports  []uint16
	other  netip.Addr // an address that no rule names
}

// world says which conditions hold.
type world map[string]bool

// newFamily makes a family of the passes, with the packets and the worlds that the passes
// tell apart.
func newFamily(v6 bool, passes []*pass) *family {
	f := &family{v6: v6, passes: passes, spectrum: survey(v6, passes)}
	f.worlds, f.partial = imagine(passes)
	return f
}

func survey(v6 bool, passes []*pass) spectrum {
	prefixes := map[netip.Prefix]bool{}
	icmp := protocols["icmp"]
	if v6 {
		icmp = protocols["icmpv6"]
	}
	protos := map[uint8]bool{tcp: true, protocols["udp"]: true, icmp: true, 253: true}
	ports := map[uint16]bool{1: true, 25: true, 65535: true}
	for s := range stepsOf(passes) {
		m := s.match()
		for _, d := range slices.Concat(m.dst, m.except) {
			prefixes[d] = true
		}
		if m.proto != 0 {
			protos[m.proto] = true
		}
		for _, r := range m.ports {
			for _, n := range []int{int(r.low) - 1, int(r.low), int(r.high), int(r.high) + 1} {
				if 0 < n && n < 65536 {
					ports[uint16(n)] = true
				}
			}
		}
	}
	s := spectrum{
		addrs:  edges(v6, slices.Collect(maps.Keys(prefixes))),
		protos: slices.Sorted(maps.Keys(protos)),
		ports:  slices.Sorted(maps.Keys(ports)),
	}
	all := everywhere(v6)
	s.other = s.addrs[len(s.addrs)/2]
	for _, a := range s.addrs {
		inside := a == all.Addr() || a == last(all)
		for d := range prefixes {
			inside = inside || d.Bits() > 0 && d.Contains(a)
		}
		if !inside {
			s.other = a
			break
		}
	}
	return s
}

// edges returns the first and the last address of each network, their neighbours, and a few
// addresses that rules are unlikely to name.
func edges(v6 bool, prefixes []netip.Prefix) (addrs []netip.Addr) {
	for _, d := range append(prefixes, everywhere(v6)) {
		addrs = append(addrs, d.Addr().Prev(), d.Addr(), last(d), last(d).Next())
	}
	for _, a := range []string{"198.51.100.77", "8.8.8.8", "100.99.98.97", "2001:db8:77::1", "2600::1"} {
		addrs = append(addrs, netip.MustParseAddr(a))
	}
	addrs = slices.DeleteFunc(addrs, func(a netip.Addr) bool { return !a.IsValid() || a.Is6() != v6 })
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// few is the number of conditions up to which all combinations are tried.
const few = 6

// imagine returns the worlds. For a few conditions these are all combinations. Otherwise
// they are the worlds in which all conditions hold, none holds, one differs from the rest,
// or the conditions of one rule that drops hold.
func imagine(passes []*pass) (worlds []world, partial bool) {
	conditions := map[string]bool{}
	for s := range stepsOf(passes) {
		for _, c := range s.match().conditions {
			conditions[c.text] = true
		}
	}
	names := slices.Sorted(maps.Keys(conditions))
	add := func(holds func(i int) bool) world {
		w := world{}
		for i, n := range names {
			w[n] = holds(i)
		}
		worlds = append(worlds, w)
		return w
	}
	if len(names) <= few {
		for bits := range 1 << len(names) {
			add(func(i int) bool { return bits&(1<<i) != 0 })
		}
		return worlds, false
	}
	for one := -1; one < len(names); one++ {
		for _, rest := range []bool{true, false} {
			add(func(i int) bool { return (i == one) != rest })
		}
	}
	seen := map[string]bool{}
	for s := range stepsOf(passes) {
		key := s.conditions()
		if s.act != drop || key == "" || seen[key] {
			continue
		}
		seen[key] = true
		for _, rest := range []bool{true, false} {
			w := add(func(int) bool { return rest })
			for _, m := range s.when {
				for _, c := range m.conditions {
					w[c.text] = !c.not
				}
			}
		}
	}
	return worlds, true
}
