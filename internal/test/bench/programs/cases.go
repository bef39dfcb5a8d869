package programs

import (
	"net/netip"

	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/bench/deny"
)

// The names of what is measured.
const (
	EmptyProgram  = "empty program"
	Egressbpf     = "egressbpf"
	IPAddressDeny = "IPAddressDeny"
)

// benchmark is a program that judges a packet.
type benchmark struct {
	operation  string
	filter     string
	containers int
	prefixes   int
	packet     packet
	// verdict is what the program must return: 1 pass, 0 drop. Those are NF_ACCEPT and
	// NF_DROP, too.
	verdict uint32
	load    func(p *place, b *benchmark) (*loaded, error)

	policy policy.Policy
	// sender is the cgroup that sends, if the root is policed. If it is empty, the sender is
	// a container that is a child of the policed cgroup.
	sender sender
	// bare is whether the program gets the packet without its Ethernet header.
	bare bool

	fastest      []float64 // of each load, in nanoseconds
	instructions uint32
	missing      string
}

type sender string

const (
	service   sender = "service"   // which is no container
	container sender = "container" // which was recognised, two levels below the root
)

// containers is how many other containers there are where there are many.
const containers = 10_000

// Pass is the operation of which most others are variants.
const Pass = "pass tcp4 64 B"

// benchmarks returns all cases, and for each an empty program that judges the same packet.
func benchmarks() (all []*benchmark) {
	def, many := policy.Default(), manyBlocked()
	for _, b := range []benchmark{
		{operation: Pass, packet: tcp4, verdict: 1},
		{operation: "pass tcp4 1500 B", packet: tcp4Large, verdict: 1},
		{operation: "pass udp4 64 B", packet: udp4, verdict: 1},
		{operation: "pass tcp6 64 B", packet: tcp6, verdict: 1},
		{operation: "pass tcp6 1500 B", packet: tcp6Large, verdict: 1},
		{operation: "pass udp6 64 B", packet: udp6, verdict: 1},
		{operation: "tcp4, 20,000 blocked prefixes", packet: tcp4, verdict: 1, policy: many, prefixes: 10_000},
		{operation: "tcp4, 20,000 blocked prefixes, one beside", packet: tcp4, verdict: 1, policy: besideBlocked(), prefixes: 10_000},
		{operation: "tcp6, 20,000 blocked prefixes", packet: tcp6, verdict: 1, policy: many, prefixes: 10_000},
		{operation: "tcp6, 20,000 blocked prefixes, one beside", packet: tcp6, verdict: 1, policy: besideBlocked(), prefixes: 10_000},
		{operation: "tcp4, 10,000 containers", packet: tcp4, verdict: 1, containers: containers},
		{operation: "tcp4 of a service, root policed", packet: tcp4, verdict: 1, sender: service},
		{operation: "tcp6 of a service, root policed", packet: tcp6, verdict: 1, sender: service},
		{operation: "tcp4 of a container, root policed", packet: tcp4, verdict: 1, sender: container},
		{operation: "syn4 to another port", packet: syn4, verdict: 1},
		{operation: "syn6 to another port", packet: syn6, verdict: 1},
		{operation: "refused mail syn4", packet: mail4},
		{operation: "refused mail syn6", packet: mail6},
		{operation: "refused mail syn4, 10,000 containers", packet: mail4, containers: containers},
		{operation: "refused mail syn4, root policed", packet: mail4, sender: container},
		{operation: "mail syn4 of a service", packet: mail4, verdict: 1, sender: service},
		{operation: "blocked tcp4", packet: metadata4},
		{operation: "blocked tcp6", packet: metadata6},
	} {
		b.filter, b.load, b.containers = Egressbpf, loadEgress, max(b.containers, 1)
		if b.policy.Mode == "" {
			b.policy = def
		}
		all = append(all, &b, b.emptied(loadEmptyEgress))
		if b.operation != Pass {
			continue
		}
		for _, n := range []int{1, 10, 1000, 10_000} {
			all = append(all, &benchmark{
				operation: Pass, filter: IPAddressDeny, containers: 1, prefixes: n, packet: tcp4, verdict: 1, load: loadDeny,
			})
		}
	}
	return append(all, hostBenchmarks()...)
}

// emptied returns the case with an empty program.
func (b benchmark) emptied(load func(*place, *benchmark) (*loaded, error)) *benchmark {
	b.filter, b.load, b.verdict, b.prefixes = EmptyProgram, load, 1, 0
	return &b
}

// manyBlocked returns a policy that blocks 10,000 more prefixes of each family.
func manyBlocked() policy.Policy {
	p := policy.Default()
	for _, addr := range append(deny.Spread4(10_000), deny.Spread6(10_000)...) {
		p.Block = append(p.Block, policy.Rule{Prefix: netip.PrefixFrom(addr, addr.BitLen())})
	}
	return p
}

// besideBlocked returns the same, with prefixes whose beginnings and ends are those of the
// addresses to which packets go, so that a first look does not tell that these are not blocked.
func besideBlocked() policy.Policy {
	p := manyBlocked()
	for _, text := range []string{"198.51.7.7/32", "11.5.100.1/32", "2620:7::7/128", "2a00:0:7::7/128"} {
		p.Block = append(p.Block, policy.Rule{Prefix: netip.MustParsePrefix(text)})
	}
	return p
}
