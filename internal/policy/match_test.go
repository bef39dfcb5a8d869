package policy

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
)

func TestMatch(t *testing.T) {
	p := Default()
	p.Presets = []string{Metadata, "aws-tasks"}
	p.Block = rules(t, "10.0.0.0/8", "10.1.0.0/16:80/tcp", "169.254.169.254:22/tcp")
	p.Allow = rules(t, "10.0.0.53:53/udp", "192.0.2.0/24")
	p.AllowDNS = true
	p.SMTP.Exempt = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	for _, test := range []struct {
		dst                           string
		proto                         uint8
		port                          uint16
		allow, block, presets, exempt string
	}{
		{dst: "192.0.2.1", proto: 6, port: 80, allow: "allow 192.0.2.0/24"},
		{dst: "198.51.100.1", proto: 6, port: 80},
		{dst: "169.254.169.254", proto: 6, port: 80, presets: "preset metadata"},
		{dst: "169.254.169.254", proto: 6, port: 22, block: "block 169.254.169.254:22/tcp", presets: "preset metadata"},
		{dst: "169.254.169.254", proto: 17, port: 53, allow: "allow_dns", presets: "preset metadata"},
		{dst: "fd00:ec2::254", proto: 6, port: 80, presets: "preset aws"},
		{dst: "169.254.170.2", proto: 6, port: 80, presets: "preset aws-tasks"},
		{dst: "168.63.129.16", proto: 6, port: 80, presets: "preset azure"},
		{dst: "168.63.129.16", proto: 6, port: 81},
		{dst: "::ffff:100.100.100.200", proto: 1, presets: "preset alibaba"},
		{dst: "64:ff9b::169.254.42.42", proto: 58, presets: "preset scaleway"},
		{dst: "2002:6464:64c8::1", proto: 6, port: 1, presets: "preset alibaba"},
		{dst: "64:ff9b:1:a9fe:a9:fe00::", proto: 6, port: 80, presets: "preset metadata"},
		{dst: "64:ff9b:1:a9fe:a9:fe00::", proto: 6, port: 53},
		{dst: "fe80::a9fe:a9fe%eth0", proto: 6, port: 80, presets: "preset metadata"},
		{dst: "10.1.2.3", proto: 6, port: 80, block: "block 10.0.0.0/8, block 10.1.0.0/16:80/tcp"},
		{dst: "10.0.0.53", proto: 17, port: 53, allow: "allow 10.0.0.53:53/udp, allow_dns", block: "block 10.0.0.0/8"},
		{dst: "10.9.0.1", proto: 6, port: 25, block: "block 10.0.0.0/8", exempt: "smtp.exempt 10.9.0.0/16"},
	} {
		m := p.Match(netip.MustParseAddr(test.dst), test.proto, test.port)
		for _, list := range []struct {
			name, want string
			got        []Entry
		}{{"allow", test.allow, m.Allow}, {"block", test.block, m.Block}, {"presets", test.presets, m.Presets}, {"exempt", test.exempt, m.Exempt}} {
			var got []string
			for _, e := range list.got {
				got = append(got, e.String())
			}
			if text := strings.Join(got, ", "); text != list.want {
				t.Errorf("%s port %d/%d, %s: got %q, want %q", test.dst, test.port, test.proto, list.name, text, list.want)
			}
		}
	}
}

// Match and Blocks say the same about every destination.
func TestMatchBlocks(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(list ...string) string { return list[random.IntN(len(list))] }
	addr := func() netip.Addr {
		return netip.MustParseAddr(pick("169.254.169.254", "10.0.0.1", "10.1.0.1", "192.0.2.1", "fd00:ec2::254", "2001:db8::1", "::1",
			"64:ff9b::a00:1", "64:ff9b:1:a9fe:a9:fe00::", "64:ff9b:1::a01:1", "2002:a00:1::", "::10.0.0.1", "::ffff:10.0.0.1"))
	}
	for range 2000 {
		p := Default()
		p.Presets = []string{pick("aws", "azure", "metadata", "none")}
		list := func() (rules []Rule) {
			for range random.IntN(3) {
				a := unmap(addr())
				prefix := netip.PrefixFrom(a, a.BitLen()-8*random.IntN(4)).Masked()
				r := Rule{Prefix: prefix, Port: []uint16{0, 0, 53, 80}[random.IntN(4)], Proto: []uint8{0, 6, 17}[random.IntN(3)]}
				if r.Validate() == nil {
					rules = append(rules, r)
				}
			}
			return rules
		}
		p.Block, p.Allow, p.AllowDNS = list(), list(), random.IntN(2) == 0
		for range 20 {
			dst, proto, port := addr(), []uint8{6, 17, 1}[random.IntN(3)], []uint16{0, 53, 80, 81}[random.IntN(4)]
			if got, want := p.Match(dst, proto, port).Blocked(), p.Blocks(dst, proto, port); got != want {
				t.Fatalf("%v port %d/%d: got %v, want %v of presets %v, block %v, allow %v, dns %v", dst, port, proto, got, want, p.Presets, p.Block, p.Allow, p.AllowDNS)
			}
		}
	}
}

func TestParseDestination(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.1":             "192.0.2.1",
		"192.0.2.1:25":          "192.0.2.1:25",
		"192.0.2.1/udp":         "192.0.2.1/udp",
		"192.0.2.1/32/47":       "192.0.2.1/32/47",
		"::ffff:192.0.2.1":      "192.0.2.1",
		"[2001:db8::1]:443/tcp": "[2001:db8::1]:443/tcp",
		"2001:db8::1/icmpv6":    "2001:db8::1/icmpv6",
	} {
		if r, err := ParseDestination(text); err != nil || r.String() != want {
			t.Errorf("%s: got %v, %v, want %s", text, r, err, want)
		}
	}
	for text, want := range map[string]string{
		"example.com":         "names are not looked up",
		"example.com:25":      "names are not looked up",
		"localhost/udp":       "names are not looked up",
		"":                    "want an IPv4 or IPv6 address",
		"10.0.0.0/8":          "not a network",
		"0.0.0.0:25":          "loopback address",
		"[::]:25":             "loopback address",
		"fe80::1%eth0":        "leave out %eth0",
		"192.0.2.1:0":         "port",
		"192.0.2.1:80/icmp":   "no ports",
		"2001:db8::1:80/icmp": "icmpv6",
		"2001:db8::1/128/44":  "extension header",
		"192.0.2.1/32/51":     "extension header",
	} {
		if r, err := ParseDestination(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, %v, want an error with %q", text, r, err, want)
		}
	}
}
