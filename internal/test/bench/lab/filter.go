package lab

import (
	"fmt"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// Filter is what is in force on a host.
type Filter struct {
	Name string
	// Containers is how many containers the filter knows.
	Containers int
	// Prefixes is how many prefixes are blocked, for filters that can block many.
	Prefixes int
	// Limit replaces the default limit of new mail connections.
	Limit policy.Limit
	// legacy has Docker write its rules with iptables-legacy.
	legacy bool
	attach func(*Lab) error
}

func (f Filter) String() string {
	switch {
	case f.Containers > 1:
		return fmt.Sprintf("%s, %d containers", f.Name, f.Containers)
	case f.Prefixes > 1:
		return fmt.Sprintf("%s, %d prefixes", f.Name, f.Prefixes)
	}
	return f.Name
}

func (f Filter) putInForce(l *Lab) error {
	if f.attach == nil {
		return nil
	}
	return f.attach(l)
}

// limit is the limit that is in force.
func (f Filter) limit() policy.Limit {
	if f.Limit == (policy.Limit{}) {
		return policy.Default().SMTP.Limit()
	}
	return f.Limit
}

// The names of filters, as they are recorded.
const (
	None             = "none"
	NoneLegacy       = "none (iptables-legacy)"
	EmptyPrograms    = "empty programs"
	EmptyNetfilter   = "empty netfilter"
	WithoutHost      = "egressbpf without host side"
	HostAlone        = "host side alone"
	Egressbpf        = "egressbpf"
	ByTrafficControl = "egressbpf, host side by traffic control"
	Rules            = "iptables-nft rules"
	RulesLegacy      = "iptables-legacy rules"
	RulesByContainer = "per-container rules"
	Hashlimit        = "hashlimit"
	NftSet           = "nftables set"
	IPAddressDeny    = "IPAddressDeny"
)

// Filters returns all filters that are compared.
func Filters() []Filter {
	all := []Filter{
		{Name: None},
		{Name: NoneLegacy, legacy: true},
		{Name: EmptyPrograms, attach: (*Lab).emptyPrograms},
		{Name: EmptyNetfilter, attach: (*Lab).emptyNetfilter},
		{Name: WithoutHost, attach: (*Lab).withoutHost},
		{Name: HostAlone, attach: (*Lab).hostAlone},
		{Name: Egressbpf, attach: (*Lab).egressbpf},
		{Name: ByTrafficControl, attach: (*Lab).byTrafficControl},
		{Name: Rules, attach: (*Lab).rules},
		{Name: RulesLegacy, legacy: true, attach: (*Lab).rules},
		{Name: Hashlimit, attach: (*Lab).hashlimit},
		{Name: NftSet, attach: (*Lab).nftSet},
	}
	for _, n := range []int{10, 100, 1000} {
		all = append(all, Filter{Name: Egressbpf, Containers: n, attach: (*Lab).egressbpf},
			Filter{Name: RulesByContainer, Containers: n, attach: (*Lab).rulesByContainer})
	}
	for _, n := range []int{1, 10, 1000, 10_000} {
		all = append(all, Filter{Name: IPAddressDeny, Prefixes: n, attach: (*Lab).ipAddressDeny})
	}
	for i := range all {
		all[i].Containers = max(all[i].Containers, 1)
	}
	return all
}
