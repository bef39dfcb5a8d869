package lab

import (
	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/internal/test/bench/deny"
)

// ipAddressDeny attaches what systemd attaches for IPAddressDeny=, to the container alone.
func (l *Lab) ipAddressDeny() error {
	p, err := deny.New(l.Filter.Prefixes)
	if err != nil {
		return err
	}
	defer p.Close()
	return l.attachTo(l.Cgroups.Container, ebpf.AttachCGroupInetEgress, p.Program)
}
