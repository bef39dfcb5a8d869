package loader

import (
	"slices"
	"time"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Status is what the kernel says about the filter.
type Status struct {
	// Enforcing is whether packets are dropped: every hook of every policed cgroup is
	// attached, and the mode is not audit.
	Enforcing bool `json:"enforcing"`
	// Mode is empty if no cgroup is policed.
	Mode policy.Mode `json:"mode"`
	// Cgroups are the paths of the policed cgroups.
	Cgroups []string `json:"cgroups"`
	// Policy is the policy of the first policed cgroup; nil if there is none.
	Policy *policy.Policy `json:"policy,omitempty"`
	// Version is the version of the programs, which may differ from this build's.
	Version string `json:"version,omitempty"`
	// HostDevices are the devices that the host side judges besides Docker's bridges.
	HostDevices []policy.Device `json:"host_devices,omitempty"`
	// Unjudged are devices that the host side would judge after another attach.
	Unjudged []string `json:"-"`
	// Named are the ids of containers that run in cgroups with names of containers,
	// policed or not.
	Named map[string]bool `json:"-"`
	// Recognises is whether any policed cgroup recognises containers by the names of
	// their cgroups.
	Recognises bool   `json:"-"`
	Hooks      []Hook `json:"hooks"`
	// Unknown are pins of another version that this one does not know.
	Unknown   []string    `json:"unknown_pins,omitempty"`
	Defences  []Defence   `json:"defences"`
	Uncovered []Uncovered `json:"uncovered"`
	// Systems are running containers that are not policed, of engines that no default
	// scope covers. An operator may want that, so they do not count as a failure.
	Systems []cgroup.System `json:"system_containers,omitempty"`
	// Exposed are running containers that see or can write more of the host's cgroups
	// than their own; empty without AddExposed.
	Exposed []Exposed `json:"exposed_containers,omitempty"`
	// MetadataAllowed are the containers that a rule lets reach what the presets block.
	MetadataAllowed []Uncovered `json:"metadata_allowed,omitempty"`
	// FamiliesAllowed are the containers that a rule lets open sockets that the policy
	// refuses.
	FamiliesAllowed []WithFamilies `json:"families_allowed,omitempty"`
	// Room is how much room is taken. Room, MetadataAllowed and FamiliesAllowed are
	// empty without AddState, or if nothing is attached.
	Room *maps.Room `json:"room,omitempty"`
	// Elsewhere are filters that are in force but not pinned here; empty unless the
	// caller adds them (Filter.Elsewhere).
	Elsewhere []Elsewhere `json:"elsewhere,omitempty"`
	// Unpinned are maps of the state whose pins somebody has removed. Another attach
	// pins them again.
	Unpinned []string `json:"-"`

	// running are the cgroups with names of containers in which a process runs.
	running []cgroup.Cgroup
	// nth counts the calls of StatusAfter.
	nth uint64
	// paths are the paths of the cgroups with names of containers, by id.
	paths map[uint64]string
}

// Path returns the path of the cgroup with an id, as [cgroup.Root.Rel] does, if it has a name of
// a container. A cgroup keeps its path, but may be gone by now.
func (s *Status) Path(id uint64) (rel string, ok bool) {
	rel, ok = s.paths[id]
	return rel, ok
}

// Hook is a place in the kernel where a program of the filter should run.
type Hook struct {
	Name     string `json:"name"`
	Attached bool   `json:"attached"`
	// Cgroup is the path of the policed cgroup, or its former path; empty for hooks of
	// the whole host.
	Cgroup string `json:"cgroup"`
	// Device is the network device of a hook at a device.
	Device  string `json:"device,omitempty"`
	Program uint32 `json:"program_id"`
	// Link is 0 if the program is attached without a link.
	Link uint32 `json:"link_id"`
	// Since is when the program was loaded; zero if the hook is not attached.
	Since time.Time `json:"since,omitzero"`
	// Reason says why the hook is not attached, or does not have the policy that should
	// be in force.
	Reason string `json:"reason,omitempty"`
}

// Optional says whether the filter can be in force without the hook.
func (s *Status) Optional(h Hook) bool {
	return h.Cgroup == "" && !(s.Recognises && h.Name == bpf.CgroupsProgRecognise)
}

// Defence stops what does not pass the hooks.
type Defence struct {
	Name   string `json:"name"`
	Active bool   `json:"active"`
	// Reason says why the defence is not active, or in what it differs from the policy
	// if it is active.
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

// Exposed is a container that may leave its cgroup, or start containers beside it.
type Exposed struct {
	Uncovered
	cgroup.Exposure
}

// WithFamilies is a container with the socket families that it may use.
type WithFamilies struct {
	Uncovered
	Families policy.Families `json:"families"`
}

// InForce says whether the filter does all that it can: it enforces, no container is
// outside it, and no container is without a bucket for lack of room.
func (s *Status) InForce() bool {
	return s.Enforcing && len(s.Uncovered) == 0 && (s.Room == nil || s.Room.Without == 0)
}
