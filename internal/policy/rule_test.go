package policy

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
)

func TestParseRule(t *testing.T) {
	for _, tt := range []struct {
		in, prefix string
		port       uint16
		proto      uint8
		out        string // "": same as in
	}{
		{"169.254.169.254", "169.254.169.254/32", 0, 0, ""},
		{"169.254.169.254/32", "169.254.169.254/32", 0, 0, "169.254.169.254"},
		{"0.0.0.0/0", "0.0.0.0/0", 0, 0, ""},
		{"0.0.0.0", "0.0.0.0/32", 0, 0, ""},
		{"255.255.255.255", "255.255.255.255/32", 0, 0, ""},
		{"1.2.3.0/24", "1.2.3.0/24", 0, 0, ""},
		{"1.2.3.4/31", "1.2.3.4/31", 0, 0, ""},
		{"4.0.0.0/6", "4.0.0.0/6", 0, 0, ""}, // a length, not TCP
		{"1.2.3.4/32/6", "1.2.3.4/32", 0, 6, "1.2.3.4/tcp"},
		{"1.2.3.4/tcp", "1.2.3.4/32", 0, 6, ""},
		{"10.0.0.0/8/tcp", "10.0.0.0/8", 0, 6, ""},
		{"10.0.0.0/8/47", "10.0.0.0/8", 0, 47, ""},
		{"10.0.0.0/8:80", "10.0.0.0/8", 80, 0, ""},
		{"10.0.0.0/8:80/tcp", "10.0.0.0/8", 80, 6, ""},
		{"1.2.3.4:1", "1.2.3.4/32", 1, 0, ""},
		{"1.2.3.4:65535/udp", "1.2.3.4/32", 65535, 17, ""},
		{"1.2.3.4/32:53/17", "1.2.3.4/32", 53, 17, "1.2.3.4:53/udp"},
		{"1.2.3.4:53/udplite", "1.2.3.4/32", 53, 136, ""},
		{"1.2.3.4:53/sctp", "1.2.3.4/32", 53, 132, ""},
		{"1.2.3.4:53/dccp", "1.2.3.4/32", 53, 33, ""},
		{"1.2.3.4/icmp", "1.2.3.4/32", 0, 1, ""},
		{"1.2.3.4/icmpv6", "1.2.3.4/32", 0, 58, ""}, // by way of NAT64
		{"1.2.3.4/32/1", "1.2.3.4/32", 0, 1, "1.2.3.4/icmp"},
		{"1.2.3.4/32/255", "1.2.3.4/32", 0, 255, ""},
		{"1.2.3.4/32/2", "1.2.3.4/32", 0, 2, ""},

		{"2001:db8::1", "2001:db8::1/128", 0, 0, ""},
		{"[2001:db8::1]", "2001:db8::1/128", 0, 0, "2001:db8::1"},
		{"2001:DB8:0::1", "2001:db8::1/128", 0, 0, "2001:db8::1"},
		{"2001:db8::1:80", "2001:db8::1:80/128", 0, 0, ""}, // an address, no port
		{"[2001:db8::1]:80", "2001:db8::1/128", 80, 0, ""},
		{"[2001:db8::1]:80/tcp", "2001:db8::1/128", 80, 6, ""},
		{"[2001:db8::1]:80/6", "2001:db8::1/128", 80, 6, "[2001:db8::1]:80/tcp"},
		{"[2001:db8::/32]:80", "2001:db8::/32", 80, 0, ""},
		{"[2001:db8::1/128]:80", "2001:db8::1/128", 80, 0, "[2001:db8::1]:80"},
		{"2001:db8::/32", "2001:db8::/32", 0, 0, ""},
		{"[2001:db8::/32]", "2001:db8::/32", 0, 0, "2001:db8::/32"},
		{"2001:db8::/32/tcp", "2001:db8::/32", 0, 6, ""},
		{"[2001:db8::/32]/tcp", "2001:db8::/32", 0, 6, "2001:db8::/32/tcp"},
		{"[2001:db8::/32]/47", "2001:db8::/32", 0, 47, "2001:db8::/32/47"},
		{"2001:db8::1/tcp", "2001:db8::1/128", 0, 6, ""},
		{"2001:db8::1/128/47", "2001:db8::1/128", 0, 47, ""},
		{"2001:db8::1/ipv6-icmp", "2001:db8::1/128", 0, 58, "2001:db8::1/icmpv6"},
		{"::/0", "::/0", 0, 0, ""},
		{"::", "::/128", 0, 0, ""},
		{"::1", "::1/128", 0, 0, ""},

		// IPv4 in IPv6 spelling.
		{"::ffff:1.2.3.4", "1.2.3.4/32", 0, 0, "1.2.3.4"},
		{"::ffff:102:304", "1.2.3.4/32", 0, 0, "1.2.3.4"},
		{"::ffff:1.2.3.4/128", "1.2.3.4/32", 0, 0, "1.2.3.4"},
		{"::ffff:1.2.3.0/120", "1.2.3.0/24", 0, 0, "1.2.3.0/24"},
		{"::ffff:0:0/96", "0.0.0.0/0", 0, 0, "0.0.0.0/0"},
		{"::fffe:0:0/95", "::fffe:0:0/95", 0, 0, ""}, // covers it from outside
		{"::/80", "::/80", 0, 0, ""},
		{"[::ffff:1.2.3.4]:80/tcp", "1.2.3.4/32", 80, 6, "1.2.3.4:80/tcp"},
		{"[::ffff:10.0.0.0/104]:80", "10.0.0.0/8", 80, 0, "10.0.0.0/8:80"},
		{"64:ff9b::a9fe:a9fe", "64:ff9b::a9fe:a9fe/128", 0, 0, ""}, // that spelling alone
		{"64:ff9b::169.254.169.254/tcp", "64:ff9b::a9fe:a9fe/128", 0, 6, "64:ff9b::a9fe:a9fe/tcp"},
		{"64:ff9b::/96", "64:ff9b::/96", 0, 0, ""},
		{"64:ff9b::/95", "64:ff9b::/95", 0, 0, ""},
		{"64:ff9b::/32", "64:ff9b::/32", 0, 0, ""},
		{"64:ff9b:1::/96", "64:ff9b:1::/96", 0, 0, ""}, // the local-use block is not the well-known one
		{"::1.2.3.4", "::102:304/128", 0, 0, "::102:304"},
	} {
		t.Run(tt.in, func(t *testing.T) {
			want := Rule{netip.MustParsePrefix(tt.prefix), tt.port, tt.proto}
			got, err := ParseRule(tt.in)
			if err != nil || got != want {
				t.Fatalf("got %+v, %v, want %+v", got, err, want)
			}
			if tt.out == "" {
				tt.out = tt.in
			}
			if s := got.String(); s != tt.out {
				t.Errorf("String: got %s, want %s", s, tt.out)
			}
			text, err := got.MarshalText()
			if err != nil {
				t.Fatal(err)
			}
			var again Rule
			if err := again.UnmarshalText(text); err != nil || again != got {
				t.Errorf("round trip of %s: got %+v, %v, want %+v", text, again, err, got)
			}
		})
	}
}

