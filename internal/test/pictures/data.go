package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/web"
)

// now is when everything in the pictures happens.
var now = time.Date(2026, 11, 28, 14, 3, 27, 0, time.UTC)

// id returns the id of a container, and cgroupID that of its cgroup.
func id(n int) string { return fmt.Sprintf("%x", sha256.Sum256([]byte{byte(n)})) }

func cgroupID(n int) uint64 { return uint64(4200 + 13*n) }

// containers are the containers in the pictures.
var containers = []struct {
	name, image string
	tokens      float64
	web.Counts
}{
	{"ci-runner-3", "gitlab/gitlab-runner:v18.5", 5, web.Counts{Blocked: 1204, Malformed: 3, Sockets: 2}},
	{"newsletter", "customer42/newsletter:latest", 0.2, web.Counts{MailAllowed: 61, MailRefused: 418}},
	{"shop", "customer42/shop:4.1", 4.6, web.Counts{Blocked: 37, MailAllowed: 12}},
	{"plugin-import", "plugins/import:0.9", 5, web.Counts{Blocked: 4, Host: 11}},
	{"ci-runner-1", "gitlab/gitlab-runner:v18.5", 5, web.Counts{Blocked: 2}},
	{"postgres", "postgres:18", 5, web.Counts{}},
	{"redis", "redis:8", 5, web.Counts{}},
	{"traefik", "traefik:v3.6", 5, web.Counts{}},
}

// page is what the page in the pictures shows.
func page() web.Page {
	p := web.Page{
		Time: now, Node: "host1", Version: "v1.0.0", InForce: true, Enforcing: true, Mode: "enforce", Why: []string{},
		Cgroups:  []string{"/sys/fs/cgroup"},
		Defences: []web.Defence{{Name: "socket_families", Active: true}, {Name: "host_side", Active: true}},
		Total:    web.Counts{Blocked: 1310, Malformed: 3, Sockets: 2, Host: 11, MailAllowed: 80, MailRefused: 431},
		Rows:     []web.Row{}, Containers: len(containers),
	}
	for i, c := range containers {
		p.Rows = append(p.Rows, web.Row{ID: id(i), Name: c.name, Image: c.image, Counts: c.Counts, Tokens: &c.tokens, Limit: "5/minute, burst 5"})
	}
	return p
}

// refusal is a refusal of a container, some time ago: of a destination, or of a socket of a family.
func refusal(n int, ago time.Duration, comm, hook, reason, rule, to string) events.Record {
	yes := true
	r := events.Record{
		Type: events.Refusal, Time: now.Add(-ago), Node: "host1",
		Container: &events.Container{ID: id(n), Name: containers[n].name, Image: containers[n].image, CgroupID: cgroupID(n)},
		Hook:      hook, Reason: reason, Rule: rule, WouldBlock: &yes, Blocked: &yes,
		Process: &events.Process{PID: uint32(4711 + 1300*n - int(ago/time.Second)), Comm: comm, UID: 1000},
	}
	if hook == events.HookSocket {
		r.Family = to
		return r
	}
	at := netip.MustParseAddrPort(to)
	r.Protocol, r.Destination = "tcp", &events.Endpoint{Address: at.Addr(), Port: at.Port()}
	return r
}

// records are the refusals in the pictures, the oldest first.
func records() []events.Record {
	second, ms := time.Second, time.Millisecond
	all := []events.Record{refusal(0, 412*second, "tcpdump", events.HookSocket, events.ReasonFamily, "socket_families", "packet")}
	for _, ago := range []time.Duration{340, 221, 187} {
		all = append(all, refusal(2, ago*second, "php-fpm8.3", events.HookConnect, events.ReasonBlocked, "preset aws", "169.254.169.254:80"))
	}
	return append(all,
		refusal(3, 122*second, "import", events.HookConnect, events.ReasonBlocked, "preset aws", "[fd00:ec2::254]:80"),
		refusal(1, 65*second, "sendmail", events.HookPacket, events.ReasonRateLimited, "smtp", "192.0.2.25:25"),
		refusal(1, 64*second, "sendmail", events.HookPacket, events.ReasonRateLimited, "smtp", "198.51.100.7:25"),
		events.Record{Type: events.Suppressed, Time: now.Add(-60 * second), Count: 387, Container: &events.Container{ID: id(1), Name: containers[1].name, CgroupID: cgroupID(1)}},
		refusal(0, 9*second, "curl", events.HookConnect, events.ReasonBlocked, "preset aws", "169.254.169.254:80"),
		refusal(0, 4*second, "python3", events.HookConnect, events.ReasonBlocked, "preset aws", "169.254.169.254:80"),
		refusal(1, 810*ms, "sendmail", events.HookPacket, events.ReasonRateLimited, "smtp", "203.0.113.25:587"),
		refusal(0, 740*ms, "curl", events.HookConnect, events.ReasonBlocked, "preset aws", "169.254.169.254:80"),
		refusal(0, 520*ms, "curl", events.HookConnect, events.ReasonBlocked, "preset aws", "[fd00:ec2::254]:80"),
		refusal(1, 390*ms, "sendmail", events.HookPacket, events.ReasonRateLimited, "smtp", "198.51.100.7:25"),
		refusal(0, 110*ms, "curl", events.HookConnect, events.ReasonBlocked, "preset azure", "168.63.129.16:80"),
	)
}

// source returns a source of a page and of records.
func source(page func() web.Page, recent *web.Recent) web.Source {
	return web.Source{Metrics: func(io.Writer) error { return nil }, Page: page, Recent: recent}
}
