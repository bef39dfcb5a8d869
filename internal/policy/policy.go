// Package policy says what containers may send: which destinations are blocked,
// which of them are allowed after all, and how many new mail connections a container
// may open. It parses and validates; nothing in it touches the kernel.
//
// The parsers refuse malformed input and say what would be right. The values that they
// return are canonical, so that equal rules compare equal.
package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// Mode says what happens to a packet that the policy refuses.
type Mode string

const (
	Enforce Mode = "enforce" // it is dropped and counted
	Audit   Mode = "audit"   // it is counted and reported, and passes
)

// ParseMode reads enforce or audit.
func ParseMode(s string) (Mode, error) {
	return oneOf(s, Enforce, Audit)
}

// UnmarshalText is [ParseMode].
func (m *Mode) UnmarshalText(text []byte) (err error) {
	*m, err = ParseMode(string(text))
	return err
}

// OverLimit says what happens to a mail connection over the limit.
type OverLimit string

const (
	// Drop loses the SYN, which paces the sender: the kernel sends it again
	// until a token is back.
	Drop OverLimit = "drop"
	// Reject makes connect fail at once.
	Reject OverLimit = "reject"
)

// ParseOverLimit reads drop or reject.
func ParseOverLimit(s string) (OverLimit, error) {
	return oneOf(s, Drop, Reject)
}

// UnmarshalText is [ParseOverLimit].
func (o *OverLimit) UnmarshalText(text []byte) (err error) {
	*o, err = ParseOverLimit(string(text))
	return err
}

func oneOf[T ~string](s string, a, b T) (T, error) {
	if v := T(s); v == a || v == b {
		return v, nil
	}
	return "", fmt.Errorf("%q: want %s or %s", s, a, b)
}

// SMTP limits each container's new TCP connections to mail ports.
type SMTP struct {
	Ports     []uint16       `json:"ports" yaml:"ports,flow"`
	Rate      Rate           `json:"rate" yaml:"rate"`
	Burst     uint32         `json:"burst" yaml:"burst"` // connections, 1 to 1,000,000
	OverLimit OverLimit      `json:"over_limit" yaml:"over_limit"`
	Exempt    []netip.Prefix `json:"exempt" yaml:"exempt"` // destinations that take no token, canonical as in a [Rule]
}

// Limit returns the token bucket that every container gets.
func (s SMTP) Limit() Limit { return Limit{Rate: s.Rate, Burst: s.Burst} }

// Validate refuses what the parsers could not have returned; the error begins
// with the key in the config file.
func (s SMTP) Validate() error {
	if err := checkPorts(s.Ports); err != nil {
		return fmt.Errorf("ports: %w", err)
	}
	if err := s.Limit().Validate(); err != nil {
		return err
	}
	if _, err := ParseOverLimit(string(s.OverLimit)); err != nil {
		return fmt.Errorf("over_limit: %w", err)
	}
	for _, p := range s.Exempt {
		if err := (Rule{Prefix: p}).Validate(); err != nil {
			return fmt.Errorf("exempt: %s: %w", p, err)
		}
	}
	return nil
}

// ParsePorts reads the mail ports: each 1 to 65535, at least one. They are
// returned sorted, without duplicates.
func ParsePorts(list []string) ([]uint16, error) {
	ports := make([]uint16, 0, len(list))
	for _, s := range list {
		p, err := ParsePort(s)
		if err != nil {
			return nil, err
		}
		ports = append(ports, p)
	}
	return sortPorts(ports)
}

func sortPorts(ports []uint16) ([]uint16, error) {
	slices.Sort(ports)
	ports = slices.Compact(ports)
	return ports, checkPorts(ports)
}

func checkPorts(ports []uint16) error {
	switch {
	case len(ports) == 0:
		return errors.New("want at least one port; a rate of unlimited turns the mail limit off")
	case len(ports) > 65535:
		return fmt.Errorf("%d ports: want at most 65535", len(ports))
	case slices.Contains(ports, 0):
		return errors.New("port 0: want 1 to 65535")
	}
	return nil
}

// Policy is one set of rules for all containers. Start from [Default]: the zero
// value is not valid. JSON and YAML name the fields as the config file does;
// read a file with [ParseConfig], which is strict and fills in the defaults.
type Policy struct {
	Mode     Mode     `json:"mode" yaml:"mode"`
	Presets  []string `json:"presets" yaml:"presets,flow"`
	Block    []Rule   `json:"block" yaml:"block"`
	Allow    []Rule   `json:"allow" yaml:"allow"` // wins over Block and Presets
	AllowDNS bool     `json:"allow_dns" yaml:"allow_dns"`
	SMTP     SMTP     `json:"smtp" yaml:"smtp"`

	// Families are the socket families that containers may use.
	Families Families `json:"socket_families" yaml:"socket_families"`
	// HostSide says whether the host judges again what comes from Docker's bridges and
	// from HostDevices.
	HostSide    Switch   `json:"host_side" yaml:"host_side"`
	HostDevices []Device `json:"host_devices" yaml:"host_devices"`

	// Scopes are the names by which containers' cgroups are recognised.
	Scopes []Scope `json:"scopes" yaml:"scopes"`

	// Containers are rules for single containers; the first that matches holds.
	Containers []ContainerRule `json:"containers,omitempty" yaml:"containers,omitempty"`
}