func TestParseRuleRefused(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", "want an IPv4 or IPv6 address"},
		{" ", "want an IPv4 or IPv6 address"},
		{" 1.2.3.4", "want an IPv4 or IPv6 address"},
		{"1.2.3.4 ", "want an IPv4 or IPv6 address"},
		{"example.com", "names are not looked up"},
		{"example.com:80", "names are not looked up"},
		{"1.2.3", "want an IPv4 or IPv6 address"},
		{"1.2.3.256", "want an IPv4 or IPv6 address"},
		{"01.2.3.4", "want an IPv4 or IPv6 address"},
		{"1.2.3.4:80:90", "want an IPv4 or IPv6 address"},
		{":80", "want an IPv4 or IPv6 address"},
		{"/8", "want an IPv4 or IPv6 address"},
		{"/tcp", "want an IPv4 or IPv6 address"},
		{"1:2:3:4:5:6:7:8:80", "want an IPv4 or IPv6 address"},

		{"10.0.0.1/8", "host bits are set: want 10.0.0.0/8"},
		{"1.2.3.4/6", "host bits are set: want 0.0.0.0/6"},
		{"10.0.0.1/8:80/tcp", "host bits are set: want 10.0.0.0/8:80/tcp"},
		{"10.0.0.1/31/47", "host bits are set: want 10.0.0.0/31/47"},
		{"[2001:db8::1/32]:80", "host bits are set: want [2001:db8::/32]:80"},
		{"::ffff:10.0.0.1/104", "host bits are set: want 10.0.0.0/8"},
		{"64:ff9b::10.0.0.1/104", "host bits are set: want 64:ff9b::a00:0/104"},
		{"::ffff:0:0/95", "host bits are set: want ::fffe:0:0/95"},
		{"::ffff:10.0.0.0/8", "counts from 96: want 10.0.0.0/8"},
		{"::ffff:10.1.2.3/24", "counts from 96: want 10.1.2.0/24"},

		{"fe80::1%eth0", "leave out %eth0"},
		{"[fe80::1%eth0]:80", "leave out %eth0"},
		{"1.2.3.4%eth0", "want an IPv4 or IPv6 address"},

		{"1.2.3.4/33", `prefix length "33": want 0 to 32`},
		{"0.0.0.0/00", `prefix length "00": want 0 to 32`},
		{"10.0.0.0/08", `prefix length "08": want 0 to 32`},
		{"10.0.0.0/8x", `prefix length "8x": want 0 to 32`},
		{"10.0.0.0/8 ", `prefix length "8 ": want 0 to 32`},
		{"2001:db8::/129", `prefix length "129": want 0 to 128`},
		{"[2001:db8::/]:80", `prefix length "": want 0 to 128`},
		{"10.0.0.0/255.0.0.0", `prefix length "255.0.0.0"`},

		{"1.2.3.4:0", `port "0": want 1 to 65535; leave it out to mean every port`},
		{"1.2.3.4:65536", `port "65536": want 1 to 65535`},
		{"1.2.3.4:080", `port "080"`},
		{"1.2.3.4:+80", `port "+80"`},
		{"1.2.3.4:-80", `port "-80"`},
		{"1.2.3.4:", `port ""`},
		{"1.2.3.4:/tcp", `port ""`},
		{"1.2.3.4:http", `port "http"`},
		{"1.2.3.4:80-90", `port "80-90"`},
		{"1.2.3.4:99999999999999999999", "want 1 to 65535"},

		{"1.2.3.4/", `protocol ""`},
		{"1.2.3.4:80/", `protocol ""`},
		{"1.2.3.4/TCP", `protocol "TCP": want tcp, udp, udplite, sctp, dccp, icmp, icmpv6, ipv6-icmp or a number from 1 to 255`},
		{"1.2.3.4/32/0", `protocol "0"`},
		{"1.2.3.4/32/256", `protocol "256"`},
		{"1.2.3.4/32/06", `protocol "06"`},
		{"1.2.3.4/tcp/udp", `protocol "tcp/udp"`},
		{"1.2.3.4/tcp:80", `protocol "tcp:80"`},
		{"1.2.3.4/24/6/7", `protocol "6/7"`},
		{"1.2.3.4:80/icmp", "protocol icmp has no ports"},
		{"1.2.3.4:80/icmpv6", "protocol icmpv6 has no ports"},
		{"1.2.3.4:80/24", "protocol 24 has no ports"},
		{"[2001:db8::1]:80/47", "protocol 47 has no ports"},
		{"2001:db8::1/icmp", "want icmpv6"},
		{"::/0/1", "want icmpv6"},

		{"2001:db8::/32:80", "needs brackets: want [2001:db8::/32]:80"},
		{"2001:db8::/32:80/tcp", "needs brackets: want [2001:db8::/32]:80/tcp"},
		{"::ffff:1.2.3.4/128:80", "needs brackets"},
		{"[2001:db8::1", "closing bracket is missing"},
		{"[", "closing bracket is missing"},
		{"[]", "brackets are for IPv6"},
		{"[1.2.3.4]:80", "brackets are for IPv6: want 1.2.3.4:80"},
		{"[2001:db8::]/32", "belongs inside the brackets"},
		{"[2001:db8::1]/128/tcp", "belongs inside the brackets"},
		{"[2001:db8::1]x", `"x" is left over`},
		{"[2001:db8::1]]:80", `"]:80" is left over`},
		{"[[2001:db8::1]]:80", "want an IPv4 or IPv6 address"},
		{"1.2.3.4\x00", "want an IPv4 or IPv6 address"},
	} {
		r, err := ParseRule(tt.in)
		if err == nil {
			t.Errorf("%q: got %s, want an error", tt.in, r)
			continue
		}
		mentions(t, err, tt.want)
		if r != (Rule{}) {
			t.Errorf("%q: got %+v beside the error", tt.in, r)
		}
	}
}

