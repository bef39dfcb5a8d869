package iptables

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// site is what the rules say about the host: which devices and networks are those of
// containers.
type site struct {
	bridges  []string
	networks []netip.Prefix
	behind   map[string][]netip.Prefix // networks by bridge
	nat      bool                      // there is a table nat, which names these networks
}

// docker0 is the usual network of the bridge docker0.
var docker0 = netip.MustParsePrefix("172.17.0.0/16")

// learn finds the site in the rules that Docker makes.
func learn(tables []*table) *site {
	s := site{behind: map[string][]netip.Prefix{}}
	for _, t := range tables {
		s.nat = s.nat || t.name == "nat"
		for _, c := range t.order {
			for _, r := range c.rules {
				masquerade := t.name == "nat" && r.target == "MASQUERADE" && r.match.out.not
				if masquerade {
					if p, err := network(r.match.src.value); err == nil && !r.match.src.not {
						s.networks = append(s.networks, p)
						s.behind[r.match.out.value] = append(s.behind[r.match.out.value], p)
					}
					s.bridges = append(s.bridges, r.match.out.value)
				}
				if dockers(c.name) || dockers(r.target) {
					for _, n := range []negatable{r.match.in, r.match.out} {
						if n.value != "" && n.value != "+" && !external(n.value) {
							s.bridges = append(s.bridges, n.value)
						}
					}
				}
			}
		}
	}
	return &s
}

func begins(name string, with ...string) bool {
	return slices.ContainsFunc(with, func(w string) bool { return strings.HasPrefix(name, w) })
}

// external reports whether a device leads out of the host, by its name.
func external(device string) bool {
	return outward.MatchString(device) && !strings.Contains(device, "br")
}

var outward = regexp.MustCompile(`^(?:lo|(?:eth|tailscale|wg|tun|ppp|bond|team|venet)[0-9+].*|(?:en|wl|ww)[opsx]?[0-9a-f+].*)$`)

func (s *site) bridge(device string) bool {
	return slices.Contains(s.bridges, device) || begins(device, "docker", "br-", "veth", "podman", "cni", "cali", "nerdctl")
}

var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("100.64.0.0/10"), // of providers; Docker can be given a part of it
	netip.MustParsePrefix("fc00::/7"),
}

// everyContainer reports whether a network contains all networks of containers, as far as
// these are known.
func (s *site) everyContainer(p netip.Prefix) bool {
	known := false
	for _, own := range s.networks {
		if own.Addr().Is6() != p.Addr().Is6() {
			continue
		}
		known = true
		if p.Bits() > own.Bits() || !p.Contains(own.Addr()) {
			return false
		}
	}
	return known
}

// container reports whether addresses of a network can be those of containers.
func (s *site) container(p netip.Prefix) bool {
	known := private
	if own := slices.DeleteFunc(slices.Clone(s.networks), func(n netip.Prefix) bool { return n.Addr().Is6() != p.Addr().Is6() }); len(own) > 0 {
		known = own
	}
	return slices.ContainsFunc(known, p.Overlaps)
}

// resolve returns a match with the meaning that its devices and its source have for packets
// that containers send, over IPv4 or over IPv6.
func (s *site) resolve(m match, v6 bool) match {
	m.conditions = slices.Clone(m.others)
	if m.limit != nil && m.limit.mask == everywhere(v6).Addr().BitLen() {
		all := *m.limit
		all.mask = -1
		m.limit = &all
	}
	if d := m.in; d.value != "" {
		switch {
		case d.value == "+" || external(d.value) && !s.bridge(d.value):
			if (d.value == "+") == d.not {
				m.never = "it is about what comes in from " + d.value + ", not about what containers send"
			}
		default:
			m.conditions = append(m.conditions, condition{"-i " + d.value, d.not})
		}
	}
	if d := m.out; d.value != "" {
		switch {
		case s.bridge(d.value):
			behind := slices.DeleteFunc(slices.Clone(s.behind[d.value]), func(p netip.Prefix) bool { return p.Addr().Is6() != v6 })
			switch {
			case !d.not:
				m.never = "it is about what goes to containers on " + d.value
			case len(behind) > 0:
				m.except = behind
			case d.value == "docker0" && !s.nat && !v6:
				m.except, m.assumed = []netip.Prefix{docker0}, true
			default:
				m.conditions = append(m.conditions, condition{"-o " + d.value, true})
			}
		case d.value == "+":
			if d.not {
				m.never = "no packet matches it"
			}
		default:
			m.conditions = append(m.conditions, condition{"-o " + d.value, d.not})
		}
	}
	if n := m.src; n.value != "" {
		p, _ := network(n.value)
		switch {
		case p.Bits() == 0:
			if n.not {
				m.never = "no packet matches it"
			}
		case s.everyContainer(p):
			if n.not {
				m.never = "it is about what comes from elsewhere than " + n.value + ", which all networks of containers are in"
			}
		case !s.container(p):
			if !n.not {
				m.never = "it is about what comes from " + n.value + ", which does not look like a network of containers"
			}
		default:
			m.conditions = append(m.conditions, condition{"-s " + n.value, n.not})
		}
	}
	return m
}
