package loader

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// A refuser is a strategy for refusing sockets.
type refuser struct {
	name   string
	load   func(spec *ebpf.CollectionSpec, state map[string]*ebpf.Map, types *btf.Cache) (*ebpf.Program, error)
	attach func(prog *ebpf.Program, dir *os.File) (link.Link, error)
}

// refusers are the strategies, the best first: lsm_cgroup runs for policed processes only.
var refusers = []refuser{
	{"lsm_cgroup", loadLSMCgroup, func(prog *ebpf.Program, dir *os.File) (link.Link, error) {
		return link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachLSMCgroup})
	}},
	{"fmod_ret", loadModifyReturn, func(prog *ebpf.Program, _ *os.File) (link.Link, error) {
		return link.AttachTracing(link.TracingOptions{Program: prog})
	}},
}

// findRefuser returns the first strategy that really refuses sockets on this kernel. A
// program can be attached without an error and never be called, if bpf is missing from the
// kernel's list of security modules. So each strategy is tried with a socket that no other
// process would open.
func findRefuser(change *pins.Change, types *btf.Cache) (*refuser, error) {
	if err := change.Step(tryStep + SocketFamilies); err != nil {
		return nil, err
	}
	state, err := maps.CreateState()
	if err != nil {
		return nil, err
	}
	defer state.Close()
	var errs []error
	for i := range refusers {
		if err := refusers[i].try(state, types); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", refusers[i].name, err))
			continue
		}
		return &refusers[i], nil
	}
	return nil, errors.Join(errs...)
}

var errNotAsked = errors.New("it attaches, but the kernel never calls it: `bpf` is missing from its list of security modules (/sys/kernel/security/lsm)")

func (r *refuser) try(state *maps.State, types *btf.Cache) error {
	// inet_create accepts no such protocol: it is not below IPPROTO_MAX (263).
	protocol := 1<<20 + rand.IntN(1<<20)
	prog, err := r.loadFor(state, map[string]any{bpf.FamiliesVarProbeProtocol: int32(protocol)}, types)
	if errors.Is(err, unix.EPERM) {
		return unix.EPERM // the library reports it as a memory limit
	}
	if err != nil {
		return err
	}
	defer prog.Close()
	dir, err := ownCgroup()
	if err != nil {
		return err
	}
	defer dir.Close()
	l, err := r.attach(prog, dir)
	if err != nil {
		return err
	}
	defer l.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err == nil {
		unix.Close(fd)
	}
	if !errors.Is(err, unix.EPERM) {
		return errNotAsked
	}
	return nil
}

func (r *refuser) loadFor(state *maps.State, constants map[string]any, types *btf.Cache) (*ebpf.Program, error) {
	spec, err := bpf.LoadFamilies()
	if err != nil {
		return nil, err
	}
	helper, err := haveHelper(ebpf.Tracing, asm.FnGetCurrentAncestorCgroupId)
	if err != nil {
		helper = false
	}
	constants[bpf.FamiliesVarHasAncestorHelper] = helper
	if err := set(spec, constants); err != nil {
		return nil, err
	}
	shared, err := state.Use(spec)
	if err != nil {
		return nil, err
	}
	return r.load(spec, shared, types)
}

// ownCgroup opens the cgroup of this process.
func ownCgroup() (*os.File, error) {
	root, err := cgroup.FindRoot()
	if err != nil {
		return nil, err
	}
	rel, err := cgroup.OfProcess(os.Getpid())
	if err != nil {
		return nil, err
	}
	return os.Open(root.Path(rel))
}

func loadModifyReturn(spec *ebpf.CollectionSpec, state map[string]*ebpf.Map, types *btf.Cache) (*ebpf.Program, error) {
	var progs struct {
		Program *ebpf.Program `ebpf:"families_fmod"`
	}
	err := spec.LoadAndAssign(&progs, &ebpf.CollectionOptions{MapReplacements: state, Cache: types})
	return progs.Program, maps.Cause(err)
}
