package loader

import (
	"slices"
	"time"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
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

// Hook is where in the kernel a program of the filter should run.
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
