package verdict

import (
	"net/netip"
	"testing"
	"time"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// policies returns the policies of the tables. In all but one the second mail
// connection is over the limit, and stays so while a test runs.
func policies(t testing.TB) map[string]policy.Policy {
	t.Helper()
	strict := policy.Default()
	strict.SMTP.Rate = policy.Rate{Count: 1, Period: 24 * time.Hour}
	strict.SMTP.Burst = 1
	with := func(edit func(*policy.Policy)) policy.Policy {
		p := strict
		edit(&p)
		return p
	}
	return map[string]policy.Policy{
		"default": strict,
		"nothing": with(func(p *policy.Policy) { p.Presets = []string{policy.None} }),
		"dns":     with(func(p *policy.Policy) { p.AllowDNS = true }),
		"tasks":   with(func(p *policy.Policy) { p.Presets = []string{policy.Metadata, "aws-tasks"} }),
		"gcp": with(func(p *policy.Policy) {
			p.Presets = []string{"gcp"}
			p.Allow = policy.Exceptions("gcp")
		}),
		"unlimited": with(func(p *policy.Policy) { p.SMTP.Rate = policy.Rate{} }),
		"smtp ports": with(func(p *policy.Policy) {
			p.SMTP.Ports = []uint16{1, 63, 64, 256, 2525, 65535}
		}),

		// Prefixes of lengths around those of the bitmaps.
		"prefixes": with(func(p *policy.Policy) {
			p.Presets = nil
			p.Block = rules(t, "9.0.0.0/8", "11.22.0.0/15", "12.34.0.0/16", "13.37.128.0/17", "100.64.0.0/10",
				"198.51.100.7", "203.0.113.8/31", "224.0.0.0/3", "0.0.0.0",
				"3000::/4", "4010::/15", "4003::/16", "4004:8000::/17", "4006:2::/31", "4007:1::/32",
				"4008:1:8000::/33", "2001:db8:1::/48", "2001:db8:2::7", "2001:db8:2::8/127", "::1")
		}),
		"IPv4": with(func(p *policy.Policy) {
			p.Presets = nil
			p.Block = rules(t, "0.0.0.0/0")
			p.Allow = rules(t, "198.51.100.0/24", "203.0.113.1:443/tcp")
		}),
		"IPv6": with(func(p *policy.Policy) {
			p.Block = rules(t, "::/0")
			p.Allow = rules(t, "2001:db8:a::/48", "[2001:db8:b::1]:443/tcp")
		}),
		"services": with(func(p *policy.Policy) {
			p.Presets = nil
			p.Block = rules(t, "203.0.113.1:1", "203.0.113.1:65535", "203.0.113.1:256/tcp",
				"203.0.113.2:53/udp", "203.0.113.3/udp", "203.0.113.4/32/47", "203.0.113.5:5000/sctp",
				"203.0.113.5:5001/dccp", "203.0.113.5:5002/udplite", "203.0.113.6/icmp", "203.0.113.7:25/tcp",
				"[2001:db8::1:1]:443/tcp", "2001:db8::1:2/icmpv6", "[2001:db8::1:3]:1", "[2001:db8::1:3]:65535",
				"203.0.113.128/25:80/tcp", "203.0.113.8/icmpv6")
		}),
		// Lists whose prefixes lie within each other.
		"nested": with(func(p *policy.Policy) {
			p.Block = rules(t, "10.0.0.0/8", "10.1.0.0/16:80/tcp", "10.2.0.0/16:53",
				"172.16.0.0/12:80/tcp", "172.16.1.0/24:443/tcp", "172.16.1.1/udp", "172.17.0.1",
				"192.168.0.0/16", "2001:db8::/32", "[2001:db8:1::/48]:80/tcp")
			p.Allow = rules(t, "10.1.0.0/16:25/tcp", "10.2.2.2", "10.3.0.0/16/udp",
				"172.16.0.0/16:8080/tcp", "172.17.0.0/16:9/udp",
				"192.168.0.0/15", "198.51.100.9", "169.254.169.254:123/udp",
				"2001:db8:1:1::/64", "[2001:db8:2::1]:25/tcp")
		}),
		"exempt": with(func(p *policy.Policy) {
			p.SMTP.Exempt = prefixes("198.51.100.0/24", "10.1.2.3/32", "2001:db8:e::/48", "2001:db8:f::1/128", "10.4.0.0/16")
			p.Block = rules(t, "10.1.0.0/16", "10.4.4.4:25/tcp", "2001:db8:e:1::/64")
			p.Allow = rules(t, "10.1.2.0/24")
		}),
	}
}

func rules(t testing.TB, texts ...string) (list []policy.Rule) {
	t.Helper()
	for _, text := range texts {
		r, err := policy.ParseRule(text)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, r)
	}
	return list
}

func prefixes(texts ...string) (list []netip.Prefix) {
	for _, text := range texts {
		list = append(list, netip.MustParsePrefix(text))
	}
	return list
}
