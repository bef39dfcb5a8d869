package verdict

import (
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// contest is a program and a model that judge the same packets.
type contest struct {
	*filter
	*model
	*generator
	name  string
	spent bool // the one token that the limit of the policies gives
}

// contests returns a contest for each policy of the tables, for a policy with many rules, and
// for one in audit mode.
func (p *sender) contests(t testing.TB) []*contest {
	t.Helper()
	all := policies(t)
	many := all["nested"]
	many.Block, many.Allow = append(many.Block, randomRules(1, 300)...), append(many.Allow, randomRules(2, 100)...)
	all["many"] = many
	audit := all["nested"]
	audit.Mode = policy.Audit
	all["audit"] = audit
	var list []*contest
	for _, name := range slices.Sorted(maps.Keys(all)) {
		list = append(list, &contest{filter: p.load(t, all[name]), model: newModel(all[name]), generator: newGenerator(all[name]), name: name})
	}
	return list
}

// randomRules returns rules that overlap a lot, the same for the same seed.
func randomRules(seed uint64, n int) (list []policy.Rule) {
	r := rand.New(rand.NewPCG(seed, 0))
	for range n {
		rule := policy.Rule{Proto: []uint8{0, 0, protoTCP, protoUDP, protoSCTP, protoGRE}[r.IntN(6)]}
		if rule.Proto != protoGRE && r.IntN(2) == 0 {
			rule.Port = []uint16{1, 25, 53, 80, 256, 65535}[r.IntN(6)]
		}
		a4 := netip.AddrFrom4([4]byte{10, byte(r.IntN(2)), byte(r.IntN(4) << 6), byte(r.IntN(4))})
		a6 := netip.AddrFrom16([16]byte{0x20, 1, byte(r.IntN(2)), byte(r.IntN(4) << 6), 4: byte(r.IntN(4)), 15: byte(r.IntN(4))})
		if r.IntN(2) == 0 {
			rule.Prefix = netip.PrefixFrom(a4, 7+r.IntN(26)).Masked()
		} else {
			rule.Prefix = netip.PrefixFrom(a6, 15+r.IntN(114)).Masked()
		}
		list = append(list, rule)
	}
	return list
}

// hold lets both judge a packet, and returns how they differ. They cannot differ about a packet
// that cannot be run.
func (c *contest) hold(t testing.TB, etherType uint16, packet []byte, device int) (want verdict, difference string) {
	t.Helper()
	shortest := map[uint16]int{etherIPv4: 20, etherIPv6: 40}
	if len(packet) < max(1, shortest[etherType]) || len(packet) > longest {
		return "", ""
	}
	want = c.judge(etherType, packet, device)
	if want == admitted && c.spent {
		want = rateLimited
	}
	difference = c.compare(t, etherType, packet, device, want)
	switch want {
	case admitted:
		c.spent = !c.policy.SMTP.Rate.Unlimited()
	case rateLimited:
		c.forget(t)
		c.spent = false
	}
	return want, difference
}

// TestModel compares the model with the tables.
func TestModel(t *testing.T) {
	all := policies(t)
	for _, table := range tables() {
		m := newModel(all[table.policy])
		for _, row := range table.rows {
			if got := m.judge(row.packet.etherType(), row.packet.bytes(), 2); got != row.want {
				t.Errorf("%s: %s: %s, want %s", table.name, row.name, got, row.want)
			}
		}
	}
}

// TestPolicyBlocks compares Policy.Blocks with the model, at the edges of all rules.
func TestPolicyBlocks(t *testing.T) {
	choose := chooser(rand.New(rand.NewPCG(0, 0)).IntN)
	all := policies(t)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		p := all[name]
		m, g := newModel(p), newGenerator(p)
		for range 1000 {
			dst, port := pick(choose, append(g.addresses4, g.addresses6...)), int(pick(choose, g.ports))
			proto := pick(choose, []uint8{protoTCP, protoUDP, protoSCTP, protoGRE, protoICMP})
			known := port
			if proto == protoGRE || proto == protoICMP {
				known = -1
			}
			want := listed(m.blocked, dst, proto, known) && !listed(m.allowed, dst, proto, known)
			if got := p.Blocks(dst, proto, uint16(port)); got != want {
				t.Errorf("%s: protocol %d to %s port %d: %t, want %t", name, proto, dst, port, got, want)
			}
		}
	}
}

// TestRandom compares the program with the model on random packets, which are the same in each
// run.
func TestRandom(t *testing.T) {
	packets := 200_000
	if testing.Short() {
		packets /= 10
	}
	at := newSender(t)
	contests := at.contests(t)
	seen := map[verdict]int{}
	at.inside(t, func() {
		for i, c := range contests {
			choose := chooser(rand.New(rand.NewPCG(uint64(i), 0)).IntN)
			for n, wrong := 0, 0; n < packets/len(contests) && wrong < 5; n++ {
				etherType, packet := c.packet(choose)
				device := at.device
				if choose.once(16) {
					device = loopback
				}
				want, difference := c.hold(t, etherType, packet, device)
				seen[want]++
				if difference != "" {
					t.Errorf("policy %s, %04x %x from device %d: %s", c.name, etherType, packet, device, difference)
					wrong++
				}
			}
		}
	})
	for _, v := range []verdict{pass, malformed, blocked, admitted, rateLimited} {
		if seen[v] < packets/200 && !t.Failed() {
			t.Errorf("%d of %d packets were for the verdict %s: too few to tell", seen[v], packets, v)
		}
	}
}

func allRows() (rows []row) {
	for _, table := range tables() {
		rows = append(rows, table.rows...)
	}
	return rows
}

// FuzzVerdict compares the program with the model on data of the fuzzer. In form 0, data is a
// frame from the type of its packet on; in form 1, it is the decisions of the generator.
func FuzzVerdict(f *testing.F) {
	at := newSender(f)
	contests := at.contests(f)
	const one = 8 // of so many rows: each costs time at every start
	for i, row := range allRows() {
		if i%one == 0 {
			frame := binary.BigEndian.AppendUint16(nil, row.packet.etherType())
			f.Add(uint8(i/one), uint8(0), append(frame, row.packet.bytes()...))
		}
	}
	r := rand.New(rand.NewPCG(0, 0))
	for i := range 200 {
		decisions := make([]byte, 40)
		for i := range decisions {
			decisions[i] = byte(r.UintN(256))
		}
		f.Add(uint8(i), uint8(1), decisions)
	}
	f.Fuzz(func(t *testing.T, policy, form uint8, data []byte) {
		c := contests[int(policy)%len(contests)]
		device := at.device
		if form&2 != 0 {
			device = loopback
		}
		var etherType uint16
		var packet []byte
		if form&1 != 0 {
			etherType, packet = c.packet(fromBytes(data))
		} else if len(data) >= 2 {
			etherType, packet = binary.BigEndian.Uint16(data), data[2:]
		}
		at.inside(t, func() {
			if _, difference := c.hold(t, etherType, packet, device); difference != "" {
				t.Errorf("policy %s, %04x %x from device %d: %s", c.name, etherType, packet, device, difference)
			}
		})
	})
}