// Default returns the default policy: metadata services blocked, and 5 new mail connections
// a minute for each container.
func Default() Policy {
	return Policy{
		Mode:    Enforce,
		Presets: []string{Metadata},
		Block:   []Rule{},
		Allow:   []Rule{},
		SMTP: SMTP{
			Ports:     []uint16{25, 465, 587},
			Rate:      Rate{Count: 5, Period: time.Minute},
			Burst:     5,
			OverLimit: Drop,
			Exempt:    []netip.Prefix{},
		},
		Families:    Restrict,
		HostSide:    On,
		HostDevices: []Device{},
		Scopes:      cgroup.DefaultScopes(),
	}
}

// Equal says whether two policies are the same, as they are written.
func (p Policy) Equal(q Policy) bool {
	a, errA := json.Marshal(p)
	b, errB := json.Marshal(q)
	return errA == nil && errB == nil && bytes.Equal(a, b)
}

// Validate refuses a policy that the parsers could not have returned. The error begins
// with the key in the config file.
func (p Policy) Validate() error {
	if _, err := ParseMode(string(p.Mode)); err != nil {
		return fmt.Errorf("mode: %w", err)
	}
	if _, err := ParsePresets(p.Presets); err != nil {
		return fmt.Errorf("presets: %w", err)
	}
	for _, list := range []struct {
		key   string
		rules []Rule
	}{{"block", p.Block}, {"allow", p.Allow}} {
		for _, r := range list.rules {
			if err := r.Validate(); err != nil {
				return fmt.Errorf("%s: %s: %w", list.key, r, err)
			}
		}
	}
	if err := p.SMTP.Validate(); err != nil {
		return fmt.Errorf("smtp.%w", err)
	}
	if _, err := ParseFamilies(string(p.Families)); err != nil {
		return fmt.Errorf("socket_families: %w", err)
	}
	if _, err := ParseSwitch(string(p.HostSide)); err != nil {
		return fmt.Errorf("host_side: %w", err)
	}
	for _, d := range p.HostDevices {
		if _, err := ParseDevice(string(d)); err != nil {
			return fmt.Errorf("host_devices: %w", err)
		}
	}
	for _, s := range p.Scopes {
		if _, err := cgroup.ParseScope(string(s)); err != nil {
			return fmt.Errorf("scopes: %w", err)
		}
	}
	if slices.Contains(p.Scopes, cgroup.DefaultsScope) {
		return fmt.Errorf("scopes: %s is for lists that are parsed", cgroup.DefaultsScope)
	}
	if _, err := finishScopes(p.Scopes); err != nil {
		return fmt.Errorf("scopes: %w", err)
	}
	for _, r := range p.Containers {
		if err := r.Validate(); err != nil {
			return fmt.Errorf("containers: %w", err)
		}
	}
	return nil
}

// Metadata returns what the presets block, without duplicates. Presets that
// [Policy.Validate] would refuse add nothing.
func (p Policy) Metadata() []Rule {
	var rules []Rule
	for _, name := range p.Presets {
		preset, _ := Preset(name)
		rules = append(rules, preset...)
	}
	return unique(rules)
}

// Blocked returns the block list: that of the presets, then Block, without duplicates.
func (p Policy) Blocked() []Rule { return unique(append(p.Metadata(), p.Block...)) }

// Allowed returns the allow list: Allow and, with AllowDNS, port 53 of every
// blocked prefix over UDP and TCP, without duplicates.
func (p Policy) Allowed() []Rule {
	rules := slices.Clone(p.Allow)
	if p.AllowDNS {
		for _, r := range p.Blocked() {
			rules = append(rules,
				Rule{Prefix: r.Prefix, Port: 53, Proto: 17},
				Rule{Prefix: r.Prefix, Port: 53, Proto: 6})
		}
	}
	return unique(rules)
}

// Opens returns the exceptions that open all ports of a metadata service of the presets, or
// more than its own address for more than DNS, each with a destination that it opens.
func (p Policy) Opens() map[Rule]Rule {
	opened := map[Rule]Rule{}
	for _, allow := range p.Allow {
		for _, service := range p.Metadata() {
			if !allow.Prefix.Overlaps(service.Prefix) {
				continue
			}
			const domain = 53
			if wide := allow.Prefix.Bits() < service.Prefix.Bits(); allow.Port == 0 || wide && allow.Port != domain {
				opened[allow] = service
				break
			}
		}
	}
	return opened
}

// Blocks reports whether the policy blocks a packet to dst: dst is on the block list and
// not on the allow list. A v4-mapped address is judged as its IPv4
// address, one that embeds an IPv4 address as both, and a zone does not matter.
// Port 0 means that the port is not known, as in a later fragment: no rule with a port
// matches then, on either list.
//
// The BPF programs must agree with it. This is the plain statement of the rule, which
// walks the lists.
func (p Policy) Blocks(dst netip.Addr, proto uint8, port uint16) bool {
	dst = unmap(dst)
	is, maybe := embedded(dst)
	hit := func(addrs ...netip.Addr) func(Rule) bool {
		return func(r Rule) bool {
			return slices.ContainsFunc(addrs, func(a netip.Addr) bool { return r.matches(a, proto, port) })
		}
	}
	allowed, blocked := p.Allowed(), p.Blocked()
	all := append(is, dst)
	if slices.ContainsFunc(allowed, hit(all...)) {
		return false
	}
	return slices.ContainsFunc(blocked, hit(all...)) || slices.ContainsFunc(maybe, func(a netip.Addr) bool {
		return slices.ContainsFunc(blocked, hit(a)) && !slices.ContainsFunc(allowed, hit(a))
	})
}