// mentions fails the test unless err says want.
func mentions(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got error %v, want one that says %s", err, want)
	}
}

func TestRuleValidate(t *testing.T) {
	prefix := netip.MustParsePrefix
	for _, tt := range []struct {
		rule Rule
		want string // "": valid
	}{
		{Rule{}, "want an address"},
		{Rule{Prefix: prefix("10.0.0.0/8")}, ""},
		{Rule{Prefix: prefix("10.0.0.1/8")}, "want 10.0.0.0/8"},
		{Rule{Prefix: prefix("::ffff:1.2.3.4/128"), Port: 80}, "want 1.2.3.4:80"},
		{Rule{Prefix: prefix("64:ff9b::/96")}, ""},
		{Rule{Prefix: prefix("64:ff9b::/95")}, ""},
		{Rule{Prefix: prefix("::/0"), Proto: 58}, ""},
		{Rule{Prefix: prefix("::/0"), Proto: 1}, "want icmpv6"},
		{Rule{Prefix: prefix("::/0"), Port: 80, Proto: 58}, "no ports"},
		{Rule{Prefix: prefix("::/0"), Port: 80}, ""},
	} {
		err := tt.rule.Validate()
		if tt.want != "" {
			mentions(t, err, tt.want)
			if text, err := tt.rule.MarshalText(); err == nil {
				t.Errorf("%+v: marshalled to %s, want an error", tt.rule, text)
			}
		} else if err != nil {
			t.Errorf("%+v: %v", tt.rule, err)
		}
	}
	if s := (Rule{}).String(); s != "invalid rule" {
		t.Errorf("zero rule: got %s", s)
	}
}

