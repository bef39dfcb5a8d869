package verdict

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	etherSize = 14

	loopback = 1 // its interface index
)

// longest is the size of the longest packet that the kernel test-runs.
const longest = 3712 - etherSize

// sender is where packets are sent from: a cgroup nested in a container of a policed cgroup,
// in a network namespace that has another device besides the loopback.
type sender struct {
	rel       string // of the policed cgroup
	policed   uint64
	container uint64
	device    int
	netns     *os.File
}

// newSender moves the test process into such a cgroup. Each goroutine that sends must call
// inside.
func newSender(t testing.TB) *sender {
	t.Helper()
	policed := testenv.Cgroup(t)
	container := testenv.Child(t, policed, "container")
	return newSenderIn(t, policed, container, testenv.Child(t, testenv.Child(t, container, "nested"), "deeper"))
}

func newSenderIn(t testing.TB, policed, container, process string) *sender {
	t.Helper()
	if err := maps.RemoveMemlock(); err != nil {
		t.Fatal(err)
	}
	p := &sender{policed: cgroupID(t, policed), container: cgroupID(t, container)}
	var err error
	if p.rel, err = testenv.Root(t).Rel(policed); err != nil {
		t.Fatal(err)
	}
	testenv.Enter(t, process)

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := threadNetns(t)
	defer before.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	defer setNetns(t, before)
	p.netns = threadNetns(t)
	t.Cleanup(func() { p.netns.Close() })
	if out, err := exec.Command("ip", "link", "add", "verdict", "type", "veth").CombinedOutput(); err != nil {
		t.Fatalf("add a device: %v: %s", err, out)
	}
	device, err := net.InterfaceByName("verdict")
	if err != nil {
		t.Fatal(err)
	}
	p.device = device.Index
	return p
}

func cgroupID(t testing.TB, path string) uint64 {
	t.Helper()
	root := testenv.Root(t)
	rel, err := root.Rel(path)
	if err != nil {
		t.Fatal(err)
	}
	id, err := root.ID(rel)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// threadNetns opens the network namespace of the thread.
func threadNetns(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func setNetns(t testing.TB, ns *os.File) {
	t.Helper()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

// inside runs fn on a thread that is in the sender's network namespace.
func (p *sender) inside(t testing.TB, fn func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := threadNetns(t)
	defer before.Close()
	setNetns(t, p.netns)
	defer setNetns(t, before)
	fn()
}

// filter is the egress program with a policy, loaded and not attached.
type filter struct {
	*sender
	prog   *ebpf.Program
	state  *maps.State
	policy policy.Policy
	full   bool // no room for the container in the state
}

func (p *sender) load(t testing.TB, pol policy.Policy) *filter {
	t.Helper()
	state, err := maps.CreateState()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { state.Close() })
	return p.loadWith(t, pol, state)
}

func (p *sender) loadWith(t testing.TB, pol policy.Policy, state *maps.State) *filter {
	t.Helper()
	if err := pol.Validate(); err != nil {
		t.Fatal(err)
	}
	programs, err := loader.Load(pol, state, p.rel, p.policed)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { programs.Close() })
	return &filter{p, programs.Egress(), state, pol, false}
}

// run sends a packet out of a device, and returns what the program does. The caller must be
// inside.
func (f *filter) run(t testing.TB, etherType uint16, packet []byte, device int) uint32 {
	t.Helper()
	frame := make([]byte, etherSize, etherSize+len(packet))
	binary.BigEndian.PutUint16(frame[12:], etherType)
	// struct __sk_buff, up to ifindex.
	context := make([]byte, 44)
	binary.NativeEndian.PutUint32(context[40:], uint32(device))
	got, err := maps.Run(f.prog, &ebpf.RunOptions{Data: append(frame, packet...), Context: context})
	if err != nil {
		t.Fatalf("test run of %d bytes %x: %v", len(packet), packet, err)
	}
	return got
}

// compare sends a packet and returns how the verdict and the counters differ from what they
// should be.
func (f *filter) compare(t testing.TB, etherType uint16, packet []byte, device int, want verdict) (difference string) {
	t.Helper()
	before := f.counts(t)
	returned := f.run(t, etherType, packet, device)
	after := f.counts(t)

	counts := want.counts(len(packet))
	if wanted := want.returns(f.policy.Mode); returned != wanted {
		difference += fmt.Sprintf("; returned %d, want %d", returned, wanted)
	}
	if got := subtract(after.total, before.total); got != counts {
		difference += fmt.Sprintf("; counted %s in total, want %s", brief(got), brief(counts))
	}
	if f.full {
		counts = maps.Counters{}
	}
	if got := subtract(after.container, before.container); got != counts {
		difference += fmt.Sprintf("; counted %s, want %s", brief(got), brief(counts))
	}
	if known := before.known || counts != (maps.Counters{}) || want == unlimited; after.known != known {
		difference += fmt.Sprintf("; the container has an entry: %t, want %t", after.known, known)
	}
	if difference != "" {
		difference = fmt.Sprintf("want %s%s", want, difference)
	}
	return difference
}

// counts holds the counters of the container and the total, at one moment.
type counts struct {
	known            bool // the container, at all
	container, total maps.Counters
}

func (f *filter) counts(t testing.TB) (c counts) {
	t.Helper()
	total, err := f.state.Totals()
	if err != nil {
		t.Fatal(err)
	}
	var container maps.Container
	err = f.state.ByName()[bpf.EgressMapContainers].Lookup(f.container, &container)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatal(err)
	}
	return counts{err == nil, container.Counters, total}
}

