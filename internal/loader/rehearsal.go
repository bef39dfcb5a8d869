package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// ErrOtherProgram means that this build has no copy of the program that is in force.
var ErrOtherProgram = errors.New("the program in force is not that of this build")

// Rehearsal judges packets as the packet hook would, and changes nothing: it is the same
// program with the same policy, loaded once more and attached to nothing, with a copy of
// what is kept about one container.
type Rehearsal struct {
	// Policy is the policy of the program.
	Policy policy.Policy
	// Cgroup is the path of the policed cgroup whose program it is; empty if it is none's.
	Cgroup string
	// Incomplete says that a hook of that cgroup is not attached or has another policy.
	Incomplete bool

	id    uint64
	state *maps.State
	prog  *ebpf.Program
}

// Rehearse returns a Rehearsal for the container with a cgroup id and path, or for a new
// container, without either, in the first policed cgroup. The caller closes it. The error
// can wrap ErrNotAttached, ErrOtherProgram and ErrOtherVersion.
func (f *Filter) Rehearse(rel string, id uint64) (_ *Rehearsal, err error) {
	if err := f.pins.Check(); err != nil {
		return nil, err
	}
	state, err := f.State()
	if err != nil {
		return nil, err
	}
	defer state.Close()
	all, last, err := f.settled()
	if err != nil {
		return nil, err
	}
	defer closeAll(all)
	i := slices.IndexFunc(all, func(p *policed) bool { return !p.gone && (rel == "" || cgroup.Within(rel, p.rel)) })
	if i < 0 {
		return nil, fmt.Errorf("no policed cgroup holds %s: %w", f.root.Path(rel), ErrNotAttached)
	}
	p := all[i]
	const boundary = bpf.EgressProgEgress
	info, doc := p.info[boundary], p.docs[boundary]
	if info == nil {
		return nil, fmt.Errorf("the packet hook of %s: %w", f.root.Path(p.rel), ErrNotAttached)
	}
	if doc == nil {
		return nil, ErrOtherProgram
	}
	if doc.Version != Version() {
		return nil, fmt.Errorf("%w, %s, but of version %s", ErrOtherProgram, Version(), doc.Version)
	}
	r, err := RehearsePolicy(doc.Policy, state, id)
	if err != nil {
		return nil, err
	}
	r.Cgroup = f.root.Path(p.rel)
	r.Incomplete = p.isOlder(last) || len(p.info) < len(hooks)
	if err := r.sameAs(info.Program); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// noLevel is deeper than any cgroup.
const noLevel = 1 << 20

// newContainer stands for the id of a new container's cgroup. To the programs, 0 means none.
const newContainer = math.MaxUint64

// RehearsePolicy returns a Rehearsal of a policy, which need not be in force, with a copy of
// what state holds about the container with a cgroup id, or 0 for a new one. The caller closes it.
func RehearsePolicy(p policy.Policy, state *maps.State, id uint64) (_ *Rehearsal, err error) {
	if id == 0 {
		id = newContainer
	}
	r := &Rehearsal{Policy: p, id: id}
	if r.state, err = state.CopyFor(id); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.state.Close()
		}
	}()
	l, err := loadPolicy(p)
	if err != nil {
		return nil, err
	}
	defer l.close()
	// A test run's socket is in the cgroup of this process, which has no ancestor that deep.
	// So every packet counts as one of the policed cgroup itself, which is the container.
	spec, shared, err := l.prepare(r.state, bpf.EgressPolicedCgroup{Id: id, Level: noLevel})
	if err != nil {
		return nil, err
	}
	for name := range spec.Programs {
		if name != bpf.EgressProgEgress {
			delete(spec.Programs, name)
		}
	}
	var loaded struct {
		Egress *ebpf.Program `ebpf:"egress"`
	}
	if err := maps.Cause(spec.LoadAndAssign(&loaded, &ebpf.CollectionOptions{MapReplacements: shared})); err != nil {
		return nil, fmt.Errorf("load program %s: %w", bpf.EgressProgEgress, err)
	}
	r.prog = loaded.Egress
	return r, nil
}

// Close removes the program and the copy.
func (r *Rehearsal) Close() error { return errors.Join(r.prog.Close(), r.state.Close()) }

// sameAs returns ErrOtherProgram unless the program with an id has the same instructions, as
// the kernel's tag of programs tells. Builds without a version of their own need this.
func (r *Rehearsal) sameAs(id ebpf.ProgramID) error {
	inForce, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return fmt.Errorf("open program %d: %w", id, err)
	}
	defer inForce.Close()
	theirs, err := inForce.Info()
	if err != nil {
		return err
	}
	ours, err := r.prog.Info()
	if err != nil {
		return err
	}
	if ours.Tag != theirs.Tag {
		return fmt.Errorf("%w, %s, but of another build", ErrOtherProgram, Version())
	}
	return nil
}

// Entry returns the copy of the container's entry, which is zero for a new container, and
// whether the container may have one.
func (r *Rehearsal) Entry() (c maps.Container, ok bool, err error) {
	if c, ok, err = r.state.Container(r.id); ok || err != nil {
		return c, ok, err
	}
	stateless, err := r.state.Stateless(r.id)
	return c, !stateless, err
}

// Tunnels returns the UDP ports of the host's tunnels, as [maps.State.Tunnels] does.
func (r *Rehearsal) Tunnels() (map[uint16]bool, error) { return r.state.Tunnels() }

// Outcome is what the program did to a packet.
type Outcome struct {
	Passed bool
	// Reason is why it refused the packet, or would refuse it if the mode were enforce;
	// REASON_NONE if it did not.
	Reason bpf.EgressReason
	// Admitted says that it let a mail connection through, for a token unless the rate is
	// unlimited.
	Admitted bool
}

// Send has the program judge a packet, from its IP header on, that leaves by a network device
// of this process's network namespace.
func (r *Rehearsal) Send(etherType uint16, packet []byte, device int) (o Outcome, err error) {
	before, err := r.state.Totals()
	if err != nil {
		return o, err
	}
	const ethernet = 14
	frame := make([]byte, ethernet, ethernet+len(packet))
	binary.BigEndian.PutUint16(frame[12:], etherType)
	skb := make([]byte, 44) // struct __sk_buff, up to ifindex
	binary.NativeEndian.PutUint32(skb[40:], uint32(device))
	returned, err := maps.Run(r.prog, &ebpf.RunOptions{Data: append(frame, packet...), Context: skb})
	if err != nil {
		return o, fmt.Errorf("run program %s: %w", bpf.EgressProgEgress, err)
	}
	after, err := r.state.Totals()
	if err != nil {
		return o, err
	}
	o = Outcome{Passed: returned == 1, Reason: bpf.EgressReasonREASON_NONE, Admitted: after.SmtpAllowed > before.SmtpAllowed}
	for reason := range bpf.EgressReasonREASONS {
		if maps.Refused(after, reason).Packets > maps.Refused(before, reason).Packets {
			o.Reason = reason
		}
	}
	return o, nil
}
