package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// A refuser is a way of refusing sockets.
type refuser struct {
	name   string
	load   func(spec *ebpf.CollectionSpec, state map[string]*ebpf.Map) (*ebpf.Program, error)
	attach func(prog *ebpf.Program, dir *os.File) (link.Link, error)
}

// refusers are the ways, the best first: the first runs for policed processes only.
var refusers = []refuser{
	{"lsm_cgroup", loadLSMCgroup, func(prog *ebpf.Program, dir *os.File) (link.Link, error) {
		return link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachLSMCgroup})
	}},
	{"fmod_ret", loadModifyReturn, func(prog *ebpf.Program, _ *os.File) (link.Link, error) {
		return link.AttachTracing(link.TracingOptions{Program: prog})
	}},
}

// findRefuser returns the first way that really refuses sockets on this kernel: one
// can be attached without an error and never be asked, where bpf is missing from the
// kernel's list of security modules. So each is tried with a socket of this process's
// own that no other would make.
func findRefuser(change *pins.Change) (*refuser, error) {
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
		if err := refusers[i].try(state); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", refusers[i].name, err))
			continue
		}
		return &refusers[i], nil
	}
	return nil, errors.Join(errs...)
}

var errNotAsked = errors.New("it attaches, and the kernel does not ask it: `bpf` is missing from its list of security modules (/sys/kernel/security/lsm)")

