// Package stats reads what the filter has done to each container.
package stats

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Stats are the filter's counters.
type Stats struct {
	Mode       policy.Mode `json:"mode"`
	Cgroups    []string    `json:"cgroups"`
	Containers []Container `json:"containers"`
	// Total includes containers that are gone.
	Total Total `json:"total"`
}

// Container is the row of one container.
type Container struct {
	container.Identity
	Blocked   Blocked `json:"blocked"`
	Malformed Traffic `json:"malformed"`
	Families  Denied  `json:"socket_families"`
	HostSide  Traffic `json:"host_side"`
	// HostReasons is HostSide by reason.
	HostReasons Reasons `json:"host_side_reasons"`
	SMTP        Bucket  `json:"smtp"`
	// Refused is what the hooks refused, by reason.
	Refused Refusals `json:"-"`
}

// Total is the sum over all containers.
type Total struct {
	Blocked   Blocked `json:"blocked"`
	Malformed Traffic `json:"malformed"`
	Families  Denied  `json:"socket_families"`
	HostSide  Traffic `json:"host_side"`
	// HostReasons is HostSide by reason.
	HostReasons Reasons `json:"host_side_reasons"`
	SMTP        SMTP    `json:"smtp"`
	// Refused is what the hooks refused, by reason.
	Refused Refusals `json:"-"`
}

// Refusals is what the hooks of the containers' cgroups refused, by reason.
type Refusals struct{ Malformed, Blocked, RateLimited, NoBucket Blocked }

// Traffic is what was dropped. Bytes count from the IP header on.
type Traffic struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Reasons is what was dropped, by reason. A version that told no reasons may have dropped more.
type Reasons struct {
	Malformed   Traffic `json:"malformed"`
	Blocked     Traffic `json:"blocked"`
	RateLimited Traffic `json:"rate_limited"`
}

// Blocked is what was sent to blocked destinations, or was refused for another reason.
type Blocked struct {
	Traffic
	// Connects were refused in connect() or sendmsg(), and sent no packet.
	Connects uint64 `json:"connects"`
}

// Denied are refused sockets.
type Denied struct {
	Denied uint64 `json:"denied"`
}

// SMTP counts mail connections by their outcome. Repeated attempts count again, except
// those of an allowed connection.
type SMTP struct {
	Allowed     uint64 `json:"allowed"`
	RateLimited uint64 `json:"rate_limited"`
	NoBucket    uint64 `json:"no_bucket"`
}

// Bucket is a container's SMTP with the state of its bucket.
type Bucket struct {
	SMTP
	// Tokens is the number of tokens left; nil if the rate is unlimited or not known.
	Tokens *float64    `json:"tokens"`
	Rate   policy.Rate `json:"rate"`
	// Burst is 0 if the limit is not known, because no program holds the policy.
	Burst uint32 `json:"burst"`
}

// Known says whether the container's limit is known.
func (b Bucket) Known() bool { return b.Burst > 0 }

func total(c maps.Counters) Total {
	refused := func(r bpf.EgressReason) bpf.EgressDrops { return maps.Refused(c, r) }
	dropped := func(r bpf.EgressReason) Traffic { return Traffic{refused(r).Packets, refused(r).Bytes} }
	all := func(r bpf.EgressReason) Blocked { return Blocked{dropped(r), refused(r).Connects} }
	attempts := func(r bpf.EgressReason) uint64 { return refused(r).Packets + refused(r).Connects }
	onHost := func(r bpf.EgressReason) Traffic { return Traffic{c.HostDropped[r].Packets, c.HostDropped[r].Bytes} }
	return Total{
		Blocked:   all(bpf.EgressReasonREASON_BLOCKED),
		Malformed: dropped(bpf.EgressReasonREASON_MALFORMED),
		Families:  Denied{c.FamiliesDenied},
		HostSide:  Traffic{c.HostSide.Packets, c.HostSide.Bytes},
		HostReasons: Reasons{
			Malformed:   onHost(bpf.EgressReasonREASON_MALFORMED),
			Blocked:     onHost(bpf.EgressReasonREASON_BLOCKED),
			RateLimited: onHost(bpf.EgressReasonREASON_RATE_LIMITED),
		},
		SMTP: SMTP{
			Allowed:     c.SmtpAllowed,
			RateLimited: attempts(bpf.EgressReasonREASON_RATE_LIMITED),
			NoBucket:    attempts(bpf.EgressReasonREASON_NO_BUCKET),
		},
		Refused: Refusals{
			Malformed:   all(bpf.EgressReasonREASON_MALFORMED),
			Blocked:     all(bpf.EgressReasonREASON_BLOCKED),
			RateLimited: all(bpf.EgressReasonREASON_RATE_LIMITED),
			NoBucket:    all(bpf.EgressReasonREASON_NO_BUCKET),
		},
	}
}

