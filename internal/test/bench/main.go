// Command bench measures with BPF_PROG_TEST_RUN what the egress program costs a packet,
// and says whether each figure is within its bound. It needs root. It exits with 1 if a
// figure is not within its bound.
//
// A figure is the difference to an empty program in the same run, in nanoseconds of CPU
// time. The speed of a program varies by tens of nanoseconds with the address at which the
// kernel loads it. So every case is loaded many times, in random order, and the median
// counts.
//
// The cost of another defence is the ratio of the same operation with and without it. With
// the argument beside, only these ratios are measured.
package main

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"text/tabwriter"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

const (
	loads      = 15     // of each case
	timings    = 15     // of each load; the fastest counts
	repeat     = 50_000 // runs of the program in each timing: a few milliseconds
	containers = 10_000
)

// benchmark is a packet and what it may cost.
type benchmark struct {
	name   string
	packet []byte
	// verdict is what the program must return: 1 pass, 0 drop.
	verdict uint32
	policy  policy.Policy
	// crowded adds the state of many other containers.
	crowded bool
	// sender is the cgroup that sends, if the root is policed. If it is empty, the sender is
	// a container that is a child of the policed cgroup.
	sender sender
	// bound is in nanoseconds above the empty program, or above the benchmark that base
	// names.
	bound float64
	base  string

	fastest []float64 // of each load, in nanoseconds
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("bench: ")
	runtime.LockOSThread()
	ok, err := measure(slices.Equal(os.Args[1:], []string{"beside"}))
	if err != nil {
		log.Fatal(err)
	}
	if !ok {
		os.Exit(1)
	}
}

// measure prints the figures, and says whether all are within their bounds.
func measure(besideAlone bool) (ok bool, err error) {
	if err := maps.RemoveMemlock(); err != nil {
		return false, err
	}
	root, err := cgroup.FindRoot()
	if err != nil {
		return false, err
	}
	policed, err := os.MkdirTemp(string(root), "egressbpf-bench-")
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, os.Remove(policed)) }()
	ok = true
	if !besideAlone {
		all, err := measureAll(root, policed)
		if err != nil {
			return false, err
		}
		ok = print(all)
		fmt.Println()
	}
	others, err := measureBeside(root, policed)
	if err != nil {
		return false, err
	}
	printBeside(os.Stdout, others)
	return ok, nil
}

type sender string

const (
	service   sender = "service"   // which is no container
	container sender = "container" // which was recognised, two levels below the root
)

const emptyProgram = "empty program"

