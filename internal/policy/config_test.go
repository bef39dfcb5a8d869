package policy

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParseConfig(t *testing.T) {
	full := Config{
		Cgroups: []string{"/sys/fs/cgroup/docker", "/sys/fs/cgroup/system.slice"},
		Policy: Policy{
			Mode: Audit, Presets: []string{"aws", "gcp"},
			Block:    rules(t, "10.0.0.0/8", "[2001:db8::1]:80/tcp"),
			Allow:    rules(t, "169.254.169.254:53/udp"),
			AllowDNS: true,
			SMTP: SMTP{
				Ports: []uint16{25, 2525}, Rate: Rate{120, time.Hour}, Burst: 30, OverLimit: Reject,
				Exempt: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::/32")},
			},
			Families: "packet,vsock", HostSide: Off, HostDevices: []Device{"podman0", "cali*"},
			Scopes: []Scope{"docker-{id}.scope", "/ci/*"},
		},
	}
	with := func(change func(*Config)) Config {
		cfg := Config{Cgroups: []string{}, Policy: Default()}
		change(&cfg)
		return cfg
	}
	defaults := with(func(*Config) {})
	for _, tt := range []struct {
		name, in string
		want     Config
	}{
		{"empty", "", defaults},
		{"comments", "# nothing\n\n# here\n", defaults},
		{"empty document", "---\n", defaults},
		{"null", "null\n", defaults},
		{"end marker", "mode: enforce\n...\n", defaults},
		{"no keys", "{}\n", defaults},
		{"all keys", `---
mode: audit
cgroups:
  - /sys/fs/cgroup/docker/
  - "/sys/fs/cgroup/system.slice"
  - /sys/fs/cgroup//docker
presets: [aws, gcp, aws]
block:
  - 10.0.0.0/8        # a comment
  - "[::ffff:10.0.0.0/104]"
  - '[2001:db8::1]:80/tcp'
allow: ["169.254.169.254:53/udp"]
allow_dns: true
smtp:
  ports: [2525, 25, 25]
  rate: 120/hour
  burst: 30
  over_limit: reject
  exempt:
    - 192.0.2.1
    - ::ffff:192.0.2.1
    - 2001:db8::/32
socket_families: vsock, packet,vsock
host_side: off
host_devices: [podman0, "cali*", podman0]
scopes: ["docker-{id}.scope", /ci/*]
`, full},
		{"order does not matter", "smtp: {burst: 7}\nmode: audit\n", with(func(c *Config) { c.Mode = Audit; c.SMTP.Burst = 7 })},
		{"JSON is YAML", `{"smtp":{"rate":"1/day","burst":36500}}`, with(func(c *Config) { c.SMTP.Rate, c.SMTP.Burst = Rate{1, 24 * time.Hour}, 36500 })},
		{"CRLF", "mode: audit\r\nallow_dns: false\r\n", with(func(c *Config) { c.Mode = Audit })},
		{"BOM", "\ufeffmode: audit\n", with(func(c *Config) { c.Mode = Audit })},
		{"empty lists", "cgroups: []\npresets: []\nblock: []\nallow: []\nsmtp: {exempt: []}\n", with(func(c *Config) { c.Presets = []string{} })},
		{"none", "presets: [none]\n", with(func(c *Config) { c.Presets = []string{"none"} })},
		{"smtp commented out", "smtp:\n#  burst: 7\n", defaults},
		{"unlimited", "smtp: {rate: unlimited, burst: 1000000}\n", with(func(c *Config) { c.SMTP.Rate, c.SMTP.Burst = Rate{}, 1_000_000 })},
		{"anchors", "block: &x [10.0.0.0/8]\nallow: *x\n", with(func(c *Config) { c.Block = rules(t, "10.0.0.0/8"); c.Allow = c.Block })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseConfig("config.yaml", []byte(tt.in))
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Fatalf("got %+v, %v, want %+v", got, err, tt.want)
			}
			if err := got.Validate(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestParseConfigRefused(t *testing.T) {
	long, entries := strings.Repeat("# long\n", 1000), strings.Repeat("  - 10.0.0.0/8\n", 1000)
	for _, tt := range []struct{ in, want string }{
		// Values, with the line of each.
		{"mode: off\n", `1: mode: "off": want enforce or audit`},
		{"mode: [enforce]\n", "1: mode: want a single value"},
		{"mode:\n", "1: mode: want a value"},
		{"mode: ~\n", "1: mode: want a value"},
		{"mode: ''\n", `1: mode: "": want enforce or audit`},
		{"# c\n\nsmtp:\n  burst: 5\n  # c\n\n  rate: 5 per minute\n", `7: smtp.rate: "5 per minute": want N/second, N/minute, N/hour, N/day or unlimited`},
		{"smtp:\n  rate: 0/minute\n", `2: smtp.rate: "0/minute": a rate is at least 1; to stop all mail`},
		{"smtp:\n  rate: 5\n", `2: smtp.rate: "5": want N/second`},
		{"smtp:\n  burst: 0\n", `2: smtp.burst: "0": want a number from 1 to 1000000`},
		{"smtp:\n  burst: 1000001\n", `2: smtp.burst: "1000001": want a number from 1 to 1000000`},
		{"smtp:\n  burst: 0x10\n", "2: smtp.burst: "},
		{"smtp:\n  burst: 1_0\n", "2: smtp.burst: "},
		{"smtp:\n  burst: 010\n", "2: smtp.burst: "},
		{"smtp:\n  burst: 5.0\n", "2: smtp.burst: "},
		{"smtp:\n  burst: -5\n", "2: smtp.burst: "},
		{"smtp:\n  burst: 36501\n  ports: [25]\n  rate: 1/day\n", "2: smtp.burst: 36501 takes more than 100 years to refill at 1/day: want at most 36500"},
		{"smtp:\n  over_limit: Drop\n", `2: smtp.over_limit: "Drop": want drop or reject`},
		{"smtp:\n  ports: []\n", "2: smtp.ports: want at least one port"},
		{"smtp:\n  ports: 25\n", "2: smtp.ports: want a list"},
		{"smtp:\n  ports:\n", "2: smtp.ports: want a list: [] for an empty one"},
		{"smtp:\n  ports:\n  - 25\n  - 0\n", `4: smtp.ports: port "0": want 1 to 65535`},
		{"smtp:\n  ports: [25,\n  465,\n  65536]\n", `4: smtp.ports: port "65536"`},
		{"smtp:\n  exempt:\n  - 192.0.2.0/24\n  - 192.0.2.1/24\n", `4: smtp.exempt: "192.0.2.1/24": host bits are set: want 192.0.2.0/24`},
		{"smtp:\n  exempt: [192.0.2.1:25]\n", "2: smtp.exempt: "},
		{"smtp: 5/minute\n", "1: smtp: want keys and values: ports, rate, burst, over_limit, exempt"},
		{"smtp: []\n", "1: smtp: want keys and values"},
		{"presets:\n- aws\n- azur\n", `3: presets: unknown preset "azur" (did you mean "azure"?); want metadata, aws,`},
		{"presets: metadata\n", "1: presets: want a list"},
		{"presets: ['aws,gcp']\n", "1: presets: unknown preset"},
		{"presets:\n", "1: presets: want a list"},
		{"mode: audit\npresets: [none, aws]\n", `2: presets: preset "none" blocks nothing and stands alone`},
		{"block:\n- 10.0.0.0/8\n-\n", "3: block: want a value"},
		{"block:\n\n  - 10.0.0.1/8\n", `3: block: "10.0.0.1/8": host bits are set: want 10.0.0.0/8`},
		{"block:\n- [2001:db8::1]\n", "2: block: want a single value; put quotes around one with brackets or colons"},
		{"allow:\n- 2001:db8::\n", "2: allow: want a single value; put quotes"},
		{"allow: [10]\n", `1: allow: "10": want an IPv4 or IPv6 address`},
		{"allow_dns: yes\n", `1: allow_dns: "yes": want true or false`},
		{"allow_dns: True\n", `1: allow_dns: "True": want true or false`},
		{"allow_dns: 1\n", "1: allow_dns: "},
		{"cgroups: [docker]\n", `1: cgroups: "docker": want an absolute path such as /sys/fs/cgroup/docker`},
		{"cgroups: ['']\n", "1: cgroups: "},
		{"cgroups: [\"/a\\0\"]\n", "1: cgroups: "},
		{"cgroups: /docker\n", "1: cgroups: want a list"},
		{"block: &x [10.0.0.0/8,\n  10.0.0.1/8]\nallow: *x\n", "2: block: "},

		// Keys.
		{"mode: enforce\nmodes: audit\n", `2: modes: unknown key (did you mean "mode"?); want mode, cgroups, presets, block, allow, allow_dns, socket_families, host_side, host_devices, scopes, smtp, notify, containers`},
		{"socket_families: restrict,vsock\n", `1: socket_families: "restrict": no such family`},
		{"socket_families: vsok\n", `1: socket_families: "vsok": no such family (did you mean "vsock"?)`},
		{"socket_families: ''\n", `1: socket_families: "": no such family`},
		{"host_side: no\n", `1: host_side: "no": want on or off`},
		{"host_devices: [br0, '*']\n", `1: host_devices: "*": want the name of a network device`},
		{"host_devices: [a-name-of-16-bytes]\n", `1: host_devices: "a-name-of-16-bytes": want`},
		{"Mode: audit\n", `1: Mode: unknown key (did you mean "mode"?)`},
		{"policy: {mode: audit}\n", "1: policy: unknown key"},
		{"smtp:\n  burts: 5\n", `2: smtp.burts: unknown key (did you mean "burst"?); want ports, rate, burst, over_limit, exempt`},
		{"mode: audit\n\nmode: audit\n", "3: mode: already set on line 1"},
		{"smtp:\n  burst: 5\n  burst: 6\n", "3: smtp.burst: already set on line 2"},
		{"smtp: {burst: 5}\nsmtp: {rate: 5/day}\n", "2: smtp: already set on line 1"},
		{"? [mode]\n: audit\n", "1: want one of the keys mode,"},
		{"<<: {mode: audit}\n", "1: <<: unknown key"},

		// Documents.
		{"- mode: audit\n", "1: want keys and values: mode,"},
		{"\nenforce\n", "2: want keys and values"},
		{"mode: audit\n---\nmode: enforce\n", "2: a second document begins here: want one"},
		{"mode: audit\n---\n", "2: a second document"},
		{"mode: !!str audit\n", "1: mode: the tag !!str has no meaning here"},
		{"block: !include\n- 10.0.0.0/8\n", "1: block: the tag !include has no meaning here"},

		// Not YAML.
		{"mode: audit: now\n", "1: not YAML: mapping values are not allowed"},
		{"# c\nmode: audit\nsmtp:\n  rate: 5/minute\n burst: 5\n", "5: not YAML: did not find expected key"},
		{"mode: audit\nsmtp:\n\tburst: 5\n", "3: not YAML: found character that cannot start any token"},
		{"mode: audit\nblock: [10.0.0.0/8,\nallow: []\n", "2: not YAML: "},
		{"mode: audit\n\nblock: [\"10.0.0.0/8]\n", "3: not YAML: "},
		{"mode: audit\nallow: *x\n", "2: not YAML: unknown anchor"},
		{"mode: audit\nallow: [\x01]\n", "2: not YAML: control characters"},
		{"mode: audit\nallow: [\xff]\n", "2: not YAML: "},
		{"mode: audit\n---\nsmtp: [\n", "3: not YAML: "},
		{"[", "1: not YAML: "},
		{"\x00", "1: not YAML: "},
		{"mode: audit\nsmtp: {rate: 1/day", "2: not YAML: "},

		// Not YAML, and long: the mistake is far from both ends of the file, or from the
		// place where it shows.
		{long + "mode: a: b\n" + long, "1001: not YAML: "},
		{"block:\n" + entries + " - 10.0.0.0/8\n" + entries, "1002: not YAML: "},
		{long + "block: [\n" + entries, "1001: not YAML: "},
		{long + "block: [10.0.0.0/8,\n" + strings.Repeat("10.0.0.0/8,\n", 1000), "1001: not YAML: "},
		{long + "block: [\"10.0.0.0/8,\n" + strings.Repeat("10.0.0.0/8,\n", 1000), "1001: not YAML: "},
		{"block: [\n" + strings.Repeat("10.0.0.0/8,\n", 1000), "1: not YAML: "},
	} {
		cfg, err := ParseConfig("config.yaml", []byte(tt.in))
		if err == nil {
			t.Errorf("%q: got %+v, want an error", tt.in, cfg)
			continue
		}
		if !strings.HasPrefix(err.Error(), "config.yaml:"+tt.want) {
			t.Errorf("%.60q:\n got %v\nwant config.yaml:%s…", tt.in, err, tt.want)
		}
		if !reflect.DeepEqual(cfg, Config{}) {
			t.Errorf("%q: got %+v beside the error", tt.in, cfg)
		}
	}
}

// A cycle of aliases, or a bomb of them, costs no more than its text.
func TestParseConfigAliases(t *testing.T) {
	for _, in := range []string{
		"block: &x [*x]\n",
		"smtp: &x {smtp: *x}\n",
		"&x mode: *x\n",
	} {
		if cfg, err := ParseConfig("c", []byte(in)); err == nil {
			t.Errorf("%q: got %+v, want an error", in, cfg)
		}
	}
	bomb := "block: &a0 [10.0.0.0/8]\n"
	for i := range 40 {
		bomb += fmt.Sprintf("x%d: &a%d [*a%d, *a%d]\n", i, i+1, i, i)
	}
	if _, err := ParseConfig("c", []byte(bomb)); err == nil {
		t.Error("want an error")
	}
}

func FuzzParseConfig(f *testing.F) {
	for _, s := range []string{
		"",
		"mode: audit\ncgroups: [/a]\npresets: [aws]\nblock: [10.0.0.0/8]\nallow: ['[::1]:80/tcp']\nallow_dns: true\n",
		"smtp:\n  ports: [25]\n  rate: 1/day\n  burst: 36501\n  over_limit: reject\n  exempt: [192.0.2.1]\n",
		"smtp: {rate: unlimited}\n---\n", "a: &x [*x]\n", "<<: {}\n", "? []\n: !t x\n", "smtp:\n burst: 1\nburst: [",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := ParseConfig("c", data)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "c:") {
				t.Fatalf("the error has no place: %v", err)
			}
			return
		}
		if err := cfg.Validate(); err != nil {
			t.Fatalf("accepted, but not valid: %v", err)
		}
		cfg.Blocked()
		cfg.Allowed()
	})
}

