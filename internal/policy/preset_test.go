package policy

import (
	"slices"
	"strings"
	"testing"
)

func rules(t *testing.T, list ...string) []Rule {
	t.Helper()
	rules := []Rule{}
	for _, s := range list {
		r, err := ParseRule(s)
		if err != nil {
			t.Fatal(err)
		}
		rules = append(rules, r)
	}
	return rules
}

func TestPreset(t *testing.T) {
	const imds = "169.254.169.254"
	tests := map[string][]string{
		"metadata": {imds, "fd00:ec2::254", "168.63.129.16:80/tcp", "168.63.129.16:32526/tcp", "fd20:ce::254",
			"fd00:c1::a9fe:a9fe", "192.0.0.192", "100.100.100.200", "fe80::a9fe:a9fe",
			"169.254.42.42", "fd00:42::42", "fd00:a9fe:a9fe::1"},
		"aws":          {imds, "fd00:ec2::254"},
		"aws-tasks":    {"169.254.170.2", "169.254.170.23", "fd00:ec2::23"},
		"azure":        {imds, "168.63.129.16:80/tcp", "168.63.129.16:32526/tcp"},
		"gcp":          {imds, "fd20:ce::254"},
		"oracle":       {imds, "fd00:c1::a9fe:a9fe", "192.0.0.192"},
		"alibaba":      {"100.100.100.200"},
		"openstack":    {imds, "fe80::a9fe:a9fe"},
		"hetzner":      {imds, "fe80::a9fe:a9fe"},
		"scaleway":     {"169.254.42.42", "fd00:42::42"},
		"linode":       {imds, "fd00:a9fe:a9fe::1"},
		"digitalocean": {imds},
		"vultr":        {imds},
		"exoscale":     {imds},
		"upcloud":      {imds},
		"none":         {},
	}
	for name, want := range tests {
		got, err := Preset(name)
		if err != nil || !slices.Equal(got, rules(t, want...)) {
			t.Errorf("%s: got %v, %v, want %v", name, got, err, want)
		}
	}
	names := PresetNames()
	if len(names) != len(tests) || names[0] != Metadata {
		t.Errorf("got names %v, want the %d of this test, metadata first", names, len(tests))
	}
	for _, name := range names {
		if tests[name] == nil {
			t.Errorf("preset %s is not in this test", name)
		}
	}
}

func TestExceptions(t *testing.T) {
	dnsAndTime := rules(t, "169.254.169.254:53/udp", "169.254.169.254:53/tcp", "169.254.169.254:123/udp")
	for _, name := range append(PresetNames(), "nimbus") {
		var want []Rule
		if name == "gcp" || name == "oracle" || name == "metadata" {
			want = dnsAndTime
		}
		if got := Exceptions(name); !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
}

func TestParsePresets(t *testing.T) {
	for _, tt := range []struct {
		in   []string
		want string
	}{
		{nil, ""},
		{[]string{"metadata"}, "metadata"},
		{[]string{"none"}, "none"},
		{[]string{"none", "none"}, "none"},
		{[]string{"gcp", "aws"}, "gcp aws"},
		{[]string{"gcp,aws", "gcp"}, "gcp aws"},
	} {
		got, err := ParsePresets(tt.in)
		if err != nil || got == nil || strings.Join(got, " ") != tt.want {
			t.Errorf("%q: got %q, %v, want %s", tt.in, got, err, tt.want)
		}
	}
	for _, tt := range []struct {
		in   string
		want string
	}{
		{"", `unknown preset ""; want metadata, aws, aws-tasks, azure,`},
		{"nimbus", `unknown preset "nimbus"; want`},
		{"aws,", `unknown preset ""; want`},
		{"aws, gcp", `unknown preset " gcp" (did you mean "gcp"?)`},
		{"AWS", `did you mean "aws"?`},
		{"digital-ocean", `did you mean "digitalocean"?`},
		{"openstak", `did you mean "openstack"?`},
		{"aws-task", `did you mean "aws-tasks"?`},
		{"azur", `did you mean "azure"?`},
		{"x", `unknown preset "x"; want`},
		{"none,aws", "stands alone"},
		{"metadata,none", "stands alone"},
	} {
		got, err := ParsePresets([]string{tt.in})
		mentions(t, err, tt.want)
		if got != nil {
			t.Errorf("%q: got %q beside the error", tt.in, got)
		}
	}
	_, err := Preset("awss")
	mentions(t, err, `did you mean "aws"?`)
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"abc", "abc", 0},
		{"kitten", "sitting", 3}, {"ab", "ba", 2}, {"azur", "azure", 1},
	} {
		if got := distance(tt.a, tt.b); got != tt.want {
			t.Errorf("%q to %q: got %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}
