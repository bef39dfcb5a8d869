package policy

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

func TestDefault(t *testing.T) {
	p := Default()
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	want := Policy{
		Mode: "enforce", Presets: []string{"metadata"}, Block: []Rule{}, Allow: []Rule{},
		SMTP: SMTP{
			Ports: []uint16{25, 465, 587}, Rate: Rate{5, time.Minute}, Burst: 5,
			OverLimit: "drop", Exempt: []netip.Prefix{},
		},
		Families: "restrict", HostSide: "on", HostDevices: []Device{},
		Scopes: []Scope{
			"docker-{id}.scope", "{id}", "{build}", "libpod-{id}.scope", "libpod-{id}", "libpod-payload-{id}",
			"buildah-*", "crun-buildah-*", "runc-buildah-*",
			"cri-containerd-{id}.scope", "nerdctl-{id}.scope", "/default/*", "crio-{id}.scope", "crio-{id}",
		},
	}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("got %+v, want %+v", p, want)
	}
	if got, want := p.SMTP.Limit(), (Limit{Rate{5, time.Minute}, 5}); got != want {
		t.Errorf("limit: got %+v, want %+v", got, want)
	}
	p.Presets[0], p.SMTP.Ports[0] = "aws", 1
	if !reflect.DeepEqual(Default(), want) {
		t.Error("two defaults share memory")
	}
}

func TestMarshal(t *testing.T) {
	p := Default()
	p.Block = rules(t, "[2001:db8::1]:80/tcp", "10.0.0.0/8")
	p.Allow = rules(t, "10.0.0.1:53/udp")
	p.AllowDNS = true
	p.Mode = Audit
	p.Families, p.HostSide, p.HostDevices = "packet,vsock", Off, []Device{"podman0", "cali*"}
	p.Scopes = []Scope{"docker-{id}.scope", "/ci/*"}
	p.SMTP.OverLimit = Reject
	p.SMTP.Exempt = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	cfg := Config{Cgroups: []string{"/sys/fs/cgroup/docker"}, Policy: p}

	const want = `{"cgroups":["/sys/fs/cgroup/docker"],"mode":"audit","presets":["metadata"],` +
		`"block":["[2001:db8::1]:80/tcp","10.0.0.0/8"],"allow":["10.0.0.1:53/udp"],"allow_dns":true,` +
		`"smtp":{"ports":[25,465,587],"rate":"5/minute","burst":5,"over_limit":"reject","exempt":["192.0.2.0/24"]},` +
		`"socket_families":"packet,vsock","host_side":"off","host_devices":["podman0","cali*"],"scopes":["docker-{id}.scope","/ci/*"]}`
	text, err := json.Marshal(cfg)
	if err != nil || string(text) != want {
		t.Errorf("JSON: got %s, %v, want %s", text, err, want)
	}
	var fromJSON Config
	if err := json.Unmarshal(text, &fromJSON); err != nil || !reflect.DeepEqual(fromJSON, cfg) {
		t.Errorf("JSON: got %+v, %v, want %+v", fromJSON, err, cfg)
	}

	text, err = yaml.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var fromYAML Config
	if err := yaml.Unmarshal(text, &fromYAML); err != nil || !reflect.DeepEqual(fromYAML, cfg) {
		t.Errorf("YAML: got %+v, %v, want %+v", fromYAML, err, cfg)
	}
	if parsed, err := ParseConfig("c", text); err != nil || !reflect.DeepEqual(parsed, cfg) {
		t.Errorf("config: got %+v, %v, want %+v", parsed, err, cfg)
	}

	for _, text := range []string{
		`{"mode":"off"}`, `{"mode":""}`, `{"block":["x"]}`,
		`{"smtp":{"over_limit":"pace"}}`, `{"smtp":{"rate":"5"}}`, `{"smtp":{"exempt":["x"]}}`,
	} {
		if err := json.Unmarshal([]byte(text), new(Policy)); err == nil {
			t.Errorf("JSON %s: want an error", text)
		}
		if err := yaml.Unmarshal([]byte(text), new(Policy)); err == nil {
			t.Errorf("YAML %s: want an error", text)
		}
	}
}

