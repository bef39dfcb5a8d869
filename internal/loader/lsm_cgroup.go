package loader

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"runtime"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
)

// loadLSMCgroup loads the program without the library, which does not find the target of
// programs of this type (BPF_LSM_CGROUP) yet. The program needs no relocations except of
// maps.
func loadLSMCgroup(spec *ebpf.CollectionSpec, state map[string]*ebpf.Map, types *btf.Cache) (*ebpf.Program, error) {
	prog := spec.Programs[bpf.FamiliesProgFamiliesLsm]
	target, err := kernelFunction("bpf_lsm_"+prog.AttachTo, types)
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

// newConstants creates the map for a section of constants, with their values.
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
		return nil, fmt.Errorf("create map %s: %w", section, maps.Cause(err))
	}
	return m, nil
}

// kernelFunction returns the BTF id of a function of the kernel.
func kernelFunction(name string, types *btf.Cache) (btf.TypeID, error) {
	kernel, err := types.Kernel()
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
	// The verifier gives up on a signal, and Go's scheduler sends signals at any time.
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
