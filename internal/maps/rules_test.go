package maps_test

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// lists are what a policy says of destinations.
type lists struct {
	metadata, blocked, allowed []policy.Rule
	exempt                     []netip.Prefix
}

func (l lists) compile() *maps.Rules {
	return maps.CompileRules(l.metadata, l.blocked, l.allowed, l.exempt)
}

// flags is the plain answer: those of every rule that holds for the address. A
// port of 0 means that the packet shows none.
func (l lists) flags(dst netip.Addr, proto uint8, port uint16) (flags bpf.EgressRuleFlag) {
	dst = dst.Unmap()
	holds := func(r policy.Rule) bool {
		return r.Prefix.Contains(dst) && (r.Proto == 0 || r.Proto == proto) && (r.Port == 0 || r.Port == port)
	}
	for flag, rules := range map[bpf.EgressRuleFlag][]policy.Rule{
		bpf.EgressRuleFlagRULE_BLOCK: l.blocked, bpf.EgressRuleFlagRULE_METADATA: l.metadata,
	} {
		for _, r := range rules {
			if holds(r) {
				flags |= flag
				if r.Prefix.IsSingleIP() {
					flags |= bpf.EgressRuleFlagRULE_BLOCK_SOURCE
				}
			}
		}
	}
	for _, r := range l.allowed {
		if holds(r) {
			flags |= bpf.EgressRuleFlagRULE_ALLOW
		}
	}
	for _, p := range l.exempt {
		if holds(policy.Rule{Prefix: p}) {
			flags |= bpf.EgressRuleFlagRULE_EXEMPT
		}
	}
	return flags
}

// trie looks up the rule of the longest prefix around an address.
type trie func(bpf.EgressPrefix) (bpf.EgressRule, bool)

// ports looks up the flags of a protocol and port; none if there is no entry.
type ports func(bpf.EgressPortKey) bpf.EgressRuleFlag

// lookup asks the compiled rules as the programs do.
func lookup(rules trie, ports ports, dst netip.Addr, proto uint8, port uint16) bpf.EgressRuleFlag {
	rule, ok := rules(bpf.EgressPrefix{Len: 128, Addr: dst.As16()})
	if !ok || rule.Group == 0 {
		return rule.Flags
	}
	key := bpf.EgressPortKey{Group: rule.Group, Proto: proto}
	flags := rule.Flags | ports(key)
	if port != 0 {
		key.Port = bits.ReverseBytes16(port)
		flags |= ports(key)
		key.Proto = 0
		flags |= ports(key)
	}
	return flags
}

func inMemory(r *maps.Rules) (trie, ports) {
	return func(key bpf.EgressPrefix) (best bpf.EgressRule, found bool) {
			addr, longest := netip.AddrFrom16(key.Addr), -1
			for p, rule := range r.Prefixes {
				// Unlike Prefix.Contains, which keeps IPv4 and IPv6 apart.
				same := netip.PrefixFrom(addr, int(p.Len)).Masked().Addr() == netip.AddrFrom16(p.Addr)
				if same && int(p.Len) > longest {
					best, longest, found = rule, int(p.Len), true
				}
			}
			return best, found
		}, func(key bpf.EgressPortKey) bpf.EgressRuleFlag {
			return r.Ports[key]
		}
}

// random makes addresses and rules that often meet: from a few addresses, and
// from those next to them.
type random struct {
	*rand.Rand
	pool []netip.Addr
}

func newRandom(seed uint64) *random {
	r := &random{Rand: rand.New(rand.NewPCG(seed, 0))}
	for _, s := range []string{
		"0.0.0.0", "10.1.2.3", "127.0.0.1", "169.254.169.254", "255.255.255.255",
		"::", "::1", "::fffe:0:0", "::1:0:0:0", "64:ff9b::a9fe:a9fe", "64:ff9b::1:0:0", "64:ff9b:1::a9fe:a9fe",
		"2001:db8::1", "fd00:ec2::254", "fe80::a9fe:a9fe", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
	} {
		r.pool = append(r.pool, netip.MustParseAddr(s))
	}
	for range 4 {
		r.pool = append(r.pool, netip.AddrFrom4([4]byte{byte(r.Uint32()), byte(r.Uint32()), 1, 2}))
	}
	return r
}

func (r *random) addr() netip.Addr {
	addr := r.pool[r.IntN(len(r.pool))]
	for range r.IntN(3) {
		raw := addr.AsSlice()
		raw[r.IntN(len(raw))] ^= 1 << r.IntN(8)
		addr, _ = netip.AddrFromSlice(raw)
	}
	if addr.Is4In6() { // a bit away from ::fffe:0:0
		return addr.Unmap()
	}
	return addr
}

