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

// Words is a set of 16-bit values, indexed in the byte order of the network.
type Words [1 << 16]bool

// Set adds a value that is given in the host's byte order.
func (w *Words) Set(v uint16) { w[bits.ReverseBytes16(v)] = true }

func (w *Words) setRange(first, last uint16) {
	for v := int(first); v <= int(last); v++ {
		w.Set(uint16(v))
	}
}

// Suspects has the first and the second 16 bits of addresses. An address that
// misses one of them is in no prefix that was added.
type Suspects struct{ First, Second Words }

// Rules is a policy's lists as the programs look them up: the contents of the
// maps rules and ports, and of the bitmaps in front of them.
type Rules struct {
	Prefixes map[bpf.EgressPrefix]bpf.EgressRule
	Ports    map[bpf.EgressPortKey]bpf.EgressRuleFlag

	Suspects4, Suspects6 Suspects
}

// service is a protocol and port, where 0 stands for every one.
type service struct {
	proto uint8
	port  uint16
}

type flags map[service]bpf.EgressRuleFlag

var (
	mapped4 = prefixOf(netip.MustParsePrefix("0.0.0.0/0"))
	nat64   = prefixOf(netip.MustParsePrefix("64:ff9b::/32")) // with what is for local use (RFC 8215)
)

// prefixOf returns p as the key of the rules trie.
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

// CompileRules arranges the lists so that the longest matching prefix alone
// tells what holds for an address: it takes over what holds for those around
// it. IPv6 rules do not reach into the v4-mapped addresses.
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
			// A network may well hold the containers' own addresses; a single
			// address that is blocked is somebody else.
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

	// Outer prefixes come before those inside of them.
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

// ports returns what holds for some protocol or port only.
func (f flags) ports() flags {
	f = maps.Clone(f)
	delete(f, service{})
	return f
}

// suspect adds all addresses in p.
func (r *Rules) suspect(p bpf.EgressPrefix) {
	if covers(mapped4, p) {
		r.Suspects4.add(p.Addr[12:], p.Len-96)
		// On IPv6, in each of the spellings that IPv4 addresses have there.
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

// hostBits returns the bits of the first 16 that a prefix of n bits leaves open.
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
