package maps

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Words is a set of 16-bit values, indexed in network byte order.
type Words [1 << 16]bool

// Set adds a value in host byte order.
func (w *Words) Set(v uint16) { w[bits.ReverseBytes16(v)] = true }

func (w *Words) setRange(first, last uint16) {
	for v := int(first); v <= int(last); v++ {
		w.Set(uint16(v))
	}
}

// Fold is a set of the values of Words, by the exclusive or of their bytes.
type Fold [1 << 8]bool

func (w *Words) fold() (f Fold) {
	for v, set := range w {
		if set {
			f[uint8(v)^uint8(v>>8)] = true
		}
	}
	return f
}

// Sketch is a small table that is read before Suspects and the mail ports.
type Sketch struct{ Addr4, Addr6, Mail Fold }

// SketchOf returns the sketch of these sets.
func SketchOf(suspects4, suspects6 *Suspects, mail *Words) Sketch {
	return Sketch{suspects4.First.fold(), suspects6.First.fold(), mail.fold()}
}

// Suspects are the first and the second 16 bits of addresses. An address is in no prefix
// that was added if one of them is not set for it.
type Suspects struct{ First, Second Words }

// Rules are a policy's lists in the form in which the programs look them up: the contents
// of the maps rules and ports, and of the bitmaps that are checked before them.
type Rules struct {
	Prefixes map[bpf.EgressPrefix]bpf.EgressRule
	Ports    map[bpf.EgressPortKey]bpf.EgressRuleFlag

	Suspects4, Suspects6 Suspects
}

// service is a protocol and a port; 0 stands for all.
type service struct {
	proto uint8
	port  uint16
}

type flags map[service]bpf.EgressRuleFlag

var (
	mapped4 = prefixOf(netip.MustParsePrefix("0.0.0.0/0"))
	nat64   = prefixOf(netip.MustParsePrefix("64:ff9b::/32")) // with the prefix for local use (RFC 8215)
)

// prefixOf returns p as a key of the trie rules.
func prefixOf(p netip.Prefix) bpf.EgressPrefix {
	key := bpf.EgressPrefix{Len: uint32(p.Bits()), Addr: p.Addr().As16()}
	if p.Addr().Is4() {
		key.Len += 96
	}
	return key
}

func covers(outer, inner bpf.EgressPrefix) bool {
	if outer.Len > inner.Len {
		return false
	}
	whole, rest := outer.Len/8, outer.Len%8
	if !bytes.Equal(outer.Addr[:whole], inner.Addr[:whole]) {
		return false
	}
	return rest == 0 || (outer.Addr[whole]^inner.Addr[whole])>>(8-rest) == 0
}

// CompileRules arranges the lists so that the longest matching prefix is enough: it
// includes what holds for the prefixes around it. IPv6 rules do not apply to the v4-mapped
// addresses.
func CompileRules(metadata, blocked, allowed []policy.Rule, exempt []netip.Prefix) *Rules {
	own := map[bpf.EgressPrefix]flags{}
	add := func(p netip.Prefix, s service, flag bpf.EgressRuleFlag) {
		key := prefixOf(p)
		if own[key] == nil {
			own[key] = flags{}
		}
		own[key][s] |= flag
	}
	r := &Rules{
		Prefixes: map[bpf.EgressPrefix]bpf.EgressRule{},
		Ports:    map[bpf.EgressPortKey]bpf.EgressRuleFlag{},
	}
	block := func(rules []policy.Rule, flag bpf.EgressRuleFlag) {
		for _, rule := range rules {
			flag := flag
			// A network may hold the containers' own addresses; a single
			// blocked address is somebody else's.
			if rule.Prefix.IsSingleIP() {
				flag |= bpf.EgressRuleFlagRULE_BLOCK_SOURCE
			}
			add(rule.Prefix, service{rule.Proto, rule.Port}, flag)
			r.suspect(prefixOf(rule.Prefix))
		}
	}
	block(metadata, bpf.EgressRuleFlagRULE_METADATA)
	block(blocked, bpf.EgressRuleFlagRULE_BLOCK)
	for _, rule := range allowed {
		add(rule.Prefix, service{rule.Proto, rule.Port}, bpf.EgressRuleFlagRULE_ALLOW)
	}
	for _, p := range exempt {
		add(p, service{}, bpf.EgressRuleFlagRULE_EXEMPT)
	}
	if own[mapped4] == nil {
		own[mapped4] = flags{}
	}

	// Outer prefixes come before the prefixes in them.
	order := slices.SortedFunc(maps.Keys(own), func(a, b bpf.EgressPrefix) int {
		return cmp.Or(bytes.Compare(a.Addr[:], b.Addr[:]), cmp.Compare(a.Len, b.Len))
	})
	type scope struct {
		prefix bpf.EgressPrefix
		flags  flags
		group  uint32
	}
	var around []scope
	groups := uint32(0)
	for _, key := range order {
		for len(around) > 0 && !covers(around[len(around)-1].prefix, key) {
			around = around[:len(around)-1]
		}
		var outer scope
		if len(around) > 0 && key != mapped4 {
			outer = around[len(around)-1]
		}
		in := scope{key, own[key], outer.group}
		for s, f := range outer.flags {
			in.flags[s] |= f
		}
		if ports := in.flags.ports(); !maps.Equal(ports, outer.flags.ports()) {
			groups++
			in.group = groups
			for s, f := range ports {
				r.Ports[bpf.EgressPortKey{Group: groups, Proto: s.proto, Port: bits.ReverseBytes16(s.port)}] = f
			}
		}
		around = append(around, in)
		r.Prefixes[key] = bpf.EgressRule{Group: in.group, Flags: in.flags[service{}]}
	}
	return r
}

// ports returns the flags that hold for a single protocol or port.
func (f flags) ports() flags {
	f = maps.Clone(f)
	delete(f, service{})
	return f
}

// suspect adds all addresses in p.
func (r *Rules) suspect(p bpf.EgressPrefix) {
	if covers(mapped4, p) {
		r.Suspects4.add(p.Addr[12:], p.Len-96)
		// On IPv6, every spelling of the IPv4 addresses.
		r.Suspects6.add(mapped4.Addr[:], mapped4.Len)
		r.Suspects6.add(nat64.Addr[:], nat64.Len)
		sixToFour := slices.Concat([]byte{0x20, 0x02}, p.Addr[12:])
		r.Suspects6.add(sixToFour, p.Len-96+16)
		return
	}
	r.Suspects6.add(p.Addr[:], p.Len)
}

// add adds all addresses with the same first bits as addr.
func (s *Suspects) add(addr []byte, bits uint32) {
	first, second := binary.BigEndian.Uint16(addr), binary.BigEndian.Uint16(addr[2:])
	s.First.setRange(first, first|hostBits(bits))
	s.Second.setRange(second, second|hostBits(max(bits, 16)-16))
}

// hostBits returns those of the first 16 bits that a prefix of n bits leaves open.
func hostBits(n uint32) uint16 { return uint16(uint32(0xffff) >> min(n, 16)) }

// Load fills the maps rules and ports, which must be empty and large enough.
func (r *Rules) Load(rules, ports *ebpf.Map) error {
	for key, rule := range r.Prefixes {
		if err := rules.Put(key, rule); err != nil {
			return fmt.Errorf("add a prefix to map rules: %w", err)
		}
	}
	for key, flag := range r.Ports {
		if err := ports.Put(key, flag); err != nil {
			return fmt.Errorf("add a port to map ports: %w", err)
		}
	}
	return nil
}
