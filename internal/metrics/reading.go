package metrics

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"time"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
)

// families are all metrics that there can be, in order of their names.
var families = func() []family {
	all := slices.Concat(ofService, ofFilter, ofAll, ofContainers)
	slices.SortFunc(all, func(a, b family) int { return cmp.Compare(a.name, b.name) })
	return all
}()

// ofService are told even if the filter cannot be read.
var ofService = []family{
	{gauge, "build_info", "The version of egressbpf that reads these metrics, and of Go; always 1.", []string{"goversion", "version"},
		func(_ *Reading, to *text) { to.gauge(1, runtime.Version(), loader.Version()) }},
	{gauge, "read_successful", "Whether the filter's state could be read (1). If not (0), the metrics that need it are missing.", nil,
		func(r *Reading, to *text) { to.gauge(float64(number(r.successful()))) }},
	{gauge, "enforcing", "Whether packets are dropped (1), as read back from the kernel; 0 in mode audit, if nothing is attached, and if it cannot be read.", nil,
		func(r *Reading, to *text) { to.gauge(float64(number(r.successful() && r.status.Enforcing))) }},
	{gauge, "policy_reload_successful", "Whether the service could put its configuration in force when it last tried (1).", nil,
		func(r *Reading, to *text) {
			if r.reload.tried {
				to.gauge(float64(number(r.reload.successful)))
			}
		}},
	{gauge, "policy_reload_timestamp_seconds", "When the service last put its configuration in force, in seconds since 1970.", nil,
		func(r *Reading, to *text) {
			if !r.reload.last.IsZero() {
				to.gauge(float64(r.reload.last.UnixMilli()) / 1000)
			}
		}},
}

// ofFilter are told if the filter can be read.
var ofFilter = each((*Reading).successful, []family{
	{counter, "events_lost_total", "Events about refusals that were lost because a buffer was full: that of the kernel or that of a reader. The refusals were counted.", []string{"stage"},
		func(r *Reading, to *text) {
			if r.missed != nil {
				to.counter(r.missed.Lost, "kernel")
			}
			if r.lostByReaders != nil {
				to.counter(*r.lostByReaders, "reader")
			}
		}},
	{counter, "events_suppressed_total", "Events about refusals that were left out because a container had too many of them. The refusals were counted.", nil,
		func(r *Reading, to *text) {
			if r.missed != nil {
				to.counter(r.missed.LeftOut)
			}
		}},
	{gauge, "mode", "The mode of the policy in force: 1 for that mode, 0 for the other.", []string{"mode"},
		func(r *Reading, to *text) {
			for _, m := range []policy.Mode{policy.Audit, policy.Enforce} {
				to.gauge(float64(number(r.status.Mode == m)), string(m))
			}
		}},
	{gauge, "defence_active", "Whether a defence beside the filter is active (1).", []string{"defence"},
		func(r *Reading, to *text) {
			for _, d := range r.status.Defences {
				to.gauge(float64(number(d.Active)), d.Name)
			}
		}},
	{gauge, "uncovered_containers", "Running containers that are not policed. Missing while an engine does not answer that alone can tell.", nil,
		func(r *Reading, to *text) {
			if !r.uncertain {
				to.gauge(float64(len(r.status.Uncovered)))
			}
		}},
	{gauge, "map_entries", "Entries of a map of the filter.", []string{"map"},
		func(r *Reading, to *text) {
			if room := r.status.Room; room != nil {
				to.gauge(float64(room.Containers), bpf.EgressMapContainers)
				to.gauge(float64(room.Removed+room.Without), bpf.EgressMapStateless)
			}
		}},
	{gauge, "map_capacity", "Entries for which a map of the filter has room.", []string{"map"},
		func(r *Reading, to *text) {
			if room := r.status.Room; room != nil {
				to.gauge(float64(room.Of), bpf.EgressMapContainers)
				to.gauge(float64(room.OfStateless), bpf.EgressMapStateless)
			}
		}},
})

const ofAllContainers = "; of all containers, those that are gone included."

