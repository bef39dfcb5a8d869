package metrics

import (
	"errors"
	"fmt"
	"runtime"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
)

const namespace = "egressbpf_"

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(namespace+name, help, labels, nil)
}

var (
	buildInfo  = desc("build_info", "The version of egressbpf that reads these metrics, and of Go; always 1.", "version", "goversion")
	successful = desc("read_successful", "Whether the filter's state could be read (1). If not (0), the metrics that need it are missing.")
	enforcing  = desc("enforcing", "Whether packets are dropped (1), as read back from the kernel; 0 in mode audit, if nothing is attached, and if it cannot be read.")
	mode       = desc("mode", "The mode of the policy in force: 1 for that mode, 0 for the other.", "mode")
	defence    = desc("defence_active", "Whether a defence beside the filter is active (1).", "defence")
	policed    = desc("policed_containers", "Containers that are policed.")
	uncovered  = desc("uncovered_containers", "Running containers that are not policed. Missing while an engine does not answer that alone can tell.")
	leftOut    = desc("containers_left_out", fmt.Sprintf("Policed containers without series of their own: those beyond the oldest %d, or all if they are turned off.", MaxContainers))
	entries    = desc("map_entries", "Entries of a map of the filter.", "map")
	capacity   = desc("map_capacity", "Entries for which a map of the filter has room.", "map")
	reloadOK   = desc("policy_reload_successful", "Whether the service could put its configuration in force when it last tried (1).")
	reloadTime = desc("policy_reload_timestamp_seconds", "When the service last put its configuration in force, in seconds since 1970.")
	lost       = desc("events_lost_total", "Events about refusals that were lost because a buffer was full: that of the kernel or that of a reader. The refusals were counted.", "stage")
	suppressed = desc("events_suppressed_total", "Events about refusals that were left out because a container had too many of them. The refusals were counted.")

	all = counters{
		packets:  desc("dropped_packets_total", "Packets of containers that were dropped, by reason; of all containers, those that are gone included.", "reason"),
		bytes:    desc("dropped_bytes_total", "Bytes of the packets that were dropped, from the IP header on; of all containers, those that are gone included.", "reason"),
		connects: desc("refused_connects_total", "Attempts to connect or send that were refused before there was a packet; of all containers, those that are gone included.", "reason"),
		sockets:  desc("refused_sockets_total", "Sockets that were refused because they would bypass the filter; of all containers, those that are gone included."),
		host:     desc("host_dropped_packets_total", "Packets that got past the filter and were dropped on the host; of all containers, those that are gone or unknown included."),
		mail:     desc("smtp_connections_total", "New mail connections: allowed, over the limit (rate_limited; repeats count) or without a bucket (no_bucket); of all containers, those that are gone included.", "verdict"),
	}
	own = counters{
		packets:  desc("container_dropped_packets_total", "Packets of a container that were dropped, by reason.", "id", "container", "reason"),
		bytes:    desc("container_dropped_bytes_total", "Bytes of a container's packets that were dropped, from the IP header on.", "id", "container", "reason"),
		connects: desc("container_refused_connects_total", "A container's attempts to connect or send that were refused before there was a packet.", "id", "container", "reason"),
		sockets:  desc("container_refused_sockets_total", "Sockets that a container was refused because they would bypass the filter.", "id", "container"),
		host:     desc("container_host_dropped_packets_total", "A container's packets that got past the filter and were dropped on the host.", "id", "container"),
		mail:     desc("container_smtp_connections_total", "A container's new mail connections: allowed, over the limit (rate_limited; repeats count) or without a bucket (no_bucket).", "id", "container", "verdict"),
	}
	tokens = desc("container_smtp_tokens", "Mail connections that a container can open right now. Missing if they are not limited.", "id", "container")
	info   = desc("container_info", "A policed container and the image that it was started from, as far as an engine tells; always 1.", "id", "container", "image")
)

// describe tells of all metrics that there can be.
func describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		buildInfo, successful, enforcing, mode, defence, policed, uncovered, leftOut, entries, capacity, reloadOK, reloadTime, lost, suppressed, tokens, info,
	} {
		ch <- d
	}
	for _, c := range []counters{all, own} {
		for _, d := range []*prometheus.Desc{c.packets, c.bytes, c.connects, c.sockets, c.host, c.mail} {
			ch <- d
		}
	}
}

// reading is what was read at one time.
type reading struct {
	// err is why the filter cannot be read. It wraps loader.ErrNotAttached if there is
	// nothing to read.
	err     error
	status  *loader.Status
	stats   *stats.Stats
	leftOut int
	// uncertain is whether there may be more uncovered containers than in status.
	uncertain bool
	engines   Engines
	reload    *Reload
	events    func() Events
}

// successful says whether everything that there is could be read.
func (r *reading) successful() bool {
	return r.err == nil || r.status != nil && len(r.status.Cgroups) == 0 && errors.Is(r.err, loader.ErrNotAttached)
}

// Describe implements [prometheus.Collector].
func (r *reading) Describe(ch chan<- *prometheus.Desc) { describe(ch) }