func TestValidate(t *testing.T) {
	for _, tt := range []struct {
		change func(*Policy)
		want   string // "": valid
	}{
		{func(p *Policy) { *p = Policy{} }, `mode: "": want enforce or audit`},
		{func(p *Policy) { p.Mode = "ENFORCE" }, `mode: "ENFORCE": want enforce or audit`},
		{func(p *Policy) { p.Mode = Audit }, ""},
		{func(p *Policy) { p.Presets = nil }, ""},
		{func(p *Policy) { p.Presets = []string{None} }, ""},
		{func(p *Policy) { p.Presets = []string{None, "aws"} }, "presets: "},
		{func(p *Policy) { p.Presets = []string{"nimbus"} }, `presets: unknown preset "nimbus"`},
		{func(p *Policy) { p.Block = []Rule{{}} }, "block: invalid rule: "},
		{func(p *Policy) { p.Allow = []Rule{{Prefix: netip.MustParsePrefix("10.0.0.1/8")}} }, "allow: 10.0.0.1/8: host bits"},
		{func(p *Policy) { p.SMTP.Ports = nil }, "smtp.ports: want at least one port"},
		{func(p *Policy) { p.SMTP.Ports = []uint16{25, 0} }, "smtp.ports: port 0"},
		{func(p *Policy) { p.SMTP.Ports = []uint16{65535, 1, 1} }, ""},
		{func(p *Policy) { p.SMTP.Ports = slices.Repeat([]uint16{25}, 65535) }, ""},
		{func(p *Policy) { p.SMTP.Ports = slices.Repeat([]uint16{25}, 65536) }, "smtp.ports: 65536 ports: want at most 65535"},
		{func(p *Policy) { p.SMTP.Rate.Count = 0 }, "smtp.rate: a rate is at least 1"},
		{func(p *Policy) { p.SMTP.Rate = Rate{} }, ""},
		{func(p *Policy) { p.SMTP.Burst = 0 }, "smtp.burst: 0: want 1 to 1000000"},
		{func(p *Policy) { p.SMTP.OverLimit = "" }, `smtp.over_limit: "": want drop or reject`},
		{func(p *Policy) { p.SMTP.Exempt = []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")} }, "smtp.exempt: 10.0.0.1/8: host bits are set: want 10.0.0.0/8"},
		{func(p *Policy) { p.SMTP.Exempt = []netip.Prefix{{}} }, "smtp.exempt: "},
	} {
		p := Default()
		tt.change(&p)
		err := p.Validate()
		if tt.want == "" && err != nil {
			t.Error(err)
		} else if tt.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.want)) {
			t.Errorf("got error %v, want %s…", err, tt.want)
		}
	}
}

func TestParsePorts(t *testing.T) {
	got, err := ParsePorts([]string{"587", "25", "65535", "25", "1"})
	if want := []uint16{1, 25, 587, 65535}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	for _, list := range [][]string{nil, {"0"}, {"65536"}, {""}, {"25", "smtp"}, {"025"}, {" 25"}} {
		if got, err := ParsePorts(list); err == nil {
			t.Errorf("%q: got %v, want an error", list, got)
		}
	}
}

func TestBlockedAndAllowed(t *testing.T) {
	p := Default()
	p.Presets = []string{"gcp", "azure", None, "nimbus"}
	p.Block = rules(t, "10.0.0.0/8:80/tcp", "169.254.169.254", "10.0.0.0/8:80/tcp")
	p.Allow = rules(t, "10.0.0.1", "10.0.0.1")
	want := rules(t, "169.254.169.254", "fd20:ce::254", "168.63.129.16:80/tcp", "168.63.129.16:32526/tcp", "10.0.0.0/8:80/tcp")
	if got := p.Blocked(); !slices.Equal(got, want) {
		t.Errorf("blocked: got %v, want %v", got, want)
	}
	if got, want := p.Allowed(), rules(t, "10.0.0.1"); !slices.Equal(got, want) {
		t.Errorf("allowed: got %v, want %v", got, want)
	}
	p.AllowDNS = true
	want = rules(t, "10.0.0.1",
		"169.254.169.254:53/udp", "169.254.169.254:53/tcp", "[fd20:ce::254]:53/udp", "[fd20:ce::254]:53/tcp",
		"168.63.129.16:53/udp", "168.63.129.16:53/tcp", "10.0.0.0/8:53/udp", "10.0.0.0/8:53/tcp")
	if got := p.Allowed(); !slices.Equal(got, want) {
		t.Errorf("allowed: got %v, want %v", got, want)
	}
	if len(p.Allow) != 2 || len(p.Block) != 3 {
		t.Error("the policy was changed")
	}
}

