package loader

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Status reads back what is in force. The error can wrap ErrOtherVersion. It is no error if
// nothing is attached.
func (f *Filter) Status() (*Status, error) { return f.StatusAfter(nil) }

// StatusAfter is Status for those who ask again and again. Of the policed containers that ran
// before, it looks whether they still run only for some, and for each at every eighth call: on a
// host with thousands, looking costs more than the rest. before may be nil.
func (f *Filter) StatusAfter(before *Status) (*Status, error) {
	r, err := f.read()
	if err != nil {
		return nil, err
	}
	r.before = before
	defer closeAll(r.policed)
	if r.Unknown, err = f.pins.Unknown(); err != nil {
		return nil, err
	}
	if len(r.Cgroups) > 0 {
		r.Unpinned = f.pins.Unpinned()
		for _, l := range []layer{f.recognition, f.families, f.host} {
			l.read(r)
		}
	} else {
		const reason = "nothing is attached"
		r.Defences = append(r.Defences, Defence{Name: SocketFamilies, Reason: reason}, Defence{Name: HostSide, Reason: reason})
	}
	if r.found != nil && r.found.Missing[SocketIdentity] != "" {
		r.Defences = append(r.Defences, Defence{Name: SocketIdentity, Reason: r.found.Missing[SocketIdentity]})
	}
	if delegates, err := f.root.Delegates(); err != nil {
		return nil, err
	} else if !delegates {
		r.Defences = append(r.Defences, Defence{Name: CgroupBoundary, Reason: NoDelegation})
	}
	return r.Status, f.findUncovered(r)
}

// Policed returns the paths of the policed cgroups and the policy of the first, as Status does;
// nil if there is none. It does not look at containers, of which there may be thousands.
func (f *Filter) Policed() (cgroups []string, p *policy.Policy, err error) {
	r, err := f.read()
	if err != nil {
		return nil, nil, err
	}
	closeAll(r.policed)
	return r.Cgroups, r.Policy, nil
}

// read begins to read back what is in force, with the policed cgroups and their hooks. The
// caller closes the policed cgroups.
func (f *Filter) read() (*reading, error) {
	if err := f.pins.Check(); err != nil {
		return nil, err
	}
	all, last, err := f.settled()
	if err != nil {
		return nil, err
	}
	r := &reading{policed: all, last: last, found: foundBy(all), Status: &Status{
		Cgroups:   []string{},
		Hooks:     []Hook{},
		Defences:  []Defence{},
		Uncovered: []Uncovered{},
	}}
	if r.interrupted, err = f.interrupted(); err != nil {
		closeAll(all)
		return nil, err
	}
	f.egress.read(r)
	return r, nil
}

// interrupted says whether an attach was interrupted while it replaced maps.
func (f *Filter) interrupted() (bool, error) {
	left := func() (bool, error) {
		from, err := f.pins.Replaced()
		maps.CloseAll(from)
		return len(from) > 0, err
	}
	if some, err := left(); !some || err != nil || f.pins.Locked() {
		return false, err
	}
	// The attach may just have ended.
	return left()
}

// AddState adds to a status how much room is left for containers, and which containers a
// rule lets reach the metadata service or open more sockets.
func (f *Filter) AddState(s *Status) error {
	return f.withState(func(state *maps.State) error { return f.AddStateOf(s, state) })
}

// AddStateOf is AddState with a state that is open already.
func (f *Filter) AddStateOf(s *Status, state *maps.State) error {
	known, err := state.Containers()
	if err != nil {
		return err
	}
	room, err := state.Room(known)
	if err != nil {
		return err
	}
	s.Room = &room
	for id, c := range known {
		if c.Flags&(maps.MayReachMetadata|maps.AnyFamily) == 0 {
			continue
		}
		rel, err := f.root.Find(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		container := Uncovered{ID: cmp.Or(cgroup.ContainerID(rel), path.Base(rel)), Cgroup: rel}
		if c.Flags&maps.MayReachMetadata != 0 {
			s.MetadataAllowed = append(s.MetadataAllowed, container)
		}
		if c.Flags&maps.AnyFamily != 0 {
			s.FamiliesAllowed = append(s.FamiliesAllowed, WithFamilies{container, maps.FamiliesOf(c.Flags)})
		}
	}
	slices.SortFunc(s.MetadataAllowed, func(a, b Uncovered) int { return strings.Compare(a.Cgroup, b.Cgroup) })
	slices.SortFunc(s.FamiliesAllowed, func(a, b WithFamilies) int { return strings.Compare(a.Cgroup, b.Cgroup) })
	return nil
}

// AddExposed adds the containers that see or can write more of the host's cgroups than
// their own. It looks at one process of each container.
func (f *Filter) AddExposed(s *Status) error {
	own := cgroup.OwnContainer()
	for _, c := range s.running {
		if c.Rel == own {
			continue // it needs the namespace to see the others
		}
		e, err := f.root.Exposure(c.Rel)
		if err != nil {
			return fmt.Errorf("look at the container in %s: %w", c.Rel, err)
		}
		if e != (cgroup.Exposure{}) {
			s.Exposed = append(s.Exposed, Exposed{Uncovered{ID: cgroup.ContainerID(c.Rel), Cgroup: c.Rel}, e})
		}
	}
	if len(s.Exposed) > 0 && !slices.ContainsFunc(s.Defences, func(d Defence) bool { return d.Name == CgroupBoundary }) {
		s.Defences = append(s.Defences, Defence{Name: CgroupBoundary, Reason: "containers have the host's cgroup namespace or tree, as shown below: they can move to a cgroup that is not policed, or start more containers, each with its own bucket"})
	}
	return nil
}
