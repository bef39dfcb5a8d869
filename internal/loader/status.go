package loader

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Status is what the kernel says of the filter.
type Status struct {
	// Enforcing is whether packets are being dropped: every hook of every
	// policed cgroup is attached, and the policy is not only audited.
	Enforcing bool `json:"enforcing"`
	// Mode is empty if no cgroup is policed.
	Mode policy.Mode `json:"mode"`
	// Cgroups are the paths of the policed cgroups.
	Cgroups []string `json:"cgroups"`
	// Policy is that of the first policed cgroup; nil if there is none.
	Policy *policy.Policy `json:"policy,omitempty"`
	// Version is that of the programs, which may not be this build's.
	Version string `json:"version,omitempty"`
	// HostDevices are those whose packets the host side judges, beside Docker's
	// bridges.
	HostDevices []policy.Device `json:"host_devices,omitempty"`
	// Unjudged are devices that another attach would have the host side judge.
	Unjudged []string `json:"-"`
	// Named are the ids of the containers that run in cgroups which are named like
	// containers', whether they are policed or not.
	Named map[string]bool `json:"-"`
	// Recognises is whether containers are told by the names of their cgroups, in one
	// of the policed cgroups or more.
	Recognises bool   `json:"-"`
	Hooks      []Hook `json:"hooks"`
	// Unknown is what another version has pinned, and this one does not know.
	Unknown   []string    `json:"unknown_pins,omitempty"`
	Defences  []Defence   `json:"defences"`
	Uncovered []Uncovered `json:"uncovered"`
	// Systems are those that run and are not policed, of engines whose containers no scope
	// stands for by default. An operator may want it so: they count as nothing's failure.
	Systems []cgroup.System `json:"system_containers,omitempty"`
	// Exposed are running containers that have more of the host's cgroups than their own;
	// empty if nobody asked (AddExposed).
	Exposed []Exposed `json:"exposed_containers,omitempty"`
	// MetadataAllowed are containers that a rule lets reach what the presets block.
	MetadataAllowed []Uncovered `json:"metadata_allowed,omitempty"`
	// FamiliesAllowed are those that a rule lets make sockets which the policy refuses.
	FamiliesAllowed []WithFamilies `json:"families_allowed,omitempty"`
	// Room is how much of it is taken. It, MetadataAllowed and FamiliesAllowed are empty
	// if nobody asked (AddState), or nothing is attached.
	Room *maps.Room `json:"room,omitempty"`
	// Elsewhere are filters that are in force and not pinned here; empty if nobody asked
	// (Filter.Elsewhere).
	Elsewhere []Elsewhere `json:"elsewhere,omitempty"`
	// Unpinned are the maps of the state whose pins somebody has removed: another attach
	// pins them again.
	Unpinned []string `json:"-"`

	// running are the cgroups that are named like containers', of those that run.
	running []string
}

// Hook is a place in the kernel where a program of the filter should run.
type Hook struct {
	Name     string `json:"name"`
	Attached bool   `json:"attached"`
	// Cgroup is the path of the policed cgroup, or was; empty for hooks of the
	// whole host.
	Cgroup string `json:"cgroup"`
	// Device is the network device, of a hook that is at one.
	Device  string `json:"device,omitempty"`
	Program uint32 `json:"program_id"`
	// Link is 0 if it is attached without one.
	Link uint32 `json:"link_id"`
	// Since is when the program was loaded; zero if it is not attached.
	Since time.Time `json:"since,omitzero"`
	// Reason says why it is not attached, or not with the policy that should be in force.
	Reason string `json:"reason,omitempty"`
}

// Optional says whether the filter can be in force without the hook.
func (s *Status) Optional(h Hook) bool {
	return h.Cgroup == "" && !(s.Recognises && h.Name == bpf.CgroupsProgRecognise)
}

// Defence stands beside the hooks, against what does not pass them.
type Defence struct {
	Name   string `json:"name"`
	Active bool   `json:"active"`
	// Reason says why it is not active, or if it is, why not as the policy says.
	Reason string `json:"reason"`
}