// prefix returns one that rules can have.
func (r *random) prefix(t *testing.T) netip.Prefix {
	addr := r.addr()
	length := r.IntN(addr.BitLen() + 1)
	if r.IntN(3) == 0 {
		length = addr.BitLen()
	}
	p, err := policy.ParsePrefix(netip.PrefixFrom(addr, length).Masked().String())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

var (
	testProtos = []uint8{0, 1, 6, 17, 58, 132}
	testPorts  = []uint16{0, 25, 53, 80, 0x1234, 0x3412, 65535}
)

func (r *random) proto() uint8 { return testProtos[r.IntN(len(testProtos))] }
func (r *random) port() uint16 { return testPorts[r.IntN(len(testPorts))] }

func (r *random) rules(t *testing.T) (rules []policy.Rule) {
	for want := r.IntN(8); len(rules) < want; {
		rule := policy.Rule{Prefix: r.prefix(t), Proto: r.proto(), Port: r.port()}
		if r.IntN(2) == 0 {
			rule.Proto, rule.Port = 0, 0
		}
		if rule.Validate() == nil {
			rules = append(rules, rule)
		}
	}
	return rules
}

func (r *random) lists(t *testing.T) lists {
	l := lists{metadata: r.rules(t), blocked: r.rules(t), allowed: r.rules(t)}
	for range r.IntN(4) {
		l.exempt = append(l.exempt, r.prefix(t))
	}
	return l
}

// near returns an address in or beside one of the rules.
func (r *random) near(l lists) netip.Addr {
	rules := slices.Concat(l.metadata, l.blocked, l.allowed)
	if len(rules) == 0 || r.IntN(4) == 0 {
		return r.addr()
	}
	p := rules[r.IntN(len(rules))].Prefix
	if r.IntN(4) == 0 && p.Addr().Prev().IsValid() {
		return p.Addr().Prev()
	}
	return r.within(p)
}

func (r *random) within(p netip.Prefix) netip.Addr {
	raw := p.Addr().AsSlice()
	all, none := r.IntN(4) == 0, r.IntN(4) == 0
	for i := p.Bits(); i < len(raw)*8; i++ {
		if all || !none && r.IntN(2) == 0 {
			raw[i/8] |= 0x80 >> (i % 8)
		}
	}
	addr, _ := netip.AddrFromSlice(raw)
	return addr
}

func TestCompileRulesAgreesWithLists(t *testing.T) {
	const sets, packets = 2000, 50
	for seed := range uint64(sets) {
		r := newRandom(seed)
		l := r.lists(t)
		rules, ports := inMemory(l.compile())
		for range packets {
			dst, proto, port := r.near(l), r.proto(), r.port()
			got, want := lookup(rules, ports, dst, proto, port), l.flags(dst, proto, port)
			if got != want {
				t.Fatalf("seed %d: %v proto %d port %d: got flags %#x, want %#x, of %+v", seed, dst, proto, port, got, want, l)
			}
		}
	}
}

// The kernel's trie finds what the model of it finds.
func TestLoadRules(t *testing.T) {
	r := newRandom(1)
	var l lists
	for len(l.blocked) < 500 {
		next := r.lists(t)
		l = lists{append(l.metadata, next.metadata...), append(l.blocked, next.blocked...), append(l.allowed, next.allowed...), append(l.exempt, next.exempt...)}
	}
	compiled := l.compile()
	spec, err := bpf.LoadEgress()
	if err != nil {
		t.Fatal(err)
	}
	open := func(name string, entries int) *ebpf.Map {
		spec.Maps[name].MaxEntries = uint32(entries)
		m, err := ebpf.NewMap(spec.Maps[name])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	rulesMap := open(bpf.EgressMapRules, len(compiled.Prefixes))
	portsMap := open(bpf.EgressMapPorts, len(compiled.Ports))
	if err := compiled.Load(rulesMap, portsMap); err != nil {
		t.Fatal(err)
	}
	rules := func(key bpf.EgressPrefix) (rule bpf.EgressRule, ok bool) {
		return rule, rulesMap.Lookup(key, &rule) == nil
	}
	ports := func(key bpf.EgressPortKey) (flag bpf.EgressRuleFlag) {
		_ = portsMap.Lookup(key, &flag)
		return flag
	}
	for range 5000 {
		dst, proto, port := r.near(l), r.proto(), r.port()
		if got, want := lookup(rules, ports, dst, proto, port), l.flags(dst, proto, port); got != want {
			t.Fatalf("%v proto %d port %d: got flags %#x, want %#x", dst, proto, port, got, want)
		}
	}
	if err := compiled.Load(rulesMap, portsMap); err != nil {
		t.Errorf("load the same again: %v", err)
	}
	if err := (lists{blocked: parse(t, "192.0.2.1", "192.0.2.2:7/udp")}).compile().Load(rulesMap, portsMap); err == nil {
		t.Error("maps that are too small were no error")
	}
}

func parse(t *testing.T, texts ...string) (rules []policy.Rule) {
	for _, text := range texts {
		rule, err := policy.ParseRule(text)
		if err != nil {
			t.Fatal(err)
		}
		rules = append(rules, rule)
	}
	return rules
}

func TestCompileRules(t *testing.T) {
	const (
		allow  = bpf.EgressRuleFlagRULE_ALLOW
		block  = bpf.EgressRuleFlagRULE_BLOCK
		source = bpf.EgressRuleFlagRULE_BLOCK_SOURCE
		exempt = bpf.EgressRuleFlagRULE_EXEMPT
		preset = bpf.EgressRuleFlagRULE_METADATA
	)
	l := lists{
		metadata: parse(t, "10.1.2.3", "10.2.0.0/16", "169.254.169.254"),
		blocked:  parse(t, "::/0", "10.0.0.0/8", "10.1.2.3", "10.1.0.0/16:53/udp", "[fd00::/8]:80", "192.0.2.0/24/icmp"),
		allowed:  parse(t, "10.1.0.0/16", "10.1.2.3:443/tcp", "fd00::1"),
		exempt:   []netip.Prefix{netip.MustParsePrefix("0.0.0.0/1"), netip.MustParsePrefix("fd00::/16")},
	}
	rules, ports := inMemory(l.compile())
	for _, tt := range []struct {
		dst   string
		proto uint8
		port  uint16
		want  bpf.EgressRuleFlag
	}{
		{"9.255.255.255", 6, 80, exempt},
		{"10.0.0.0", 6, 80, exempt | block},
		{"10.255.255.255", 0, 0, exempt | block},
		{"11.0.0.0", 6, 80, exempt},
		{"10.1.0.0", 6, 80, exempt | block | allow},
		{"10.1.2.3", 6, 80, exempt | block | preset | source | allow},
		{"10.2.3.4", 6, 80, exempt | block | preset},
		{"169.254.169.254", 6, 80, preset | source},
		{"127.255.255.255", 6, 25, exempt},
		{"128.0.0.0", 6, 25, 0}, // not in ::/0
		{"255.255.255.255", 6, 25, 0},
		{"192.0.2.1", 1, 0, block},
		{"192.0.2.1", 17, 0, 0},
		{"::", 6, 80, block},
		{"::fffe:ffff:ffff", 6, 80, block},
		{"::1:0:0:0", 6, 80, block},
		{"64:ff9b::1", 6, 80, block},
		{"fd00::1", 6, 80, block | allow | exempt},
		{"fd01::1", 6, 80, block},
		{"fe00::", 6, 80, block},
		{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 0, 0, block},
	} {
		dst := netip.MustParseAddr(tt.dst)
		if got := lookup(rules, ports, dst, tt.proto, tt.port); got != tt.want {
			t.Errorf("%s proto %d port %d: got flags %#x, want %#x", tt.dst, tt.proto, tt.port, got, tt.want)
		}
		if model := l.flags(dst, tt.proto, tt.port); model != tt.want {
			t.Errorf("%s proto %d port %d: the model says %#x, want %#x", tt.dst, tt.proto, tt.port, model, tt.want)
		}
	}
}

// Prefixes that say the same of ports share their entries.
func TestCompileRulesSharesPorts(t *testing.T) {
	l := lists{blocked: parse(t, "10.0.0.0/8:80/tcp")}
	for i := range 100 {
		l.blocked = append(l.blocked, parse(t, fmt.Sprintf("10.0.%d.0/24", i))...)
	}
	if got := len(l.compile().Ports); got != 1 {
		t.Errorf("got %d entries for ports, want 1", got)
	}
}

func set(w *maps.Words, address []byte) bool {
	return w[binary.NativeEndian.Uint16(address)]
}

// suspected says whether both tables that are read in turn suspect an address, the smaller one
// as the programs read it.
func suspected(s *maps.Suspects, address []byte) bool {
	sketch := maps.SketchOf(s, s, new(maps.Words))
	return sketch.Addr4[address[0]^address[1]] && sketch.Addr6 == sketch.Addr4 &&
		set(&s.First, address) && set(&s.Second, address[2:])
}

// spellings6 are the addresses on IPv6 that mean an IPv4 address.
func spellings6(addr netip.Addr) []netip.Addr {
	nat64 := netip.MustParseAddr("64:ff9b::").As16()
	raw := addr.As4()
	copy(nat64[12:], raw[:])
	local := nat64
	local[5] = 1 // 64:ff9b:1::/48
	compatible, sixToFour := [16]byte{}, [16]byte{0x20, 0x02}
	copy(compatible[12:], raw[:])
	copy(sixToFour[2:], raw[:])
	found := []netip.Addr{netip.AddrFrom16(addr.As16())}
	for _, spelling := range [][16]byte{nat64, local, compatible, sixToFour} {
		found = append(found, netip.AddrFrom16(spelling))
	}
	return found
}

// Whatever is blocked, on any port, is suspected.
func TestSuspectsMissNothing(t *testing.T) {
	const sets, packets = 2000, 20
	for seed := range uint64(sets) {
		r := newRandom(seed)
		l := r.lists(t)
		compiled := l.compile()
		for range packets {
			if len(l.blocked) == 0 {
				break
			}
			rule := l.blocked[r.IntN(len(l.blocked))]
			addr := r.within(rule.Prefix)
			if addr.Is4In6() {
				continue // not judged by IPv6 rules
			}
			if !addr.Is4() {
				if !suspected(&compiled.Suspects6, addr.AsSlice()) {
					t.Fatalf("seed %d: %v is blocked by %v and not suspected", seed, addr, rule)
				}
				continue
			}
			if !suspected(&compiled.Suspects4, addr.AsSlice()) {
				t.Fatalf("seed %d: %v is blocked by %v and not suspected", seed, addr, rule)
			}
			// But for 6to4, whose first bits tell, all spellings look alike.
			others := spellings6(r.addr4())
			for _, addr6 := range append(spellings6(addr), others[:len(others)-1]...) {
				if !suspected(&compiled.Suspects6, addr6.AsSlice()) {
					t.Fatalf("seed %d: %v is not suspected, though %v is blocked", seed, addr6, rule)
				}
			}
		}
	}
}

func (r *random) addr4() netip.Addr {
	var raw [4]byte
	binary.BigEndian.PutUint32(raw[:], r.Uint32())
	return netip.AddrFrom4(raw)
}

// What is far from every block rule is not: each bitmap has the bits that it
// needs and no others.
func TestSuspectsAreFew(t *testing.T) {
	type counts struct{ first4, second4, first6, second6 int }
	for _, tt := range []struct {
		name    string
		blocked []string
		want    counts
	}{
		{"nothing", nil, counts{}},
		{"an address", []string{"169.254.169.254"}, counts{1, 1, 3, 3}}, // on IPv6 ::/32, 64:ff9b::/32 and 2002:a9fe::/32
		{"its port", []string{"169.254.169.254:80/tcp"}, counts{1, 1, 3, 3}},
		{"/8", []string{"10.0.0.0/8"}, counts{256, 65536, 3, 258}},
		{"/15", []string{"10.2.0.0/15"}, counts{2, 65536, 3, 4}},
		{"/16", []string{"10.1.0.0/16"}, counts{1, 65536, 3, 3}},
		{"/17", []string{"10.1.128.0/17"}, counts{1, 32768, 3, 3}},
		{"/31", []string{"10.1.2.2/31"}, counts{1, 2, 3, 3}},
		{"IPv4", []string{"0.0.0.0/0"}, counts{65536, 65536, 3, 65536}},
		{"IPv6", []string{"::/0"}, counts{0, 0, 65536, 65536}},
		{"an IPv6 address", []string{"fd00:ec2::254"}, counts{0, 0, 1, 1}},
		{"IPv6 /20", []string{"2001:d000::/20"}, counts{0, 0, 1, 4096}},
		{"IPv6 /48", []string{"2001:db8:1::/48"}, counts{0, 0, 1, 1}},
	} {
		r := lists{blocked: parse(t, tt.blocked...), allowed: parse(t, "192.0.2.1", "2001:db8::1")}.compile()
		got := counts{ones(&r.Suspects4.First), ones(&r.Suspects4.Second), ones(&r.Suspects6.First), ones(&r.Suspects6.Second)}
		if got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func ones(b *maps.Words) (n int) {
	for _, in := range b {
		if in {
			n++
		}
	}
	return n
}

func TestWords(t *testing.T) {
	for _, v := range []uint16{0, 1, 25, 63, 64, 255, 256, 587, 65535} {
		var b maps.Words
		b.Set(v)
		if wire := binary.BigEndian.AppendUint16(nil, v); !set(&b, wire) || ones(&b) != 1 {
			t.Errorf("%d: it is not the one that is set", v)
		}
	}
}
