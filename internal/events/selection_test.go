package events

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/policy"
)

const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// refusal is of a container that asked for the metadata service.
func refusal() Record {
	return Record{
		Type: Refusal, Hook: HookConnect, Reason: ReasonBlocked, Protocol: "tcp",
		Container:   &Container{ID: id, Name: "web-1", Cgroup: "/docker/" + id},
		Destination: &Endpoint{netip.MustParseAddr("169.254.169.254"), 80},
		Process:     &Process{4711, "curl", 0},
	}
}

func destinations(t *testing.T, list ...string) (rules []policy.Rule) {
	t.Helper()
	for _, s := range list {
		r, err := policy.ParseRule(s)
		check(t, err)
		rules = append(rules, r)
	}
	return rules
}

func TestContainers(t *testing.T) {
	for pattern, want := range map[string]bool{
		"web-1": true, "web-*": true, "*": true, "*1": true, "web": false, "WEB-1": false, "": false,
		id: true, id[:12]: true, id[:40]: true, id[:11]: false, id[1:20]: false, strings.ToUpper(id[:12]): false, id + "0": false,
		"/docker/" + id: true, "/docker/*": true, "/docker": false, "docker/" + id: false,
	} {
		if got := (Selection{Containers: []string{pattern}}).Wants(refusal()); got != want {
			t.Errorf("%q: got %v", pattern, got)
		}
	}
	r := refusal()
	r.Container = &Container{ID: "a-cgroup-of-somebody", Cgroup: "/machines/a-cgroup-of-somebody"}
	for pattern, want := range map[string]bool{
		"a-cgroup-of-somebody": true, "a-cgroup-of-*": true, "/machines/a-*": true,
		"a-cgroup-of-": false, // digits of an id alone stand for the rest
	} {
		if got := (Selection{Containers: []string{pattern}}).Wants(r); got != want {
			t.Errorf("%q: got %v", pattern, got)
		}
	}
	// A name can hold a star.
	r.Container.Name = "a*b"
	if !(Selection{Containers: []string{"no", "a*b"}}).Wants(r) {
		t.Error("a*b is not wanted")
	}
}

func TestDestinations(t *testing.T) {
	for _, tt := range []struct {
		address  string
		port     uint16
		protocol string
		match    string
		not      string
	}{
		{"169.254.169.254", 80, "tcp",
			"169.254.169.254 169.254.0.0/16 169.254.169.254:80 169.254.169.254:80/tcp 0.0.0.0/0:80 ::ffff:169.254.169.254 [::ffff:169.254.169.254]:80 ::ffff:169.254.0.0/112",
			"169.254.169.253 169.254.169.254:81 169.254.169.254/udp ::/0 10.0.0.0/8:80"},
		{"::ffff:169.254.169.254", 80, "tcp", "169.254.169.254 169.254.169.254:80 [::ffff:169.254.169.254]:80", "::/0 169.254.169.254:81"},
		{"64:ff9b::a9fe:a9fe", 80, "tcp", "169.254.169.254:80 64:ff9b::/96 [64:ff9b::a9fe:a9fe]:80", "169.254.169.253 fe80::/10"},
		{"fd00:ec2::254", 53, "udp", "fd00:ec2::254 [fd00:ec2::/32]:53 [fd00:ec2::254]:53/udp", "[fd00:ec2::254]:80 fd00:ec2::254/tcp 0.0.0.0/0"},
		{"fe80::a9fe:a9fe%eth0", 80, "tcp", "fe80::a9fe:a9fe", "fe80::1"},
		{"192.0.2.1", 0, "icmp", "192.0.2.1 192.0.2.1/icmp 192.0.2.0/24/1", "192.0.2.1:80 192.0.2.1/tcp"},
		{"192.0.2.1", 0, "47", "192.0.2.1/32/47", "192.0.2.1/tcp"},
		{"192.0.2.1", 80, "quic", "192.0.2.1 192.0.2.1:80", "192.0.2.1/udp"}, // a name to come
		{"192.0.2.1", 80, "", "192.0.2.1:80", "192.0.2.1:80/tcp"},
	} {
		r := refusal()
		r.Destination, r.Protocol = &Endpoint{netip.MustParseAddr(tt.address), tt.port}, tt.protocol
		for _, match := range strings.Fields(tt.match) {
			if !(Selection{Destinations: destinations(t, "203.0.113.1", match)}).Wants(r) {
				t.Errorf("%s does not match %v/%s", match, r.Destination, tt.protocol)
			}
		}
		for _, not := range strings.Fields(tt.not) {
			if (Selection{Destinations: destinations(t, "203.0.113.1", not)}).Wants(r) {
				t.Errorf("%s matches %v/%s", not, r.Destination, tt.protocol)
			}
		}
	}
	all := Selection{Destinations: destinations(t, "0.0.0.0/0", "::/0")}
	r := refusal()
	for _, r.Destination = range []*Endpoint{nil, {}} {
		if all.Wants(r) {
			t.Errorf("%v is a destination", r.Destination)
		}
	}
}

