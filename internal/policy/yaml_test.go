package policy

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/egressbpf/egressbpf/internal/notify"
)

func TestYAML(t *testing.T) {
	full := Config{
		Cgroups: []string{"/sys/fs/cgroup/docker", `/sys/fs/cgroup/a "b": #c`},
		Policy: Policy{
			Mode: Audit, Presets: []string{"aws", "gcp"},
			Block:    rules(t, "10.0.0.0/8", "[2001:db8::1]:80/tcp", "::/0", "192.0.2.1/32/47"),
			Allow:    rules(t, "169.254.169.254:53/udp"),
			AllowDNS: true,
			SMTP: SMTP{
				Ports: []uint16{25, 2525}, Rate: Rate{120, time.Hour}, Burst: 30, OverLimit: Reject,
				Exempt: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::/32")},
			},
			Families: "packet,vsock", HostSide: Off, HostDevices: []Device{"podman0", "cali*"},
			Scopes: []Scope{"docker-{id}.scope", "/ci/*"},
			Containers: []ContainerRule{
				{Name: "mailer-*", Image: "a:b", SMTP: &Limit{Rate{1, time.Hour}, 2}},
				{Label: `x="y": #z`, Metadata: Allowed},
				{Name: "*", SMTP: &Limit{Burst: 1}, Metadata: Denied},
				{Name: "dhcp", Families: "can,packet"},
			},
		},
	}
	for _, url := range []string{"ntfy://user:p%22ss@ntfy.example/topic", "generic+https://hooks.example/?template=json"} {
		target, err := notify.Parse(url)
		if err != nil {
			t.Fatal(err)
		}
		full.Notify = append(full.Notify, target)
	}
	none := Config{Cgroups: []string{}, Policy: Default()}
	none.Presets, none.SMTP.Rate = []string{None}, Rate{}
	for _, want := range []Config{full, none, {Cgroups: []string{}, Policy: Default()}} {
		before := want.Cgroups
		text := want.YAML(nil)
		got, err := ParseConfig("config.yaml", text)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, %v, want %+v\n%s", got, err, want, text)
		}
		if !reflect.DeepEqual(before, want.Cgroups) {
			t.Error("the config was changed")
		}
	}
}

// A comment stays a comment above its key, whatever is in it.
func TestYAMLComments(t *testing.T) {
	cfg := Config{Cgroups: []string{}, Policy: Default()}
	cfg.Block = rules(t, "10.0.0.1", "10.0.0.2")
	text := string(cfg.YAML(map[string][]string{
		"":            {"head"},
		"block":       {"two\nmode: audit", "\x1b[31m\u2028\u0085\ttab\x00 \xff"},
		"smtp":        {"limit"},
		"smtp.exempt": {"none: []"},
	}))
	got, err := ParseConfig("config.yaml", []byte(text))
	if err != nil || !reflect.DeepEqual(got, cfg) {
		t.Errorf("got %+v, %v, want %+v\n%s", got, err, cfg, text)
	}
	for _, want := range []string{"# head\nmode:", "tab\uFFFD \uFFFD\nblock:\n", "# limit\nsmtp:\n", "  # none: []\n  exempt:"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}
}

// An entry that has a comment is on a line of its own, below the comment.
func TestYAMLEntryComments(t *testing.T) {
	cfg := Config{Cgroups: []string{}, Policy: Default()}
	cfg.Allow = rules(t, "169.254.169.254:53/udp")
	cfg.SMTP.Exempt = []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::/32")}
	cfg.Containers = []ContainerRule{{Name: "web", Metadata: Allowed}, {Name: "mailer-*", SMTP: &Limit{Rate{1, time.Hour}, 2}}}
	text := string(cfg.YAML(map[string][]string{
		"allow[0]":       {"dns"},
		"smtp.exempt[1]": {"relay\n  - 10.0.0.0/8"},
		"containers[0]":  {"credentials"},
		"containers[1]":  {"newsletters", "twice"},
	}))
	got, err := ParseConfig("config.yaml", []byte(text))
	if err != nil || !reflect.DeepEqual(got, cfg) {
		t.Errorf("got %+v, %v, want %+v\n%s", got, err, cfg, text)
	}
	for _, want := range []string{
		"\nallow:\n  # dns\n  - \"169.254.169.254:53/udp\"\n",
		"  exempt:\n    - \"192.0.2.1\"\n    # relay\uFFFD  - 10.0.0.0/8\n    - \"2001:db8::/32\"\n",
		"\ncontainers:\n  # credentials\n  - name: \"web\"\n",
		"  # newsletters\n  # twice\n  - name: \"mailer-*\"\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}
}
