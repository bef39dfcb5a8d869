package programs

import (
	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
)

// hostBenchmarks returns the cases of the host side. Only packets that the host itself sends
// can be measured: BPF_PROG_TEST_RUN gives netfilter programs no device that a packet came
// from, since the kernel (6.18, verify_and_copy_hook_state) looks at the hook before it has
// copied it. And without a device, the programs look at nothing.
func hostBenchmarks() []*benchmark {
	b := benchmark{
		operation: "tcp6 of the host itself", filter: Egressbpf, containers: 1, policy: policy.Default(),
		packet: tcp6, verdict: 1, load: loadAnswer, bare: true,
	}
	return []*benchmark{&b, b.emptied(loadEmptyHost)}
}

func loadAnswer(_ *place, b *benchmark) (*loaded, error) {
	state, err := maps.CreateState()
	if err != nil {
		return nil, err
	}
	progs, err := loader.LoadHost(b.policy, state)
	if err != nil {
		state.Close()
		return nil, err
	}
	return &loaded{progs.Answer, localOut6(), func() { progs.Close(); state.Close() }}, nil
}

func loadEmptyHost(_ *place, _ *benchmark) (*loaded, error) {
	prog, err := lab.NewEmpty(ebpf.Netfilter, ebpf.AttachNetfilter)
	if err != nil {
		return nil, err
	}
	return &loaded{prog, localOut6(), func() { prog.Close() }}, nil
}

// localOut6 returns a struct nf_hook_state.
func localOut6() []byte {
	const size, hook, ipv6 = 48, 3, 10
	state := make([]byte, size)
	state[0], state[1] = hook, ipv6
	return state
}