func TestBlocks(t *testing.T) {
	const tcp, udp, icmp, icmpv6 = 6, 17, 1, 58
	p := Default()
	p.Block = rules(t, "10.0.0.0/8", "192.0.2.0/24:80/tcp", "192.0.2.0/24/sctp", "198.51.100.1:443", "2001:db8::/32")
	p.Allow = rules(t, "10.1.0.0/16", "10.2.0.0/16:53/udp", "169.254.169.254:123/udp")
	for _, tt := range []struct {
		dst   string
		proto uint8
		port  uint16
		want  bool
	}{
		{"169.254.169.254", tcp, 80, true},
		{"169.254.169.254", udp, 53, true},
		{"169.254.169.254", udp, 123, false},
		{"169.254.169.254", udp, 0, true}, // the exception's port is not known to match
		{"169.254.169.254", tcp, 123, true},
		{"169.254.169.254", icmp, 0, true},
		{"169.254.169.253", udp, 53, false},
		{"169.254.169.255", tcp, 80, false},
		{"168.63.129.16", tcp, 80, true},
		{"168.63.129.16", tcp, 32526, true},
		{"168.63.129.16", tcp, 32525, false},
		{"168.63.129.16", udp, 80, false},
		{"168.63.129.16", udp, 53, false},
		{"fd00:ec2::254", tcp, 80, true},
		{"fd00:ec2::253", udp, 53, false},
		{"fe80::a9fe:a9fe", tcp, 80, true},
		{"fe80::a9fe:a9fe%eth0", tcp, 80, true},

		// Spellings.
		{"::ffff:169.254.169.254", tcp, 80, true},
		{"::ffff:169.254.169.254", udp, 123, false},
		{"::ffff:169.254.169.254%eth0", tcp, 80, true},
		{"64:ff9b::169.254.169.254", tcp, 80, true},
		{"64:ff9b::169.254.169.254", udp, 123, false},
		{"64:ff9b::169.254.169.254", icmpv6, 0, true},
		{"64:ff9b::8.8.8.8", tcp, 80, false},

		{"9.255.255.255", tcp, 80, false},
		{"10.0.0.0", tcp, 80, true},
		{"10.255.255.255", tcp, 80, true},
		{"11.0.0.0", tcp, 80, false},
		{"10.0.255.255", tcp, 80, true},
		{"10.1.0.0", tcp, 80, false},
		{"10.1.255.255", icmp, 0, false},
		{"10.2.0.1", udp, 53, false},
		{"10.2.0.1", udp, 54, true},
		{"10.2.0.1", tcp, 53, true},

		{"192.0.2.7", tcp, 80, true},
		{"192.0.2.7", tcp, 81, false},
		{"192.0.2.7", tcp, 0, false},
		{"192.0.2.7", udp, 80, false},
		{"192.0.2.7", 132, 80, true},
		{"192.0.2.7", 132, 0, true},
		{"198.51.100.1", tcp, 443, true},
		{"198.51.100.1", udp, 443, true},
		{"198.51.100.1", icmp, 443, false}, // ICMP has no ports, whatever the caller found there
		{"198.51.100.1", 47, 443, false},
		{"198.51.100.1", tcp, 0, false},
		{"2001:db8:ffff::1", icmpv6, 0, true},
		{"2001:db9::", icmpv6, 0, false},
	} {
		if got := p.Blocks(netip.MustParseAddr(tt.dst), tt.proto, tt.port); got != tt.want {
			t.Errorf("%s protocol %d port %d: got %v, want %v", tt.dst, tt.proto, tt.port, got, tt.want)
		}
	}
	if p.Blocks(netip.Addr{}, tcp, 80) {
		t.Error("the zero address is blocked")
	}

	for spelling, want := range map[string]bool{
		"::ffff:169.254.169.254": true, "64:ff9b::a9fe:a9fe": true, "::169.254.169.254": true, "2002:a9fe:a9fe::1": true,
		"64:ff9b:1::a9fe:a9fe": true, "64:ff9b:1:0:a9:fea9:fe00:0": true, "64:ff9b:1:a9:fe:a9fe::": true, "64:ff9b:1:a9fe:a9:fe00::": true,
		"64:ff9b::a9fe:a9fd": false, "::169.254.169.253": false, "2002:a9fe:a9fd::1": false, "64:ff9b:1::a9fe:a9fd": false, "::1": false, "::": false,
	} {
		if got := Default().Blocks(netip.MustParseAddr(spelling), tcp, 80); got != want {
			t.Errorf("%s: got %v, want %v", spelling, got, want)
		}
	}

	p = Default()
	p.AllowDNS = true
	for _, tt := range []struct {
		dst   string
		proto uint8
		port  uint16
		want  bool
	}{
		{"169.254.169.254", udp, 53, false},
		{"169.254.169.254", tcp, 53, false},
		{"169.254.169.254", tcp, 80, true},
		{"169.254.169.254", 132, 53, true},
		{"fd20:ce::254", udp, 53, false},
		{"fd20:ce::254", udp, 54, true},
	} {
		if got := p.Blocks(netip.MustParseAddr(tt.dst), tt.proto, tt.port); got != tt.want {
			t.Errorf("with allow_dns, %s protocol %d port %d: got %v, want %v", tt.dst, tt.proto, tt.port, got, tt.want)
		}
	}

	// ::/0 does not hold for IPv4 in IPv6 spelling, and 0.0.0.0/0 does. Both hold for NAT64.
	for rule, want := range map[string]bool{"::/0": false, "0.0.0.0/0": true} {
		p := Policy{Block: rules(t, rule)}
		if !p.Blocks(netip.MustParseAddr("64:ff9b::1.2.3.4"), tcp, 80) {
			t.Errorf("64:ff9b::1.2.3.4 under %s: not blocked", rule)
		}
		for _, dst := range []string{"::ffff:1.2.3.4", "1.2.3.4"} {
			if got := p.Blocks(netip.MustParseAddr(dst), tcp, 80); got != want {
				t.Errorf("%s under %s: got %v, want %v", dst, rule, got, want)
			}
		}
		if got := p.Blocks(netip.MustParseAddr("2001:db8::1"), tcp, 80); got == want {
			t.Errorf("2001:db8::1 under %s: got %v", rule, got)
		}
	}
}

func TestOpens(t *testing.T) {
	for allow, want := range map[string]string{
		"128.0.0.0/1":             "169.254.169.254",
		"169.254.0.0/16":          "169.254.169.254",
		"169.254.169.254":         "169.254.169.254",
		"::/0":                    "fd00:ec2::254",
		"169.254.0.0/16:80/tcp":   "169.254.169.254",
		"169.254.169.254:80/tcp":  "", // somebody means it
		"169.254.169.254:53/udp":  "",
		"169.254.0.0/16:53":       "",
		"10.0.0.0/8":              "",
		"[fd00:ec2::254]:443/tcp": "",
	} {
		p := Default()
		rule, err := ParseRule(allow)
		if err != nil {
			t.Fatal(err)
		}
		p.Allow = []Rule{rule}
		opened, ok := p.Opens()[rule]
		if ok != (want != "") || ok && !opened.Prefix.Contains(netip.MustParseAddr(want)) && !rule.Prefix.Contains(opened.Prefix.Addr()) {
			t.Errorf("%s: opens %v, %v, want %q", allow, opened, ok, want)
		}
	}
}