func benchmarks() []*benchmark {
	def := policy.Default()
	many := policy.Default()
	for i := range 10_000 {
		addr := netip.AddrFrom4([4]byte{byte(11 + i/5000), byte(i), byte(i >> 8), 1})
		many.Block = append(many.Block, policy.Rule{Prefix: netip.PrefixFrom(addr, 32)})
		six := netip.MustParseAddr("2001:db8::").As16()
		binary.BigEndian.PutUint32(six[8:], uint32(i))
		many.Block = append(many.Block, policy.Rule{Prefix: netip.PrefixFrom(netip.AddrFrom16(six), 128)})
	}
	const (
		syn  = 0x02
		ack  = 0x10
		mail = 25
		web  = 443
	)
	v4, v6 := packet{dst: "198.51.100.1", port: web}, packet{dst: "2620::1", port: web}
	with := func(p packet, change func(*packet)) packet { change(&p); return p }
	tcp4 := with(v4, func(p *packet) { p.flags, p.size = ack, 64 })
	tcp6 := with(v6, func(p *packet) { p.flags, p.size = ack, 64 })
	return []*benchmark{
		{name: emptyProgram, packet: tcp4.bytes(), verdict: 1},
		{name: "pass tcp4 64 B", packet: tcp4.bytes(), verdict: 1, policy: def, bound: 4},
		{name: "pass tcp4 1500 B", packet: with(tcp4, func(p *packet) { p.size = 1500 }).bytes(), verdict: 1, policy: def, bound: 4},
		{name: "pass udp4 64 B", packet: with(v4, func(p *packet) { p.udp, p.size = true, 64 }).bytes(), verdict: 1, policy: def, bound: 4},
		{name: "pass tcp6 64 B", packet: with(tcp6, func(p *packet) { p.size = 80 }).bytes(), verdict: 1, policy: def, bound: 4},
		{name: "pass tcp6 1500 B", packet: with(tcp6, func(p *packet) { p.size = 1500 }).bytes(), verdict: 1, policy: def, bound: 4},
		{name: "pass udp6 64 B", packet: with(v6, func(p *packet) { p.udp, p.size = true, 64 }).bytes(), verdict: 1, policy: def, bound: 4},
		{name: "tcp4, 20,000 blocked prefixes", packet: tcp4.bytes(), verdict: 1, policy: many, bound: 1, base: "pass tcp4 64 B"},
		{name: "tcp6, 20,000 blocked prefixes", packet: with(tcp6, func(p *packet) { p.size = 80 }).bytes(), verdict: 1, policy: many, bound: 1, base: "pass tcp6 64 B"},
		{name: "tcp4, 10,000 containers", packet: tcp4.bytes(), verdict: 1, policy: def, crowded: true, bound: 1, base: "pass tcp4 64 B"},
		{name: "tcp4 of a service, root policed", packet: tcp4.bytes(), verdict: 1, policy: def, sender: service, bound: 2, base: "pass tcp4 64 B"},
		{name: "tcp6 of a service, root policed", packet: with(tcp6, func(p *packet) { p.size = 80 }).bytes(), verdict: 1, policy: def, sender: service, bound: 2, base: "pass tcp6 64 B"},
		{name: "tcp4 of a container, root policed", packet: tcp4.bytes(), verdict: 1, policy: def, sender: container, bound: 2, base: "pass tcp4 64 B"},
		{name: "syn4 to another port", packet: with(v4, func(p *packet) { p.flags, p.size = syn, 60 }).bytes(), verdict: 1, policy: def, bound: 5},
		{name: "syn6 to another port", packet: with(v6, func(p *packet) { p.flags, p.size = syn, 80 }).bytes(), verdict: 1, policy: def, bound: 5},
		{name: "refused mail syn4", packet: with(v4, func(p *packet) { p.flags, p.size, p.port = syn, 60, mail }).bytes(), policy: def, bound: 60},
		{name: "refused mail syn6", packet: with(v6, func(p *packet) { p.flags, p.size, p.port = syn, 80, mail }).bytes(), policy: def, bound: 60},
		{name: "refused mail syn4, 10,000 containers", packet: with(v4, func(p *packet) { p.flags, p.size, p.port = syn, 60, mail }).bytes(), policy: def, crowded: true, bound: 60},
		{name: "refused mail syn4, root policed", packet: with(v4, func(p *packet) { p.flags, p.size, p.port = syn, 60, mail }).bytes(), policy: def, sender: container},
		{name: "mail syn4 of a service", packet: with(v4, func(p *packet) { p.flags, p.size, p.port = syn, 60, mail }).bytes(), verdict: 1, policy: def, sender: service},
		{name: "blocked tcp4", packet: with(packet{dst: "169.254.169.254", port: 80}, func(p *packet) { p.flags, p.size = syn, 60 }).bytes(), policy: def},
		{name: "blocked tcp6", packet: with(packet{dst: "fd00:ec2::254", port: 80}, func(p *packet) { p.flags, p.size = syn, 80 }).bytes(), policy: def},
	}
}

// packet is a TCP packet, or a UDP datagram, from a container to dst.
type packet struct {
	dst   string
	port  uint16
	flags byte
	udp   bool
	size  int // from the IP header on
}

// bytes returns it behind an Ethernet header, as BPF_PROG_TEST_RUN wants it.
func (p packet) bytes() []byte {
	const ethernet = 14
	proto := byte(unix.IPPROTO_TCP)
	if p.udp {
		proto = unix.IPPROTO_UDP
	}
	data := make([]byte, ethernet+p.size)
	ip := data[ethernet:]
	dst := netip.MustParseAddr(p.dst)
	transport := ip[20:]
	if dst.Is4() {
		binary.BigEndian.PutUint16(data[12:], unix.ETH_P_IP)
		ip[0] = 0x45
		binary.BigEndian.PutUint16(ip[2:], uint16(p.size))
		ip[8], ip[9] = 64, proto
		copy(ip[12:], netip.MustParseAddr("172.17.0.2").AsSlice())
		copy(ip[16:], dst.AsSlice())
	} else {
		binary.BigEndian.PutUint16(data[12:], unix.ETH_P_IPV6)
		ip[0] = 0x60
		binary.BigEndian.PutUint16(ip[4:], uint16(p.size-40))
		ip[6], ip[7] = proto, 64
		copy(ip[8:], netip.MustParseAddr("fd4d:1::2").AsSlice())
		copy(ip[24:], dst.AsSlice())
		transport = ip[40:]
	}
	binary.BigEndian.PutUint16(transport[0:], 40000)
	binary.BigEndian.PutUint16(transport[2:], p.port)
	if !p.udp {
		transport[12], transport[13] = 5<<4, p.flags
	}
	return data
}

// measureAll runs the benchmarks in a cgroup of their own: BPF_PROG_TEST_RUN
// charges the packets to the cgroup of the process.
func measureAll(root cgroup.Root, policed string) (_ []*benchmark, err error) {
	inner, err := os.MkdirTemp(policed, "container-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(inner)) }()
	home, err := cgroup.OfProcess(os.Getpid())
	if err != nil {
		return nil, err
	}
	if err := enter(inner); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, enter(root.Path(home))) }()

	l, err := newLab(root, policed, inner)
	if err != nil {
		return nil, err
	}
	all := benchmarks()
	order := slices.Repeat(all, loads)
	rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	for _, b := range order {
		if err := b.load(l); err != nil {
			return nil, fmt.Errorf("%s: %w", b.name, err)
		}
	}
	return all, nil
}

