package metrics

import (
	"fmt"
	"io"
	"testing"

	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// BenchmarkScrape tells what a scrape of 1,000 running containers costs, in CPU time of all threads.
func BenchmarkScrape(b *testing.B) {
	for _, n := range []int{0, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) { benchmark(b, n) })
	}
}

func benchmark(b *testing.B, n int) {
	filter := testenv.Filter(b)
	parent := testenv.Child(b, testenv.Cgroup(b), "docker")
	for i := range n {
		cmd := testenv.Command(b, testenv.Child(b, parent, fmt.Sprintf("%064x", i)), "sleep", "600")
		check(b, cmd.Start())
		defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	}
	check(b, filter.Attach(b.Context(), []string{parent}, policy.Default()))
	c := &Collector{Filter: filter, Root: testenv.Root(b), Containers: true}
	before := cpu(b)
	for b.Loop() {
		check(b, c.Write(io.Discard))
	}
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N), "cpu-µs/op")
}