func TestProcesses(t *testing.T) {
	for _, tt := range []struct {
		comm, pattern string
		want          bool
	}{
		{"curl", "curl", true},
		{"curl", "c*", true},
		{"curl", "cur", false},
		{"curl", "curl2", false},
		{"", "curl", false},
		{"", "*", true},
		{"tmux: server", "tmux: *", true},
		{"a-rather-long-n", "a-rather-long-name", true},
		{"a-rather-long-n", "a-rather-long-n", true},
		{"a-rather-long-n", "a-rather-long-*", true},
		{"a-rather-long-", "a-rather-long-name", false},
		{"caf\xc3", "caf\xc3", true},
		// The kernel has cut a character in two, and JSON has replaced the half of it.
		{"fourteen-bytes\xc3", "fourteen-bytesé", true},
		{"fourteen-bytes\ufffd", "fourteen-bytesé", true},
	} {
		r := refusal()
		r.Process.Comm = tt.comm
		if got := (Selection{Processes: []string{tt.pattern}}).Wants(r); got != tt.want {
			t.Errorf("%q, process %q: got %v", tt.pattern, tt.comm, got)
		}
	}
	r := refusal()
	r.Process = nil
	if (Selection{Processes: []string{"*"}}).Wants(r) {
		t.Error("a process that is not known is wanted")
	}
}

func TestSelection(t *testing.T) {
	web, db := refusal(), refusal()
	db.Container = &Container{Name: "db"}
	db.Reason = ReasonRateLimited
	unknown := refusal()
	unknown.Container = nil
	of := func(kind string, r Record) Record { return Record{Type: kind, Container: r.Container} }
	records := map[string]Record{
		"web": web, "db": db, "unknown": unknown,
		"start": {Type: Start}, "lost": {Type: Lost},
		"suppressed web": of(Suppressed, web), "suppressed db": of(Suppressed, db), "suppressed unknown": of(Suppressed, unknown),
		"later web": of("later", web), "later db": of("later", db), "later unknown": of("later", unknown),
	}
	onlyWeb, byReason := []string{"web-*"}, []string{ReasonBlocked, ReasonFamily}
	for _, tt := range []struct {
		what string
		s    Selection
		not  string // the records that are not wanted, separated by commas
	}{
		{"all", Selection{}, ""},
		{"a container", Selection{Containers: onlyWeb}, "db,unknown,suppressed db,later db"},
		{"other containers", Selection{Containers: onlyWeb, Not: true}, "web,suppressed web,later web"},
		{"reasons", Selection{Reasons: byReason}, "db"},
		{"other reasons", Selection{Reasons: byReason, Not: true}, "web,unknown"},
		{"both", Selection{Containers: onlyWeb, Reasons: byReason}, "db,unknown,suppressed db,later db"},
		// Whatever was left out may be for another reason.
		{"not both", Selection{Containers: onlyWeb, Reasons: byReason, Not: true}, "web"},
		{"two containers", Selection{Containers: []string{"web-1", "db"}}, "unknown"},
		{"nothing", Selection{Containers: onlyWeb, Processes: []string{"wget"}}, "web,db,unknown,suppressed db,later db"},
	} {
		not := strings.Split(tt.not, ",")
		for name, r := range records {
			want := true
			for _, n := range not {
				want = want && n != name
			}
			if got := tt.s.Wants(r); got != want {
				t.Errorf("%s: %s: got %v", tt.what, name, got)
			}
		}
	}
	if !(Selection{Not: true}).All() || (Selection{Processes: []string{"x"}}).All() || (Selection{Containers: onlyWeb}).All() {
		t.Error("All")
	}
}

func TestParseReason(t *testing.T) {
	for _, reason := range []string{ReasonMalformed, ReasonBlocked, ReasonRateLimited, ReasonNoBucket, ReasonFamily} {
		if got, err := ParseReason(reason); err != nil || got != reason {
			t.Errorf("%s: got %s, %v", reason, got, err)
		}
	}
	for _, reason := range []string{"", "Blocked", "block", "blocked "} {
		if got, err := ParseReason(reason); err == nil || !strings.Contains(err.Error(), "rate_limited") || got != "" {
			t.Errorf("%q: got %s, %v", reason, got, err)
		}
	}
}