// lab is the place in which the packets seem to be.
type lab struct {
	policed   string
	id        uint64
	container uint64
	// context is a struct __sk_buff.
	context []byte
}

func newLab(root cgroup.Root, policed, container string) (l lab, err error) {
	if l.policed, err = root.Rel(policed); err != nil {
		return l, err
	}
	if l.id, err = root.ID(l.policed); err != nil {
		return l, err
	}
	inner, err := root.Rel(container)
	if err != nil {
		return l, err
	}
	if l.container, err = root.ID(inner); err != nil {
		return l, err
	}
	// The packets seem to leave by a device other than the loopback, over which mail is
	// free. Nothing is sent.
	devices, err := net.Interfaces()
	if err != nil {
		return l, err
	}
	i := slices.IndexFunc(devices, func(d net.Interface) bool { return d.Flags&net.FlagLoopback == 0 })
	if i < 0 {
		return l, errors.New("needs a network device besides the loopback")
	}
	const size, ifindex = 192, 40
	l.context = make([]byte, size)
	binary.NativeEndian.PutUint32(l.context[ifindex:], uint32(devices[i].Index))
	return l, nil
}

func enter(path string) error {
	return os.WriteFile(path+"/cgroup.procs", []byte("0"), 0)
}

// load loads the program anew and adds the fastest of several timings.
func (b *benchmark) load(l lab) error {
	prog, free, err := b.program(l)
	if err != nil {
		return err
	}
	defer free()
	run := func(repeat uint32) error {
		verdict, err := prog.Run(&ebpf.RunOptions{Data: b.packet, Context: l.context, Repeat: repeat})
		if err == nil && verdict != b.verdict && repeat > 1 {
			err = fmt.Errorf("verdict %d, want %d", verdict, b.verdict)
		}
		return err
	}
	// Empty the bucket.
	for range policy.Default().SMTP.Burst {
		if err := run(1); err != nil {
			return err
		}
	}
	fastest, err := fastest(repeat, func() error { return run(repeat) })
	if err != nil {
		return err
	}
	b.fastest = append(b.fastest, fastest)
	return nil
}

// fastest does something with n runs several times (timings), and returns the least thread time
// that one run took, in nanoseconds.
func fastest(n int, do func() error) (float64, error) {
	least := math.Inf(1)
	for range timings {
		before := threadTime()
		if err := do(); err != nil {
			return 0, err
		}
		least = min(least, float64(threadTime()-before)/float64(n))
	}
	return least, nil
}

func threadTime() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		log.Fatal(err)
	}
	return ts.Nano()
}

// program loads the program of the benchmark. The caller calls free.
func (b *benchmark) program(l lab) (_ *ebpf.Program, free func(), err error) {
	if b.name == emptyProgram {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type:         ebpf.CGroupSKB,
			AttachType:   ebpf.AttachCGroupInetEgress,
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
			License:      "Dual BSD/GPL",
		})
		return prog, func() { prog.Close() }, err
	}
	state, err := maps.CreateState()
	if err != nil {
		return nil, nil, err
	}
	if b.crowded {
		for id := range uint64(containers) {
			if err := state.ByName()[bpf.EgressMapContainers].Put(1<<32+id, maps.Container{}); err != nil {
				return nil, nil, err
			}
		}
	}
	policed, id := l.policed, l.id
	if b.sender != "" {
		policed, id = "/", 1
	}
	if b.sender == container {
		if _, err := state.Enrol(l.container); err != nil {
			return nil, nil, err
		}
	}
	progs, err := loader.Load(b.policy, state, policed, id)
	if err != nil {
		return nil, nil, err
	}
	return progs.Egress(), func() { progs.Close(); state.Close() }, nil
}

// print prints the figures and says whether all are within their bounds.
func print(all []*benchmark) bool {
	ns := map[string]float64{}
	for _, b := range all {
		ns[b.name] = median(b.fastest)
	}
	ok := true
	tw := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "PACKET\tNS OVER\t\tAT MOST")
	for _, b := range all {
		if b.name == emptyProgram {
			fmt.Fprintf(tw, "%s\t%.1f\tnothing\t\n", b.name, ns[b.name])
			continue
		}
		base := cmp.Or(b.base, emptyProgram)
		over := ns[b.name] - ns[base]
		bound := "-"
		if b.bound > 0 {
			bound = fmt.Sprint(b.bound)
			if over > b.bound {
				bound += "  EXCEEDED"
				ok = false
			}
		}
		fmt.Fprintf(tw, "%s\t%.1f\t%s\t%s\n", b.name, over, base, bound)
	}
	tw.Flush()
	return ok
}

func median(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}