// Collect implements [prometheus.Collector].
func (r *reading) Collect(ch chan<- prometheus.Metric) {
	s := sink(ch)
	s.gauge(buildInfo, 1, text(loader.Version()), runtime.Version())
	s.gauge(successful, number(r.successful()))
	r.collectReload(s)
	r.collectEvents(s)
	if !r.successful() {
		s.gauge(enforcing, 0)
		return
	}
	r.collectStatus(s)
	if r.stats != nil {
		s.counters(all, r.stats.Total)
		r.collectContainers(s)
	}
}

func (r *reading) collectReload(s sink) {
	if r.reload == nil {
		return
	}
	r.reload.mu.Lock()
	defer r.reload.mu.Unlock()
	if r.reload.tried {
		s.gauge(reloadOK, number(r.reload.successful))
	}
	if !r.reload.last.IsZero() {
		s.gauge(reloadTime, float64(r.reload.last.UnixMilli())/1000)
	}
}

func (r *reading) collectEvents(s sink) {
	if r.events == nil {
		return
	}
	e := r.events()
	for stage, n := range e.Lost {
		s.count(lost, n, stage)
	}
	s.count(suppressed, e.Suppressed)
}

func (r *reading) collectStatus(s sink) {
	s.gauge(enforcing, number(r.status.Enforcing))
	for _, m := range []policy.Mode{policy.Enforce, policy.Audit} {
		s.gauge(mode, number(r.status.Mode == m), string(m))
	}
	for _, d := range r.status.Defences {
		s.gauge(defence, number(d.Active), text(d.Name))
	}
	if !r.uncertain {
		s.gauge(uncovered, float64(len(r.status.Uncovered)))
	}
	if room := r.status.Room; room != nil {
		s.gauge(entries, float64(room.Containers), bpf.EgressMapContainers)
		s.gauge(capacity, float64(room.Of), bpf.EgressMapContainers)
		s.gauge(entries, float64(room.Removed+room.Without), bpf.EgressMapStateless)
		s.gauge(capacity, float64(room.OfStateless), bpf.EgressMapStateless)
	}
}

func (r *reading) collectContainers(s sink) {
	// A series goes with its container, though the kernel may keep the entry of a container
	// for a while.
	var there []stats.Container
	for _, c := range r.stats.Containers {
		if c.Cgroup != "" {
			there = append(there, c)
		}
	}
	s.gauge(policed, float64(len(there)+r.leftOut))
	labels := labelIDs(there)
	left := r.leftOut
	for i, c := range there {
		id := labels[i]
		if id == "" {
			left++
			continue
		}
		name, image := c.Name, ""
		if r.engines != nil {
			if known, ok := r.engines.Find(c.ID); ok {
				name, image = known.Name, known.Image
			}
		}
		name = text(name)
		s.gauge(info, 1, id, name, text(image))
		s.counters(own, stats.Total{Families: c.Families, HostSide: c.HostSide, SMTP: c.SMTP.SMTP, Refused: c.Refused}, id, name)
		if c.SMTP.Tokens != nil {
			s.gauge(tokens, *c.SMTP.Tokens, id, name)
		}
	}
	s.gauge(leftOut, float64(left))
}

// labelIDs returns the label id of each container: its id. Containers that share one, such as
// web below two policed cgroups, get their cgroups instead. A container that would still share
// one gets none.
func labelIDs(containers []stats.Container) []string {
	ids := make([]string, len(containers))
	taken := map[string]int{}
	for i, c := range containers {
		ids[i] = text(c.ID)
		taken[ids[i]]++
	}
	used := map[string]bool{}
	for i, c := range containers {
		if taken[ids[i]] > 1 {
			ids[i] = text(c.Cgroup)
		}
		if used[ids[i]] {
			ids[i] = ""
		}
		used[ids[i]] = true
	}
	return ids
}

// counters are the counters that there are of each container, and of all.
type counters struct{ packets, bytes, connects, sockets, host, mail *prometheus.Desc }

// sink takes metrics.
type sink chan<- prometheus.Metric

func (s sink) gauge(d *prometheus.Desc, value float64, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
}

func (s sink) count(d *prometheus.Desc, n uint64, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
}

func (s sink) counters(of counters, t stats.Total, labels ...string) {
	counter := func(d *prometheus.Desc, n uint64, more ...string) {
		s.count(d, n, append(labels[:len(labels):len(labels)], more...)...)
	}
	for _, why := range []struct {
		reason string
		stats.Blocked
		connects bool // whether attempts are refused for it
	}{
		{"malformed", t.Refused.Malformed, false},
		{"blocked", t.Refused.Blocked, true},
		{"rate_limited", t.Refused.RateLimited, true},
		{"no_bucket", t.Refused.NoBucket, false},
	} {
		counter(of.packets, why.Packets, why.reason)
		counter(of.bytes, why.Bytes, why.reason)
		if why.connects {
			counter(of.connects, why.Connects, why.reason)
		}
	}
	counter(of.sockets, t.Families.Denied)
	counter(of.host, t.HostSide.Packets)
	counter(of.mail, t.SMTP.Allowed, "allowed")
	counter(of.mail, t.SMTP.RateLimited, "rate_limited")
	counter(of.mail, t.SMTP.NoBucket, "no_bucket")
}

// text makes a label's value of what others may have chosen.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