// ofAll are totals, told if something is attached.
var ofAll = each((*Reading).counted, []family{
	{counter, "dropped_packets_total", "Packets of containers that were dropped, by reason" + ofAllContainers, []string{"reason"},
		func(r *Reading, to *text) {
			for _, why := range reasons {
				to.counter(why.of(&r.stats.Total.Refused).Packets, why.name)
			}
		}},
	{counter, "dropped_bytes_total", "Bytes of the packets that were dropped, from the IP header on" + ofAllContainers, []string{"reason"},
		func(r *Reading, to *text) {
			for _, why := range reasons {
				to.counter(why.of(&r.stats.Total.Refused).Bytes, why.name)
			}
		}},
	{counter, "refused_connects_total", "Attempts to connect or send that were refused before there was a packet" + ofAllContainers, []string{"reason"},
		func(r *Reading, to *text) {
			for _, why := range reasons {
				if why.connects {
					to.counter(why.of(&r.stats.Total.Refused).Connects, why.name)
				}
			}
		}},
	{counter, "refused_sockets_total", "Sockets that were refused because they would bypass the filter" + ofAllContainers, nil,
		func(r *Reading, to *text) { to.counter(r.stats.Total.Families.Denied) }},
	{counter, "host_dropped_packets_total", "Packets that got past the filter and were dropped on the host; of all containers, those that are gone or unknown included.", nil,
		func(r *Reading, to *text) { to.counter(r.stats.Total.HostSide.Packets) }},
	{counter, "smtp_connections_total", "New mail connections: allowed, over the limit (rate_limited; repeats count) or without a bucket (no_bucket)" + ofAllContainers, []string{"verdict"},
		func(r *Reading, to *text) {
			for _, v := range verdicts {
				to.counter(v.of(&r.stats.Total.SMTP), v.name)
			}
		}},
	{gauge, "policed_containers", "Containers that are policed.", nil,
		func(r *Reading, to *text) { to.gauge(float64(r.there)) }},
	{gauge, "containers_left_out", fmt.Sprintf("Policed containers without series of their own: those beyond the oldest %d, or all if they are turned off.", MaxContainers), nil,
		func(r *Reading, to *text) { to.gauge(float64(r.there - len(r.containers))) }},
})

// ofContainers are of single containers.
var ofContainers = []family{
	{gauge, "container_info", "A policed container and the image that it was started from, as far as an engine tells; always 1.", []string{"container", "id", "image"},
		ofEach(func(c *labelled, to *text) {
			to.of(c, "")
			// The image can be empty, and is no name that this package knows.
			to.buf = append(to.buf[:len(to.buf)-len("} ")], `,image="`+escape(c.image)+`"} 1`...)
			to.end()
		})},
	{counter, "container_dropped_packets_total", "Packets of a container that were dropped, by reason.", []string{"container", "id", "reason"},
		ofEach(func(c *labelled, to *text) {
			for _, why := range reasons {
				to.count(c, why.of(&c.Refused).Packets, why.name)
			}
		})},
	{counter, "container_dropped_bytes_total", "Bytes of a container's packets that were dropped, from the IP header on.", []string{"container", "id", "reason"},
		ofEach(func(c *labelled, to *text) {
			for _, why := range reasons {
				to.count(c, why.of(&c.Refused).Bytes, why.name)
			}
		})},
	{counter, "container_refused_connects_total", "A container's attempts to connect or send that were refused before there was a packet.", []string{"container", "id", "reason"},
		ofEach(func(c *labelled, to *text) {
			for _, why := range reasons {
				if why.connects {
					to.count(c, why.of(&c.Refused).Connects, why.name)
				}
			}
		})},
	{counter, "container_refused_sockets_total", "Sockets that a container was refused because they would bypass the filter.", []string{"container", "id"},
		ofEach(func(c *labelled, to *text) { to.count(c, c.Families.Denied, "") })},
	{counter, "container_host_dropped_packets_total", "A container's packets that got past the filter and were dropped on the host.", []string{"container", "id"},
		ofEach(func(c *labelled, to *text) { to.count(c, c.HostSide.Packets, "") })},
	{counter, "container_smtp_connections_total", "A container's new mail connections: allowed, over the limit (rate_limited; repeats count) or without a bucket (no_bucket).", []string{"container", "id", "verdict"},
		ofEach(func(c *labelled, to *text) {
			for _, v := range verdicts {
				to.count(c, v.of(&c.SMTP.SMTP), v.name)
			}
		})},
	{gauge, "container_smtp_tokens", "Mail connections that a container can open right now. Missing if they are not limited.", []string{"container", "id"},
		ofEach(func(c *labelled, to *text) {
			if c.SMTP.Tokens != nil {
				to.measure(c, *c.SMTP.Tokens)
			}
		})},
}

// each has families tell only of readings for which when holds.
func each(when func(*Reading) bool, all []family) []family {
	for i, tell := range all {
		all[i].tell = func(r *Reading, to *text) {
			if when(r) {
				tell.tell(r, to)
			}
		}
	}
	return all
}

