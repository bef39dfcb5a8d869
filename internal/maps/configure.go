package maps

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"runtime"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Change is what [State.Configure] does to a container.
type Change struct {
	// Limit becomes the container's own limit if it is not nil; the zero value returns
	// the container to the policy's limit. Tokens that are missing from the bucket stay
	// missing.
	Limit *policy.Limit
	// The flags in Mask become those in Flags.
	Mask, Flags Flag
	// A container with one of these flags keeps its limit, whatever Limit is.
	Unless Flag
}

// Flag is an exception of a single container.
type Flag = bpf.EgressContainerFlag

const (
	// MayReachMetadata allows what the policy's presets block.
	MayReachMetadata Flag = bpf.EgressContainerFlagCONTAINER_METADATA
	// LimitSetByHand marks a limit that no rule changes.
	LimitSetByHand Flag = bpf.EgressContainerFlagCONTAINER_LIMIT_SET
	// AnyFamily allows all socket families; each of its bits allows one (FamilyFlags).
	AnyFamily Flag = bpf.EgressContainerFlagCONTAINER_FAMILIES
)

// FamilyFlags returns, for each number of a family, the flags that a container needs to
// open sockets of that family if the policy refuses them. The flags are kept from version
// to version, so a new number goes to the end of policy.FamilyNumbers.
func FamilyFlags() (flags [64]Flag) {
	for i := range flags {
		flags[i] = AnyFamily
	}
	for i, n := range policy.FamilyNumbers() {
		flags[n] = 1 << (bits.TrailingZeros32(uint32(AnyFamily)) + i)
	}
	return flags
}

// FlagsOf returns the flags that allow a container these families.
func FlagsOf(f policy.Families) (flags Flag) {
	if f == "" {
		return 0
	}
	byNumber := FamilyFlags()
	for _, n := range policy.FamilyNumbers() {
		if f.Mask()>>n&1 != 0 {
			flags |= byNumber[n]
		}
	}
	return flags
}

// FamiliesOf returns the families that a container's flags allow; policy.Restrict if they
// allow none.
func FamiliesOf(flags Flag) policy.Families {
	byNumber := FamilyFlags()
	return policy.FamiliesOf(slices.DeleteFunc(policy.FamilyNumbers(), func(n uint) bool { return flags&byNumber[n] == 0 }))
}

// Configure changes the flags and the limit of the container with a cgroup id, from its
// next packet on. A program makes the change: the system call would write the whole entry,
// and undo what is counted meanwhile. The State keeps the program.
func (s *State) Configure(id uint64, c Change) error {
	if s.configure == nil {
		var err error
		if s.configure, err = LoadProgram(bpf.ControlProgConfigure, s); err != nil {
			return err
		}
	}
	r := bpf.ControlRequest{Id: id, Mask: uint32(c.Mask), Flags: uint32(c.Flags), KeepLimit: 1, Unless: uint32(c.Unless)}
	if c.Limit != nil {
		r.KeepLimit, r.Limit = 0, LimitOf(*c.Limit)
	}
	done, err := ask(s.configure, r)
	if err != nil {
		return fmt.Errorf("configure the container with cgroup %d: %w", id, err)
	}
	if !done {
		return fmt.Errorf("configure the container with cgroup %d: map %s is full, or the container is gone", id, bpf.EgressMapContainers)
	}
	return nil
}

// ask runs a program of bpf/control.bpf.c with values as its input, and says whether the
// program returned 1.
func ask(prog *ebpf.Program, values ...any) (bool, error) {
	const ethernet = 14
	input := make([]byte, ethernet)
	for _, v := range values {
		var err error
		if input, err = binary.Append(input, binary.NativeEndian, v); err != nil {
			return false, err
		}
	}
	done, err := Run(prog, &ebpf.RunOptions{Data: input})
	return done == 1, err
}

// Run runs a program once, without signals of Go's scheduler: before 5.12, a run that is
// interrupted by a signal returns no result, and is repeated. It returns what the program
// returns.
func Run(prog *ebpf.Program, options *ebpf.RunOptions) (uint32, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var signals, old unix.Sigset_t
	signals.Val[0] = 1 << (unix.SIGURG - 1)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &signals, &old); err != nil {
		return 0, err
	}
	defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }()
	return prog.Run(options)
}

// SetLimit gives the container with a cgroup id a limit that no rule changes.
func (s *State) SetLimit(id uint64, l policy.Limit) error {
	return s.Configure(id, Change{Limit: &l, Mask: LimitSetByHand, Flags: LimitSetByHand})
}

// UnsetLimit returns the container to the policy's limit and to the rules. It is no error
// if the container has no limit of its own.
func (s *State) UnsetLimit(id uint64) error {
	return s.Configure(id, Change{Limit: new(policy.Limit), Mask: LimitSetByHand})
}

// LoadProgram loads a program of bpf/control.bpf.c, which uses the State's maps and no
// policy. The caller closes it.
func LoadProgram(name string, s *State) (*ebpf.Program, error) {
	spec, err := bpf.LoadControl()
	if err != nil {
		return nil, err
	}
	return loadProgram(name, spec, s, nil)
}

// loadProgram loads a program of spec that uses the State's maps and others. The caller
// closes it.
func loadProgram(name string, spec *ebpf.CollectionSpec, s *State, others map[string]*ebpf.Map) (*ebpf.Program, error) {
	shared, err := s.Use(spec)
	if err != nil {
		return nil, err
	}
	for name, m := range others {
		spec.Maps[name].MaxEntries, spec.Maps[name].ValueSize = m.MaxEntries(), m.ValueSize()
		shared[name] = m
	}
	spec.Programs = map[string]*ebpf.ProgramSpec{"program": spec.Programs[name]}
	// Kernels before 5.11 charge maps to it.
	if err := RemoveMemlock(); err != nil {
		return nil, err
	}
	var loaded struct {
		Program *ebpf.Program `ebpf:"program"`
	}
	if err := Cause(spec.LoadAndAssign(&loaded, &ebpf.CollectionOptions{MapReplacements: shared})); err != nil {
		return nil, fmt.Errorf("load program %s: %w", name, err)
	}
	return loaded.Program, nil
}