func (r *refuser) try(state *maps.State) error {
	// Of no use to inet_create: not below IPPROTO_MAX (263).
	protocol := 1<<20 + rand.IntN(1<<20)
	prog, err := r.loadFor(state, map[string]any{bpf.FamiliesVarProbeProtocol: int32(protocol)})
	if errors.Is(err, unix.EPERM) {
		return unix.EPERM // the library takes it for a question of memory
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

func (r *refuser) loadFor(state *maps.State, constants map[string]any) (*ebpf.Program, error) {
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
	return r.load(spec, state.Use(spec))
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

func loadModifyReturn(spec *ebpf.CollectionSpec, state map[string]*ebpf.Map) (*ebpf.Program, error) {
	var progs struct {
		Program *ebpf.Program `ebpf:"families_fmod"`
	}
	err := spec.LoadAndAssign(&progs, &ebpf.CollectionOptions{MapReplacements: state})
	return progs.Program, err
}

// loadLSMCgroup does what the library cannot do yet: it does not find the target of
// programs of this type (BPF_LSM_CGROUP). The program needs no relocation but maps.
func loadLSMCgroup(spec *ebpf.CollectionSpec, state map[string]*ebpf.Map) (*ebpf.Program, error) {
	prog := spec.Programs[bpf.FamiliesProgFamiliesLsm]
	target, err := kernelFunction("bpf_lsm_" + prog.AttachTo)
	if err != nil {
		return nil, err
	}
	for i := range prog.Instructions {
		ins := &prog.Instructions[i]
		if !ins.IsLoadFromMap() {
			continue
		}
		m := state[ins.Reference()]
		if m == nil {
			if m, err = newConstants(spec, ins.Reference()); err != nil {
				return nil, err
			}
			defer m.Close()
			state[ins.Reference()] = m
		}
		if err := ins.AssociateMap(m); err != nil {
			return nil, err
		}
	}
	var code bytes.Buffer
	if err := prog.Instructions.Marshal(&code, binary.LittleEndian); err != nil {
		return nil, err
	}
	return progLoad(code.Bytes(), prog, target)
}

// newConstants makes the map of a section of constants, as they are set.
func newConstants(spec *ebpf.CollectionSpec, section string) (*ebpf.Map, error) {
	values := make([]byte, spec.Maps[section].ValueSize)
	for _, v := range spec.Variables {
		if v.SectionName == section {
			copy(values[v.Offset:], v.Value)
		}
	}
	constants := spec.Maps[section].Copy()
	constants.Contents = []ebpf.MapKV{{Key: uint32(0), Value: values}}
	m, err := ebpf.NewMap(constants)
	if err != nil {
		return nil, fmt.Errorf("create map %s: %w", section, err)
	}
	return m, nil
}

// kernelFunction returns the BTF id of a function of the kernel.
func kernelFunction(name string) (btf.TypeID, error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return 0, err
	}
	var fn *btf.Func
	if err := kernel.TypeByName(name, &fn); err != nil {
		return 0, fmt.Errorf("find %s: %w", name, err)
	}
	return kernel.TypeID(fn)
}

// progLoad is BPF_PROG_LOAD of bpf(2).
func progLoad(code []byte, spec *ebpf.ProgramSpec, target btf.TypeID) (*ebpf.Program, error) {
	const logSize = 1 << 16
	log := make([]byte, logSize)
	license := append([]byte(spec.License), 0)
	// The beginning of union bpf_attr, include/uapi/linux/bpf.h.
	attr := struct {
		progType, insnCnt           uint32
		insns, license              uint64
		logLevel, logSize           uint32
		logBuf                      uint64
		kernVersion, progFlags      uint32
		progName                    [16]byte
		progIfindex, expectedAttach uint32
		progBtfFd, funcInfoRecSize  uint32
		funcInfo                    uint64
		funcInfoCnt, lineInfoRec    uint32
		lineInfo                    uint64
		lineInfoCnt, attachBtfID    uint32
	}{
		progType:       uint32(spec.Type),
		insnCnt:        uint32(len(code) / asm.InstructionSize),
		insns:          uint64(uintptr(unsafe.Pointer(&code[0]))),
		license:        uint64(uintptr(unsafe.Pointer(&license[0]))),
		logLevel:       1,
		logSize:        logSize,
		logBuf:         uint64(uintptr(unsafe.Pointer(&log[0]))),
		expectedAttach: uint32(ebpf.AttachLSMCgroup),
		attachBtfID:    uint32(target),
	}
	copy(attr.progName[:15], spec.Name)
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&code[0])
	pin.Pin(&license[0])
	pin.Pin(&log[0])
	var fd uintptr
	errno := unix.EAGAIN
	// The verifier gives up at a signal, which Go's scheduler sends at any time.
	for range 100 {
		fd, _, errno = unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		if errno != unix.EAGAIN {
			break
		}
	}
	if errno != 0 {
		text := strings.TrimSpace(unix.ByteSliceToString(log))
		if i := strings.LastIndexByte(text, '\n'); i >= 0 {
			text = text[i+1:]
		}
		return nil, fmt.Errorf("load program %s: %w (%s)", spec.Name, errno, text)
	}
	return ebpf.NewProgramFromFD(int(fd))
}

// attachFamilies has the sockets of a policed cgroup refused as the policy says.
// Without a way to, an earlier attach's link stays: see kept.
func (f *Filter) attachFamilies(r *refuser, t *target, dir string, p policy.Policy, state *maps.State, change *pins.Change) error {
	pin := filepath.Join(dir, pins.Families)
	if p.Families == policy.AnyFamily {
		return change.DropLink(pin)
	}
	if r == nil {
		return nil
	}
	prog, err := r.loadFor(state, map[string]any{
		bpf.FamiliesVarEnforce:      p.Mode == policy.Enforce,
		bpf.FamiliesVarFamilies:     p.Families.Mask(),
		bpf.FamiliesVarFamilyFlags:  maps.FamilyFlags(),
		bpf.FamiliesVarPolicedId:    t.id,
		bpf.FamiliesVarPolicedLevel: cgroup.Level(t.rel),
		bpf.FamiliesVarRecognises:   t.recognises,
	})
	if err != nil {
		return err
	}
	defer prog.Close()
	if err := bindDocument(document{Version: Version(), Cgroup: t.rel, Policy: p}, prog); err != nil {
		return err
	}
	return change.ReplaceLink(pin, func() (link.Link, error) { return r.attach(prog, t.dir) })
}
