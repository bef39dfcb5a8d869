package explain

import (
	"net/netip"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Rule names the entry of a policy by which something was refused, as an Answer does; empty if
// no entry is the reason. entry is what is kept about the container c.
func Rule(p policy.Policy, c *container.Container, entry maps.Container, reason bpf.EgressReason, src, dst netip.AddrPort, proto uint8) string {
	switch reason {
	case bpf.EgressReasonREASON_FAMILY:
		return "socket_families " + string(p.Families)
	case bpf.EgressReasonREASON_BLOCKED:
		if rule := blockedBy(p.Match(dst.Addr(), proto, dst.Port())); rule != "" {
			return rule
		}
		if rule := blockedBy(p.Match(src.Addr(), 0, 0)); rule != "" && src.IsValid() {
			return rule + " (source)"
		}
	case bpf.EgressReasonREASON_RATE_LIMITED:
		q := &question{Policy: p, container: c, entry: entry, rule: -1}
		if c.Source != "" {
			q.rule = policy.RuleIndex(p.Containers, c.Subject())
		}
		_, from := q.limit()
		return q.limitText(from)
	}
	return ""
}

func blockedBy(m policy.Match) string {
	switch {
	case !m.Blocked():
		return ""
	case len(m.Block) > 0:
		return m.Block[0].String()
	}
	return m.Presets[0].String()
}
