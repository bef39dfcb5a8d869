package policy

import (
	"fmt"
	"slices"
	"strings"
)

const (
	// Metadata is the default preset: what every other preset blocks, except the opt-in
	// ones.
	Metadata = "metadata"
	// None is the preset that blocks nothing. It cannot be combined with others.
	None = "none"
)

// preset holds the credential endpoints of one cloud. They are single addresses, not
// networks, since neighbouring addresses serve something else: AWS's DNS at
// 169.254.169.253 and NTP at .123, Oracle's iSCSI at 169.254.0.2 and 169.254.2.0/24.
type preset struct {
	name       string
	optIn      bool // not part of Metadata
	rules      []string
	exceptions []string // what containers on that cloud usually need of rules
}

var presets = []preset{
	{
		// Amazon EC2 User Guide, instance metadata: the IPv4 and the IPv6
		// endpoint of the Instance Metadata Service.
		name:  "aws",
		rules: []string{"169.254.169.254", "fd00:ec2::254"},
	},
	{
		// Amazon ECS Developer Guide, task metadata endpoint and task IAM
		// role: 169.254.170.2. Amazon EKS User Guide, EKS Pod Identity:
		// 169.254.170.23 and fd00:ec2::23. They serve the container its own
		// role, not the host's, so blocking them is a decision.
		name:  "aws-tasks",
		optIn: true,
		rules: []string{"169.254.170.2", "169.254.170.23", "fd00:ec2::23"},
	},
	{
		// Microsoft Azure documentation, Azure Instance Metadata Service:
		// 169.254.169.254; What is IP address 168.63.129.16: the WireServer
		// on TCP 80 and 32526. The rest of that address is DNS and the
		// source of load-balancer probes, and stays open.
		name:  "azure",
		rules: []string{"169.254.169.254", "168.63.129.16:80/tcp", "168.63.129.16:32526/tcp"},
	},
	{
		// Google Compute Engine documentation, VM metadata: the IPv4 and the
		// IPv6 address of metadata.google.internal. The same IPv4 address is
		// the VM's DNS and NTP server.
		name:       "gcp",
		rules:      []string{"169.254.169.254", "fd20:ce::254"},
		exceptions: []string{"169.254.169.254:53/udp", "169.254.169.254:53/tcp", "169.254.169.254:123/udp"},
	},
	{
		// Oracle Cloud Infrastructure documentation, Getting Instance
		// Metadata; the IPv6 address is from cloud-init's Oracle datasource,
		// and 192.0.0.192 is the endpoint of Compute Classic. 169.254.169.254
		// is the VCN resolver and the NTP server too.
		name:       "oracle",
		rules:      []string{"169.254.169.254", "fd00:c1::a9fe:a9fe", "192.0.0.192"},
		exceptions: []string{"169.254.169.254:53/udp", "169.254.169.254:53/tcp", "169.254.169.254:123/udp"},
	},
	{
		// Alibaba Cloud ECS documentation, instance metadata. The address
		// only: its neighbours in 100.100.0.0/16 are DNS, NTP and mirrors.
		name:  "alibaba",
		rules: []string{"100.100.100.200"},
	},
	{
		// OpenStack documentation, Nova's metadata service; the IPv6
		// link-local address is from the release notes of Neutron.
		name:  "openstack",
		rules: []string{"169.254.169.254", "fe80::a9fe:a9fe"},
	},
	{
		// Hetzner Cloud API documentation, server metadata: 169.254.169.254.
		// It does not name the link-local address; that one is OpenStack's,
		// for servers without IPv4.
		name:  "hetzner",
		rules: []string{"169.254.169.254", "fe80::a9fe:a9fe"},
	},
	{
		// Scaleway Instances documentation; cloud-init documentation, Scaleway
		// datasource, for both addresses.
		name:  "scaleway",
		rules: []string{"169.254.42.42", "fd00:42::42"},
	},
	{
		// Akamai (Linode) Compute documentation, Metadata Service.
		name:  "linode",
		rules: []string{"169.254.169.254", "fd00:a9fe:a9fe::1"},
	},
	{
		// DigitalOcean documentation, Droplet metadata.
		name:  "digitalocean",
		rules: []string{"169.254.169.254"},
	},
	{
		// Vultr documentation, metadata API.
		name:  "vultr",
		rules: []string{"169.254.169.254"},
	},
	{
		// Exoscale documentation, Compute instances: instance metadata.
		name:  "exoscale",
		rules: []string{"169.254.169.254"},
	},
	{
		// UpCloud API documentation, Servers: metadata service.
		name:  "upcloud",
		rules: []string{"169.254.169.254"},
	},
}