// The names of the defences.
const (
	SocketFamilies = "socket_families"
	HostSide       = "host_side"
)

// HasDefence says whether a defence is active.
func (s *Status) HasDefence(name string) bool {
	return slices.ContainsFunc(s.Defences, func(d Defence) bool { return d.Name == name && d.Active })
}

// Uncovered is a running container that is not policed.
type Uncovered struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Cgroup string `json:"cgroup"`
}

// Exposed is a container that may leave its cgroup, or start others beside it.
type Exposed struct {
	Uncovered
	cgroup.Exposure
}

// WithFamilies is a container and families of sockets.
type WithFamilies struct {
	Uncovered
	Families policy.Families `json:"families"`
}

// InForce says whether the filter does what it can: it enforces, no container is outside
// of it, and none is without a bucket for want of room.
func (s *Status) InForce() bool {
	return s.Enforcing && len(s.Uncovered) == 0 && (s.Room == nil || s.Room.Without == 0)
}

// AddState adds what is kept about containers to what a status tells: how much room there
// is left, and who may reach the metadata service.
func (f *Filter) AddState(s *Status) error {
	return f.withState(func(state *maps.State) error { return f.addState(s, state) })
}

func (f *Filter) addState(s *Status, state *maps.State) error {
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

// Status reads back what is in force. The error can wrap ErrOtherVersion. That
// nothing is attached is no error.
func (f *Filter) Status() (*Status, error) {
	if err := f.pins.Check(); err != nil {
		return nil, err
	}
	all, last, err := f.settled()
	if err != nil {
		return nil, err
	}
	defer closeAll(all)
	s := &Status{
		Cgroups:   []string{},
		Hooks:     []Hook{},
		Defences:  []Defence{},
		Uncovered: []Uncovered{},
	}
	if s.Unknown, err = f.pins.Unknown(); err != nil {
		return nil, err
	}
	s.Enforcing = true
	for _, p := range all {
		s.add(f, p, last)
	}
	s.Enforcing = s.Enforcing && len(s.Cgroups) > 0
	if len(s.Cgroups) > 0 {
		s.Unpinned = f.pins.Unpinned()
		for _, name := range cgroupsHooks {
			s.Hooks = append(s.Hooks, f.cgroupsHook(name, foundBy(all)))
		}
		if recognises := func(p *policed) bool { return p.rel != "" && p.doc != nil && p.doc.Policy.Recognises(p.rel) }; slices.ContainsFunc(all, recognises) {
			s.Recognises = true
			s.Enforcing = s.Enforcing && s.attached(bpf.CgroupsProgRecognise)
		}
		s.Defences = append(s.Defences, f.familiesStatus(s, all), f.hostStatus(s, all))
	} else {
		const reason = "nothing is attached"
		s.Defences = append(s.Defences, Defence{Name: SocketFamilies, Reason: reason}, Defence{Name: HostSide, Reason: reason})
	}
	if why := foundBy(all); why != nil && why.Missing[socketIdentity] != "" {
		s.Defences = append(s.Defences, Defence{Name: socketIdentity, Reason: why.Missing[socketIdentity]})
	}
	if delegates, err := f.root.Delegates(); err != nil {
		return nil, err
	} else if !delegates {
		s.Defences = append(s.Defences, Defence{Name: cgroupBoundary, Reason: NoDelegation})
	}
	return s, s.findUncovered(f, all)
}

// AddExposed adds the containers that have more of the host's cgroups than their own. It
// looks at a process of each container.
func (f *Filter) AddExposed(s *Status) error {
	for _, rel := range s.running {
		e, err := f.root.Exposure(rel)
		if err != nil {
			return fmt.Errorf("look at the container in %s: %w", rel, err)
		}
		if e != (cgroup.Exposure{}) {
			s.Exposed = append(s.Exposed, Exposed{Uncovered{ID: cgroup.ContainerID(rel), Cgroup: rel}, e})
		}
	}
	if len(s.Exposed) > 0 && !slices.ContainsFunc(s.Defences, func(d Defence) bool { return d.Name == cgroupBoundary }) {
		s.Defences = append(s.Defences, Defence{Name: cgroupBoundary, Reason: "containers have the host's cgroup namespace or tree, as shown below: they can move to where they are not judged, or start containers beside them, each with a bucket of its own"})
	}
	return nil
}

// cgroupBoundary is what keeps containers in their cgroups.
const cgroupBoundary = "cgroup_boundary"

// NoDelegation says what follows from a cgroup2 mount without nsdelegate.
const NoDelegation = "cgroup2 is mounted without nsdelegate, as it is once a container had the host's cgroup namespace: a container that can write to the cgroup tree can move its processes to where they are not judged; mount -o remount,nsdelegate, and give containers neither --cgroupns=host nor that tree to write"

// settled reads all policed cgroups back, as an attach leaves them and not in its midst, and
// returns the number of the last attach; 0 if one is at work. The caller closes them.
func (f *Filter) settled() (all []*policed, last uint64, err error) {
	for try := range 2 {
		if all, err = f.installed(); err != nil {
			return nil, 0, err
		}
		last = lastAttach(all)
		if !slices.ContainsFunc(all, func(p *policed) bool { return p.isOlder(last) }) {
			break
		}
		if f.pins.Locked() {
			return all, 0, nil
		}
		if try == 0 {
			// It may have ended meanwhile.
			closeAll(all)
		}
	}
	return all, last, nil
}

// older says whether a hook of the cgroup has a program of another attach than the last,
// which is 0 if it gave no number.
func (p *policed) older(hook string, last uint64) bool {
	if last == 0 || p.info[hook] == nil {
		return false
	}
	doc := p.docs[hook]
	return doc == nil || doc.Attach != last
}

// isOlder says whether any of its hooks has.
func (p *policed) isOlder(last uint64) bool {
	return slices.ContainsFunc(hooks, func(h hook) bool { return p.older(h.name, last) })
}

// lastAttach returns the number of the attach that loaded the newest of the hooks' programs.
func lastAttach(all []*policed) (attach uint64) {
	var newest time.Time
	for _, p := range all {
		for name, doc := range p.docs {
			if doc != nil && !p.since[name].Before(newest) {
				newest, attach = p.since[name], doc.Attach
			}
		}
	}
	return attach
}

func (s *Status) add(f *Filter, p *policed, last uint64) {
	if p.rel == "" {
		// An attach was interrupted before anything was, and the cgroup is gone.
		return
	}
	path := f.root.Path(p.rel)
	s.Cgroups = append(s.Cgroups, path)
	if p.doc != nil && s.Policy == nil {
		s.Policy, s.Mode, s.Version = &p.doc.Policy, p.doc.Policy.Mode, p.doc.Version
	}
	if p.doc == nil || p.doc.Policy.Mode != policy.Enforce {
		s.Enforcing = false
	}
	for _, h := range hooks {
		row := Hook{Name: h.name, Cgroup: path}
		info := p.info[h.name]
		switch {
		case p.gone:
			row.Reason = "the cgroup was removed; attach again"
		case info == nil:
			row.Reason = "detached by another program, or an attach was interrupted; attach again"
		default:
			row.Attached = true
			row.Program, row.Link = uint32(info.Program), uint32(info.ID)
			row.Since = p.since[h.name]
			if p.older(h.name, last) {
				row.Reason = "with an older policy, since an attach was interrupted; attach again"
			}
		}
		if row.Reason != "" {
			s.Enforcing = false
		}
		s.Hooks = append(s.Hooks, row)
	}
}

// socketIdentity is what tells whose a socket is.
const socketIdentity = "socket_identity"

// socketIdentityGap says why sockets may not be known for a container's, if so.
func socketIdentityGap() (string, error) {
	v1, err := cgroup.NetV1()
	if err != nil || !v1 {
		return "", err
	}
	// It came in 5.18, soon after the kernel could tell both hierarchies apart.
	recent, err := haveHelper(ebpf.CGroupSockAddr, asm.FnSetRetval)
	if err != nil || recent {
		return "", err
	}
	return "a cgroup v1 hierarchy with net_cls or net_prio is mounted: once that is used, this kernel takes new sockets of containers for the host's, and they pass; unmount it", nil
}

// attached says whether a hook of the whole host is.
func (s *Status) attached(name string) bool {
	return slices.ContainsFunc(s.Hooks, func(h Hook) bool { return h.Name == name && h.Attached })
}

// cgroupsHook describes a hook that follows containers as they come and go.
func (f *Filter) cgroupsHook(name string, why *found) Hook {
	row := Hook{Name: name}
	info, err := pins.Info(f.pins.Pin(name))
	if errors.Is(err, fs.ErrNotExist) {
		row.Reason = why.why(name)
		return row
	}
	if err != nil {
		row.Reason = err.Error()
		return row
	}
	row.Attached, row.Program, row.Link = true, uint32(info.Program), uint32(info.ID)
	if _, row.Since, err = readDocument(info.Program); err != nil {
		row.Reason = err.Error()
	}
	return row
}

// findUncovered looks for running containers that are not policed. The names of their
// cgroups tell, in any place.
func (s *Status) findUncovered(f *Filter, all []*policed) error {
	containers, systems, err := f.root.Containers()
	if err != nil {
		return fmt.Errorf("look for containers: %w", err)
	}
	s.Named = map[string]bool{}
	s.running = containers
	var found []Uncovered
	for _, rel := range containers {
		id := cgroup.ContainerID(rel)
		s.Named[id] = true
		if leftOut(s.Policy, rel) {
			continue
		}
		found = append(found, Uncovered{ID: id, Cgroup: rel})
	}
	if err := f.addUncovered(s, all, found); err != nil {
		return err
	}
	var asked []Uncovered
	for _, system := range systems {
		asked = append(asked, Uncovered{Cgroup: system.Cgroup})
	}
	open, err := f.uncovered(all, asked)
	s.Systems = slices.DeleteFunc(systems, func(system cgroup.System) bool {
		return !slices.ContainsFunc(open, func(u Uncovered) bool { return u.Cgroup == system.Cgroup })
	})
	return err
}

// leftOut says whether a policy leaves a container of a pod to itself, as an operator may
// want it for those that run the node.
func leftOut(p *policy.Policy, rel string) bool {
	return p != nil && cgroup.OfPod(rel) && !p.IsContainer(rel)
}

// AddUncovered adds to what a status tells uncovered those of the containers that are not
// policed.
func (f *Filter) AddUncovered(s *Status, containers []Uncovered) error {
	all, err := f.installed()
	if err != nil {
		return err
	}
	defer closeAll(all)
	return f.addUncovered(s, all, containers)
}

func (f *Filter) addUncovered(s *Status, all []*policed, containers []Uncovered) error {
	found, err := f.uncovered(all, containers)
	s.Uncovered = append(s.Uncovered, found...)
	return err
}

// uncovered returns those of the containers that are not policed.
func (f *Filter) uncovered(all []*policed, containers []Uncovered) (found []Uncovered, err error) {
	if len(containers) == 0 {
		return nil, nil
	}
	state, err := f.State()
	if errors.Is(err, ErrNotAttached) {
		return containers, nil
	}
	if err != nil {
		return nil, err
	}
	defer state.Close()
	for _, c := range containers {
		covered, err := f.covers(all, state, c.Cgroup)
		if err != nil {
			return nil, err
		}
		if !covered {
			found = append(found, c)
		}
	}
	return found, nil
}

// covers says whether what is in a cgroup is policed.
func (f *Filter) covers(all []*policed, state *maps.State, rel string) (bool, error) {
	for _, p := range all {
		if p.gone || p.rel == "" || !cgroup.Within(rel, p.rel) {
			continue
		}
		if p.doc == nil || !p.doc.Policy.Recognises(p.rel) {
			return true, nil
		}
		// It, or one that it is nested in.
		for at := rel; at != p.rel && at != "/"; at = path.Dir(at) {
			id, err := f.root.ID(at)
			if errors.Is(err, fs.ErrNotExist) {
				return true, nil // it has ended
			}
			if err != nil {
				return false, err
			}
			if known, err := state.Recognised(id); known || err != nil {
				return known, err
			}
		}
	}
	return false, nil
}