// ofEach tells of each container of a reading.
func ofEach(tell func(c *labelled, to *text)) func(*Reading, *text) {
	return func(r *Reading, to *text) {
		for i := range r.containers {
			tell(&r.containers[i], to)
		}
	}
}

// reasons are why packets are dropped, and attempts refused.
var reasons = []struct {
	name     string
	connects bool // whether attempts are refused for it
	of       func(*stats.Refusals) *stats.Blocked
}{
	{"blocked", true, func(r *stats.Refusals) *stats.Blocked { return &r.Blocked }},
	{"malformed", false, func(r *stats.Refusals) *stats.Blocked { return &r.Malformed }},
	{"no_bucket", false, func(r *stats.Refusals) *stats.Blocked { return &r.NoBucket }},
	{"rate_limited", true, func(r *stats.Refusals) *stats.Blocked { return &r.RateLimited }},
}

// verdicts are what can happen to mail connections.
var verdicts = []struct {
	name string
	of   func(*stats.SMTP) uint64
}{
	{"allowed", func(s *stats.SMTP) uint64 { return s.Allowed }},
	{"no_bucket", func(s *stats.SMTP) uint64 { return s.NoBucket }},
	{"rate_limited", func(s *stats.SMTP) uint64 { return s.RateLimited }},
}

// labelled is a container with the text of its labels container and id, and what an engine tells.
type labelled struct {
	*stats.Container
	labels, name, image string
}

// Reading is what was read at one time.
type Reading struct {
	at time.Time
	// err is why the filter cannot be read. It wraps loader.ErrNotAttached if there is
	// nothing to read.
	err    error
	status *loader.Status
	stats  *stats.Stats
	// uncertain is whether there may be more uncovered containers than in status.
	uncertain bool
	reload    outcome
	// missed are the events that no reader got; nil if the programs tell none.
	missed        *maps.Missed
	lostByReaders *uint64
	// there is how many containers are policed, and containers are those of them that have
	// series of their own.
	there      int
	containers []labelled
}

// successful says whether everything that there is could be read.
func (r *Reading) successful() bool {
	return r.err == nil || r.status != nil && len(r.status.Cgroups) == 0 && errors.Is(r.err, loader.ErrNotAttached)
}

// counted says whether there are counters.
func (r *Reading) counted() bool { return r.successful() && r.stats != nil }

// label prepares the labels of the containers. leftOut more have none.
func (r *Reading) label(leftOut int, engines Engines) {
	if !r.counted() {
		return
	}
	// A series goes with its container, though the kernel may keep the entry of a container
	// for a while.
	var there []*stats.Container
	for i := range r.stats.Containers {
		if c := &r.stats.Containers[i]; c.Cgroup != "" {
			there = append(there, c)
		}
	}
	r.there = len(there) + leftOut
	r.containers = make([]labelled, 0, len(there))
	ids := labelIDs(there)
	for i, c := range there {
		if ids[i] == "" {
			continue
		}
		name, image := c.Name, ""
		var pod container.Pod
		if engines != nil {
			if known, ok := engines.Find(c.ID); ok {
				name, image, pod = known.Name, known.Image, known.Pod
			}
		}
		labels := `container="` + escape(cmp.Or(pod.Container, name)) + `",id="` + escape(ids[i]) + `"`
		if pod.Name != "" {
			labels += `,namespace="` + escape(pod.Namespace) + `",pod="` + escape(pod.Name) + `"`
		}
		r.containers = append(r.containers, labelled{c, labels, name, image})
	}
}

// labelIDs returns the label id of each container: its id. Containers that share one, such as
// web below two policed cgroups, get their cgroups instead. A container that would still share
// one gets none.
func labelIDs(containers []*stats.Container) []string {
	ids := make([]string, len(containers))
	taken := make(map[string]int, len(ids))
	for i, c := range containers {
		ids[i] = valid(c.ID)
		taken[ids[i]]++
	}
	used := make(map[string]bool, len(ids))
	for i, c := range containers {
		if taken[ids[i]] > 1 {
			ids[i] = valid(c.Cgroup)
		}
		if used[ids[i]] {
			ids[i] = ""
		}
		used[ids[i]] = true
	}
	return ids
}

// Write writes the reading in Prometheus's text format, some of it at a time. An error is one of
// w: if there are no numbers, what is written says so.
func (r *Reading) Write(w io.Writer) error {
	to := &text{w: w, buf: make([]byte, 0, flushAt+4096)}
	for i := range families {
		to.begin(&families[i])
		families[i].tell(r, to)
	}
	to.flush()
	return to.err
}