// Reader reads the stats of one filter repeatedly.
type Reader struct {
	filter *loader.Filter
	root   cgroup.Root
	state  *maps.State
	// fresh is whether the state was opened for the reading that comes.
	fresh bool
}

// Open returns a Reader, which the caller closes. The error can wrap
// loader.ErrNotAttached and loader.ErrOtherVersion.
func Open(filter *loader.Filter, root cgroup.Root) (*Reader, error) {
	state, err := filter.State()
	if err != nil {
		return nil, err
	}
	return &Reader{filter, root, state, true}, nil
}

// Close closes the Reader.
func (r *Reader) Close() error { return r.state.Close() }

// Read returns the present counters. Containers for which nothing was counted have a row
// too.
func (r *Reader) Read() (*Stats, error) {
	policed, p, err := r.filter.Policed()
	if err != nil {
		return nil, err
	}
	s, _, err := r.ReadFirst(math.MaxInt, &loader.Status{Cgroups: policed, Policy: p})
	return s, err
}

// ReadFirst returns the present counters, as Read does, with rows for at most n containers,
// those with the lowest ids of their cgroups. These are the oldest, so a container that has a
// row keeps it. leftOut is how many containers have none. What status has just read is not read
// again.
func (r *Reader) ReadFirst(n int, status *loader.Status) (s *Stats, leftOut int, err error) {
	policed, p := status.Cgroups, status.Policy
	s = &Stats{Cgroups: policed}
	known, sum, err := r.counters()
	if err != nil {
		return nil, 0, err
	}
	s.Total = total(sum)
	var def *policy.Limit
	paths := map[uint64]string{}
	if p != nil {
		s.Mode = p.Mode
		limit := p.SMTP.Limit()
		def = &limit
		for _, path := range policed {
			if err := r.addIdle(known, paths, path, p); err != nil {
				return nil, 0, err
			}
		}
	}
	now, err := maps.Now()
	if err != nil {
		return nil, 0, err
	}
	ids := make([]uint64, 0, len(known))
	for id := range known {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	if len(ids) > n {
		ids, leftOut = ids[:n], len(ids)-n
	}
	s.Containers = make([]Container, 0, len(ids))
	for _, id := range ids {
		rel, ok := status.Path(id)
		if !ok {
			rel, ok = paths[id]
		}
		is := container.IdentityOf(rel, id)
		if !ok {
			if is, err = container.Identify(r.root, id); err != nil {
				return nil, 0, err
			}
		}
		s.Containers = append(s.Containers, row(is, known[id], def, now))
	}
	slices.SortFunc(s.Containers, func(a, b Container) int {
		return cmp.Or(strings.Compare(a.Cgroup, b.Cgroup), cmp.Compare(a.CgroupID, b.CgroupID))
	})
	return s, leftOut, nil
}

// AddState adds to a status what the state tells that the last reading read, as
// [loader.Filter.AddState] does.
func (r *Reader) AddState(s *loader.Status) error { return r.filter.AddStateOf(s, r.state) }

// Missed returns the events that no reader got, as the state tells that the last reading read.
func (r *Reader) Missed() (*maps.Missed, error) { return r.state.Missed() }

// counters returns what is counted for each container and in total.
func (r *Reader) counters() (known map[uint64]maps.Container, sum maps.Counters, err error) {
	err = r.current(func(state *maps.State) (err error) {
		// In this order no row shows more than the total.
		if known, err = state.Containers(); err == nil {
			sum, err = state.Totals()
		}
		return err
	})
	return known, sum, err
}

// current has the maps read. An attach may replace them: then those that replace them are read.
func (r *Reader) current(read func(*maps.State) error) error {
	for range 10 {
		if !r.fresh {
			// The filter may have been taken off, or attached anew, since the last time.
			state, err := r.filter.State()
			if err != nil {
				return err
			}
			r.state.Close()
			r.state = state
		}
		r.fresh = false
		if err := read(r.state); err != nil {
			return err
		}
		if r.filter.IsCurrent(r.state) {
			break
		}
	}
	return nil
}

// addIdle adds the containers below a policed cgroup that have no state, and notes the paths of
// all of them. Those that are recognised have some from the beginning.
func (r *Reader) addIdle(known map[uint64]maps.Container, paths map[uint64]string, path string, p *policy.Policy) error {
	parent, err := r.root.Rel(path)
	if err != nil {
		return err
	}
	if p.Recognises(parent) {
		return nil
	}
	children, err := r.root.Children(parent)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, c := range children {
		paths[c.ID] = c.Rel
		if _, ok := known[c.ID]; !ok {
			known[c.ID] = maps.Container{}
		}
	}
	return nil
}

// row returns the row of a container. def is the policy's limit; nil if it is not known.
func row(is container.Identity, c maps.Container, def *policy.Limit, now uint64) Container {
	row := Container{Identity: is}
	t := total(c.Counters)
	row.Blocked, row.Malformed, row.Families, row.HostSide, row.HostReasons = t.Blocked, t.Malformed, t.Families, t.HostSide, t.HostReasons
	row.SMTP.SMTP, row.Refused = t.SMTP, t.Refused
	limit := c.Limit
	if limit.Burst == 0 && def == nil {
		return row
	}
	if limit.Burst == 0 {
		limit = maps.LimitOf(*def)
	}
	effective := maps.PolicyLimit(limit)
	row.SMTP.Rate, row.SMTP.Burst = effective.Rate, effective.Burst
	if tokens := maps.Tokens(c.Bucket, limit, now); !math.IsInf(tokens, 1) {
		tokens = math.Floor(tokens*1000) / 1000
		row.SMTP.Tokens = &tokens
	}
	return row
}

// Select returns the container that name stands for, as [container.Select] does.
func (r *Reader) Select(s *Stats, name string) (*Container, error) {
	all := make([]container.Identity, len(s.Containers))
	for i, c := range s.Containers {
		all[i] = c.Identity
	}
	i, err := container.Select(r.root, all, name)
	if errors.Is(err, container.ErrNoContainer) {
		return nil, fmt.Errorf("%w below %s", err, strings.Join(s.Cgroups, ", "))
	}
	if err != nil {
		return nil, err
	}
	return &s.Containers[i], nil
}

// SetLimit gives a container its own limit; UnsetLimit takes it away.
// The error can wrap loader.ErrBusy.
func (r *Reader) SetLimit(ctx context.Context, c *Container, l policy.Limit) error {
	return r.filter.ChangeState(ctx, func(state *maps.State) error { return state.SetLimit(c.CgroupID, l) })
}

// UnsetLimit returns a container to the policy's limit.
// The error can wrap loader.ErrBusy.
func (r *Reader) UnsetLimit(ctx context.Context, c *Container) error {
	return r.filter.ChangeState(ctx, func(state *maps.State) error { return state.UnsetLimit(c.CgroupID) })
}
