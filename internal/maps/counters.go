package maps

import (
	"fmt"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
)

// Counters are the counts of one container, or of all containers.
type Counters = bpf.EgressCounters

// Sums are the Counters over all containers, and the format of the kept maps.
type Sums = bpf.EgressSums

// Refused returns how much of a container's traffic the hooks of its cgroup refused for a
// reason.
func Refused(c Counters, why bpf.EgressReason) bpf.EgressDrops {
	if int(why) < len(c.Dropped) {
		return c.Dropped[why]
	}
	return c.MoreDropped[int(why)-len(c.Dropped)]
}

// words are Counters as an array of their numbers.
type words = [unsafe.Sizeof(Counters{}) / 8]uint64

func wordsOf(c *Counters) *words { return (*words)(unsafe.Pointer(c)) }

func add(a, b Counters) Counters {
	sum := wordsOf(&a)
	for i, n := range wordsOf(&b) {
		sum[i] += n
	}
	return a
}

// less says whether one of a's counters is less than b's.
func less(a, b Counters) bool {
	other := wordsOf(&b)
	for i, n := range wordsOf(&a) {
		if n < other[i] {
			return true
		}
	}
	return false
}

// readSums returns the sum over the CPUs of a map like totals.
func readSums(m *ebpf.Map) (sum Sums, err error) {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return sum, err
	}
	perCPU := make([][]byte, cpus)
	if err := m.Lookup(uint32(0), &perCPU); err != nil {
		return sum, fmt.Errorf("read map %s: %w", bpf.EgressMapTotals, err)
	}
	for _, value := range perCPU {
		own := decode[Sums](value)
		sum.Counters = add(sum.Counters, own.Counters)
		sum.Format = max(sum.Format, own.Format)
	}
	return sum, nil
}