// The example file has the defaults.
func TestExampleConfig(t *testing.T) {
	const path = "../../dist/config.yaml"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseConfig(path, text)
	want := Config{Cgroups: []string{}, Policy: Default()}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	// What is commented out must be valid too.
	uncommented := strings.NewReplacer("\n#containers:", "\ncontainers:", "\n#  ", "\n  ").Replace(string(text))
	if got, err := ParseConfig(path, []byte(uncommented)); err != nil || len(got.Containers) != 4 {
		t.Errorf("got %+v, %v, want four rules", got.Containers, err)
	}
}

// The targets of notifications are not part of the policy, which is kept where many can read
// it, and no error shows their secrets.
func TestNotify(t *testing.T) {
	const secret = "S3cretS3cret"
	cfg, err := ParseConfig("config.yaml", []byte("notify:\n- ntfy://:"+secret+"@ntfy.example/topic\n- ntfy://:"+secret+"@ntfy.example/topic\n"))
	if err != nil || len(cfg.Notify) != 1 || cfg.Notify[0].String() != "ntfy://ntfy.example" {
		t.Fatalf("got %v, %v", cfg.Notify, err)
	}
	whole, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprintf("%s %+v %#v", whole, cfg, cfg.Policy); strings.Contains(text, secret) {
		t.Errorf("the secret is in %s", text)
	}
	for _, tt := range []struct{ in, want string }{
		{"notify: ntfy://ntfy.example/" + secret, "1: notify: want a list"},
		{"notify:\n- ntfy://ntfy.example/topic\n- slakc://" + secret + "\n", `3: notify: unknown service "slakc": want `},
		{"notify:\n- [ntfy, " + secret + "]\n", "2: notify: want a single value"},
		{"notify:\n- ntfy://:" + secret + "@ntfy.example/topic?prio=1\n", "2: notify: ntfy: "},
		{"notify: [ntfy://:" + secret + "@ntfy.example/topic", "1: not YAML"},
	} {
		_, err := ParseConfig("config.yaml", []byte(tt.in))
		if err == nil || !strings.HasPrefix(err.Error(), "config.yaml:"+tt.want) || strings.Contains(err.Error(), secret) {
			t.Errorf("%q:\n got %v\nwant config.yaml:%s…", tt.in, err, tt.want)
		}
	}
}
