package lab

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// family is what differs between rules for IPv4 and for IPv6.
type family struct {
	command             string // without -nft or -legacy
	containers, service netip.Prefix
	loopback            netip.Prefix
}

var families = []family{
	{"iptables", netip.MustParsePrefix("172.17.0.0/16"), netip.PrefixFrom(Metadata4, 32), netip.MustParsePrefix("127.0.0.0/8")},
	{"ip6tables", netip.MustParsePrefix("fd4d:1::/64"), netip.PrefixFrom(Metadata6, 128), netip.MustParsePrefix("::1/128")},
}

// docker writes the rules that Docker has for its default bridge.
func (l *Lab) docker() error {
	return l.restore(func(f family) string {
		return fmt.Sprintf(`*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d %[2]s -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s %[1]s ! -o docker0 -j MASQUERADE
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
COMMIT
`, f.containers, f.loopback)
	})
}

// restore adds rules for both families.
func (l *Lab) restore(text func(family) string) error {
	for _, f := range families {
		variant := "-nft-restore"
		if l.Filter.legacy {
			variant = "-legacy-restore"
		}
		// Docker's rules stay.
		if err := l.Host.Run(text(f), f.command+variant, "--noflush", "--wait"); err != nil {
			return err
		}
	}
	return nil
}

// A limiter is a match of iptables that holds up to a rate.
type limiter func(policy.Limit) string

func limit(l policy.Limit) string {
	return fmt.Sprintf("-m limit --limit %s --limit-burst %d", rate(l.Rate), l.Burst)
}

func hashlimit(l policy.Limit) string {
	return fmt.Sprintf("-m hashlimit --hashlimit-name mail --hashlimit-mode srcip --hashlimit-upto %s --hashlimit-burst %d", rate(l.Rate), l.Burst)
}

func rate(r policy.Rate) string {
	period := "second"
	if r.Period == time.Minute {
		period = "minute"
	}
	return fmt.Sprintf("%d/%s", r.Count, period)
}

// three are the rules that egressbpf replaces, for what matches from.
func three(f family, from string, limiter string) string {
	const mail = "-p tcp --syn -m multiport --dports 25,465,587"
	return fmt.Sprintf(`-A DOCKER-USER %[1]s %[2]s %[3]s -j RETURN
-A DOCKER-USER %[1]s %[2]s -j DROP
-A DOCKER-USER %[1]s -d %[4]s -j REJECT
`, from, mail, limiter, f.service)
}

func (l *Lab) rules() error { return l.rulesWith(limit) }

func (l *Lab) hashlimit() error { return l.rulesWith(hashlimit) }

func (l *Lab) rulesWith(match limiter) error {
	return l.restore(func(f family) string {
		return "*filter\n" + three(f, "", match(l.Filter.limit())) + "COMMIT\n"
	})
}

// rulesByContainer writes the same rules for each container. The one that sends is in the
// middle of the list.
func (l *Lab) rulesByContainer() error {
	return l.restore(func(f family) string {
		var text strings.Builder
		text.WriteString("*filter\n")
		first := f.containers.Addr().Next().Next()
		other := first
		for i := range l.Filter.Containers {
			addr := first
			if i != l.Filter.Containers/2 {
				other = other.Next()
				addr = other
			}
			text.WriteString(three(f, "-s "+addr.String(), limit(l.Filter.limit())))
		}
		text.WriteString("COMMIT\n")
		return text.String()
	})
}

// nftSet is how nftables does it best: sets of addresses, and a limit in a set by source.
func (l *Lab) nftSet() error {
	lim := l.Filter.limit()
	return l.Host.Run(fmt.Sprintf(`
table inet egress {
	set blocked4 { type ipv4_addr; flags interval; elements = { %[1]s }; }
	set blocked6 { type ipv6_addr; flags interval; elements = { %[2]s }; }
	set mail4 { type ipv4_addr; flags dynamic; size 65535; timeout 10m; }
	set mail6 { type ipv6_addr; flags dynamic; size 65535; timeout 10m; }
	chain forward {
		type filter hook forward priority -10; policy accept;
		ip daddr @blocked4 reject
		ip6 daddr @blocked6 reject
		meta nfproto ipv4 tcp dport { 25, 465, 587 } tcp flags & (fin|syn|rst|ack) == syn update @mail4 { ip saddr limit rate over %[3]s burst %[4]d packets } drop
		meta nfproto ipv6 tcp dport { 25, 465, 587 } tcp flags & (fin|syn|rst|ack) == syn update @mail6 { ip6 saddr limit rate over %[3]s burst %[4]d packets } drop
	}
}
`, Metadata4, Metadata6, rate(lim.Rate), lim.Burst), "nft", "-f", "-")
}