func TestRuleJSON(t *testing.T) {
	var rules []Rule
	in := `["[2001:db8::1]:80/tcp","10.0.0.0/8"]`
	if err := json.Unmarshal([]byte(in), &rules); err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(rules)
	if err != nil || string(out) != in {
		t.Errorf("got %s, %v, want %s", out, err, in)
	}
	mentions(t, json.Unmarshal([]byte(`["10.0.0.1/8"]`), &rules), "want 10.0.0.0/8")
}

func TestParsePrefix(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1":            "192.0.2.1/32",
		"192.0.2.0/24":         "192.0.2.0/24",
		"2001:db8::1":          "2001:db8::1/128",
		"::ffff:192.0.2.0/120": "192.0.2.0/24",
		"64:ff9b::192.0.2.1":   "64:ff9b::c000:201/128",
		"::/0":                 "::/0",
	} {
		if p, err := ParsePrefix(in); err != nil || p.String() != want {
			t.Errorf("%s: got %s, %v, want %s", in, p, err, want)
		}
	}
	for in, want := range map[string]string{
		"":                  "want an IPv4 or IPv6 address",
		"192.0.2.1/24":      "want 192.0.2.0/24",
		"192.0.2.1:25":      "want an IPv4 or IPv6 address",
		"192.0.2.0/24/tcp":  `prefix length "24/tcp"`,
		"[2001:db8::1]":     "want an IPv4 or IPv6 address",
		"fe80::1%eth0":      "leave out %eth0",
		"::ffff:10.0.0.0/8": "want 10.0.0.0/8",
	} {
		_, err := ParsePrefix(in)
		mentions(t, err, want)
	}
}

func FuzzParseRule(f *testing.F) {
	for _, s := range []string{
		"1.2.3.4", "10.0.0.0/8:80/tcp", "1.2.3.4/32/47", "[2001:db8::/32]:80/udp", "2001:db8::/32/tcp",
		"::ffff:1.2.3.4/120", "64:ff9b::1.2.3.4", "[::1]/icmpv6", "fe80::1%eth0", "::/0", "[", "]", "1.2.3.4/6",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRule(s)
		if err != nil {
			return
		}
		if err := r.Validate(); err != nil {
			t.Fatalf("%q parses to an invalid rule: %v", s, err)
		}
		again, err := ParseRule(r.String())
		if err != nil || again != r {
			t.Fatalf("%q is %s, which parses to %+v, %v", s, r, again, err)
		}
		if again.String() != r.String() {
			t.Fatalf("%q: %s and %s are one rule", s, r, again)
		}
	})
}
