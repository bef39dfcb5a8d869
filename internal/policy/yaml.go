package policy

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// YAML returns a config file that [ParseConfig] reads back as the same Config. comments
// holds the lines to put above each key, named as in errors: block, smtp, smtp.exempt.
// The lines of "" go to the head of the file, and those of block[0], allow[0],
// smtp.exempt[0] and containers[0] above the first entry of that list.
func (c Config) YAML(comments map[string][]string) []byte {
	var b bytes.Buffer
	// Lists in flow style, each entry in quotes: IPv6 addresses and stars mean something in
	// YAML.
	list := func(entries []string) string {
		for i, e := range entries {
			entries[i] = strconv.Quote(e)
		}
		return "[" + strings.Join(entries, ", ") + "]"
	}
	comment := func(key, indent string) {
		for _, line := range comments[key] {
			fmt.Fprintf(&b, "%s# %s\n", indent, strings.Map(plain, line))
		}
	}
	key := func(name, value string) {
		comment(name, "")
		fmt.Fprintf(&b, "%s: %s\n", name, value)
	}
	// An entry on a line of its own can be removed with its comment.
	lines := func(path, indent string, entries []string) {
		fmt.Fprintf(&b, "%s%s:\n", indent, path[strings.LastIndexByte(path, '.')+1:])
		for i, e := range entries {
			comment(entryKey(path, i), indent+"  ")
			fmt.Fprintf(&b, "%s  - %q\n", indent, e)
		}
	}
	commented := func(path string, entries []string) bool {
		for i := range entries {
			if len(comments[entryKey(path, i)]) > 0 {
				return true
			}
		}
		return false
	}
	rules := func(name string, rules []Rule) {
		if all := texts(rules); len(rules) > 1 || commented(name, all) {
			comment(name, "")
			lines(name, "", all)
			return
		}
		key(name, list(texts(rules)))
	}
	comment("", "")
	key("mode", string(c.Mode))
	key("cgroups", list(append([]string{}, c.Cgroups...)))
	key("presets", list(append([]string{}, c.Presets...)))
	rules("block", c.Block)
	rules("allow", c.Allow)
	key("allow_dns", strconv.FormatBool(c.AllowDNS))
	key("socket_families", string(c.Families))
	key("host_side", strconv.Quote(string(c.HostSide))) // in YAML 1.1, on and off are booleans
	key("host_devices", list(strs(c.HostDevices)))
	if !slices.Equal(c.Scopes, cgroup.DefaultScopes()) {
		key("scopes", list(strs(c.Scopes)))
	}
	comment("smtp", "")
	fmt.Fprintln(&b, "smtp:")
	ports := make([]string, len(c.SMTP.Ports))
	for i, p := range c.SMTP.Ports {
		ports[i] = strconv.Itoa(int(p))
	}
	exempt := make([]string, len(c.SMTP.Exempt))
	for i, p := range c.SMTP.Exempt {
		exempt[i] = Rule{Prefix: p}.String() // an address without its length
	}
	for _, k := range [][2]string{
		{"ports", "[" + strings.Join(ports, ", ") + "]"},
		{"rate", c.SMTP.Rate.String()},
		{"burst", strconv.FormatUint(uint64(c.SMTP.Burst), 10)},
		{"over_limit", string(c.SMTP.OverLimit)},
		{"exempt", list(slices.Clone(exempt))},
	} {
		path := "smtp." + k[0]
		comment(path, "  ")
		if path == ListExempt && commented(path, exempt) {
			lines(path, "  ", exempt)
			continue
		}
		fmt.Fprintf(&b, "  %s: %s\n", k[0], k[1])
	}
	if len(c.Notify) > 0 {
		urls := make([]string, len(c.Notify))
		for i, target := range c.Notify {
			urls[i] = target.URL()
		}
		key("notify", list(urls))
	}
	if len(c.Containers) > 0 {
		comment("containers", "")
		fmt.Fprintln(&b, "containers:")
	}
	for i, r := range c.Containers {
		comment(entryKey("containers", i), "  ")
		begin := "  - "
		for _, k := range [][2]string{{"name", r.Name}, {"image", r.Image}, {"label", r.Label}, {"namespace", r.Namespace}, {"pod", r.Pod}, {"metadata", string(r.Metadata)}, {"socket_families", string(r.Families)}} {
			if k[1] != "" {
				fmt.Fprintf(&b, "%s%s: %s\n", begin, k[0], strconv.Quote(k[1]))
				begin = "    "
			}
		}
		if r.HostNetwork {
			fmt.Fprintf(&b, "%shost_network: true\n", begin)
			begin = "    "
		}
		if r.SMTP != nil {
			fmt.Fprintf(&b, "%ssmtp: {rate: %s, burst: %d}\n", begin, r.SMTP.Rate, r.SMTP.Burst)
		}
	}
	return b.Bytes()
}

func entryKey(path string, i int) string { return fmt.Sprintf("%s[%d]", path, i) }

func strs[T ~string](list []T) []string {
	all := make([]string, len(list))
	for i, v := range list {
		all[i] = string(v)
	}
	return all
}

func texts(list []Rule) []string {
	all := make([]string, len(list))
	for i, v := range list {
		all[i] = v.String()
	}
	return all
}

// plain replaces characters that would end a comment or that YAML refuses in one.
func plain(r rune) rune {
	if r == '\t' {
		return ' '
	}
	if !strconv.IsPrint(r) {
		return '\uFFFD'
	}
	return r
}