// PresetNames returns the names of all presets: [Metadata], those of the clouds, [None].
func PresetNames() []string {
	names := []string{Metadata}
	for _, p := range presets {
		names = append(names, p.name)
	}
	return append(names, None)
}

// Preset returns the rules of a preset, without duplicates. [None] has none. The error for
// an unknown name lists the known names.
func Preset(name string) ([]Rule, error) {
	if err := checkPreset(name); err != nil {
		return nil, err
	}
	return presetRules(name, func(p preset) []string { return p.rules }), nil
}

// clouds returns the presets that a preset consists of and that block a rule: those of
// single clouds if it is [Metadata], and otherwise the preset itself.
func clouds(name string, r Rule) (names []string) {
	for _, p := range presets {
		if (p.name == name || name == Metadata && !p.optIn) && slices.Contains(presetRules(p.name, func(p preset) []string { return p.rules }), r) {
			names = append(names, p.name)
		}
	}
	return names
}

// Exceptions returns rules to allow together with a preset so that containers on that
// cloud keep DNS and time; for [Metadata], those of all its clouds. They are advice:
// nothing applies them. An unknown name has none.
func Exceptions(name string) []Rule {
	return presetRules(name, func(p preset) []string { return p.exceptions })
}

func presetRules(name string, of func(preset) []string) []Rule {
	var rules []Rule
	for _, p := range presets {
		if p.name != name && (name != Metadata || p.optIn) {
			continue
		}
		for _, s := range of(p) {
			r, err := ParseRule(s)
			if err != nil {
				panic("preset " + p.name + ": " + err.Error()) // a typo above; the tests parse them all
			}
			rules = append(rules, r)
		}
	}
	return unique(rules)
}

// ParsePresets checks names of presets, each of which may itself be a comma
// separated list, and returns them in order without duplicates. [None] is
// refused beside others. No name at all is allowed, and means the same as None.
func ParsePresets(names []string) ([]string, error) {
	list := []string{}
	for _, name := range names {
		list = append(list, strings.Split(name, ",")...)
	}
	for _, name := range list {
		if err := checkPreset(name); err != nil {
			return nil, err
		}
	}
	list = unique(list)
	if len(list) > 1 && slices.Contains(list, None) {
		return nil, fmt.Errorf("preset %q blocks nothing and stands alone: leave it out, or the others", None)
	}
	return list, nil
}

func checkPreset(name string) error {
	names := PresetNames()
	if slices.Contains(names, name) {
		return nil
	}
	return fmt.Errorf("unknown preset %q%s; want %s", name, suggest(name, names), strings.Join(names, ", "))
}

// suggest returns the known name that was probably meant, as part of an error message; empty
// if there is none.
func suggest(name string, known []string) string {
	best, least := "", 5 // two letters off, or it is another word
	for _, k := range known {
		d := distance(strings.ToLower(name), k)
		if d >= len(name) || d >= len(k) { // not a letter in common
			continue
		}
		score := 2 * d
		if name[0] == k[0] { // few mistype the first letter
			score--
		}
		if score < least {
			best, least = k, score
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %q?)", best)
}

// distance is the number of bytes to insert, delete or replace to turn a into b
// (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// unique returns list without repetitions, in order.
func unique[T comparable](list []T) []T {
	seen := make(map[T]bool, len(list))
	kept := make([]T, 0, len(list))
	for _, v := range list {
		if !seen[v] {
			seen[v] = true
			kept = append(kept, v)
		}
	}
	return kept
}