// forget removes everything that is known about the container.
func (f *filter) forget(t testing.TB) {
	t.Helper()
	if err := f.state.Forget(f.container); err != nil {
		t.Fatal(err)
	}
}

// subtract returns what was counted between two moments.
func subtract(after, before maps.Counters) maps.Counters {
	for r := range after.Dropped {
		after.Dropped[r].Packets -= before.Dropped[r].Packets
		after.Dropped[r].Bytes -= before.Dropped[r].Bytes
		after.Dropped[r].Connects -= before.Dropped[r].Connects
	}
	after.SmtpAllowed -= before.SmtpAllowed
	return after
}

// verdict says what should happen to a packet.
type verdict string

const (
	pass        verdict = "pass"     // and leave no trace
	unlimited   verdict = "no limit" // for this container, which has an entry from then on
	malformed   verdict = "malformed"
	blocked     verdict = "blocked"
	admitted    verdict = "admitted" // for a token
	rateLimited verdict = "rate limited"
	noBucket    verdict = "no bucket"
)

var reasons = map[verdict]bpf.EgressReason{
	malformed:   bpf.EgressReasonREASON_MALFORMED,
	blocked:     bpf.EgressReasonREASON_BLOCKED,
	rateLimited: bpf.EgressReasonREASON_RATE_LIMITED,
	noBucket:    bpf.EgressReasonREASON_NO_BUCKET,
}

// returns is what the program returns for the verdict.
func (v verdict) returns(mode policy.Mode) uint32 {
	if _, drop := reasons[v]; drop && mode == policy.Enforce {
		return 0
	}
	return 1
}

// counts returns what is counted for a packet of n bytes.
func (v verdict) counts(n int) (c maps.Counters) {
	if reason, drop := reasons[v]; drop {
		c.Dropped[reason].Packets = 1
		c.Dropped[reason].Bytes = uint64(n)
	} else if v == admitted {
		c.SmtpAllowed = 1
	}
	return c
}

// brief shows the counters that are not 0.
func brief(c maps.Counters) string {
	var text []string
	for v, r := range reasons {
		if d := c.Dropped[r]; d.Packets|d.Bytes|d.Connects != 0 {
			text = append(text, fmt.Sprintf("%s %d (%d bytes, %d connects)", v, d.Packets, d.Bytes, d.Connects))
		}
	}
	if c.SmtpAllowed != 0 {
		text = append(text, fmt.Sprintf("admitted %d", c.SmtpAllowed))
	}
	slices.Sort(text)
	return "[" + strings.Join(text, ", ") + "]"
}
