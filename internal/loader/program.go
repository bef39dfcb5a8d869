package loader

import (
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Programs are the programs of the filter for one cgroup, loaded and not attached.
type Programs struct {
	byHook map[string]*ebpf.Program
	doc    document
	// docMap holds the document, and is bound to all programs.
	docMap *ebpf.Map
}

// Egress returns the program of the packet hook. The caller must not close it.
func (p *Programs) Egress() *ebpf.Program { return p.byHook[bpf.EgressProgEgress] }

// Close closes the programs. The kernel keeps them while they are attached.
func (p *Programs) Close() error {
	errs := []error{p.docMap.Close()}
	for _, prog := range p.byHook {
		errs = append(errs, prog.Close())
	}
	return errors.Join(errs...)
}

// bind binds the document to the programs.
func (p *Programs) bind() (err error) {
	if p.docMap, err = p.doc.newMap(); err != nil {
		return err
	}
	for _, prog := range p.byHook {
		if err := prog.BindMap(p.docMap); err != nil {
			return err
		}
	}
	return nil
}

// note adds what an attach found to the document.
func (p *Programs) note(f *found) error {
	p.doc.Found = f
	return p.doc.write(p.docMap)
}

// loaded is a policy in the kernel: the maps that the programs of all cgroups share.
type loaded struct {
	attach uint64 // the number of the attach
	policy policy.Policy
	rules  *maps.Rules
	maps   map[string]*ebpf.Map
	// types are those of the kernel: to decode them takes longer than to load a program.
	types *btf.Cache
}

func (l *loaded) close() {
	for _, m := range l.maps {
		m.Close()
	}
}

// loadPolicy creates and fills the maps of a policy.
func loadPolicy(p policy.Policy) (_ *loaded, err error) {
	spec, err := bpf.LoadEgress()
	if err != nil {
		return nil, err
	}
	l := &loaded{attach: rand.Uint64(), policy: p, rules: maps.CompileRules(p.Metadata(), p.Block, p.Allowed(), p.SMTP.Exempt), maps: map[string]*ebpf.Map{}, types: btf.NewCache()}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	for name, entries := range map[string]int{
		bpf.EgressMapRules: len(l.rules.Prefixes),
		bpf.EgressMapPorts: len(l.rules.Ports),
	} {
		spec.Maps[name].MaxEntries = uint32(max(entries, 1))
		if l.maps[name], err = ebpf.NewMap(spec.Maps[name]); err != nil {
			return nil, fmt.Errorf("create map %s for %d entries: %w", name, entries, maps.Cause(err))
		}
	}
	return l, l.rules.Load(l.maps[bpf.EgressMapRules], l.maps[bpf.EgressMapPorts])
}

// Load loads the programs that police the cgroup rel with a policy, and does not attach
// them. The programs use the maps of state. If the kernel's verifier rejects a program, the
// error wraps *ebpf.VerifierError. The caller closes the Programs.
func Load(p policy.Policy, state *maps.State, rel string, id uint64) (*Programs, error) {
	l, err := loadPolicy(p)
	if err != nil {
		return nil, err
	}
	defer l.close()
	return l.programs(state, rel, id)
}

// prepare returns the spec of the programs for a policed cgroup, with the constants of the
// policy, and the maps that the programs use instead of their own.
func (l *loaded) prepare(state *maps.State, policed bpf.EgressPolicedCgroup) (*ebpf.CollectionSpec, map[string]*ebpf.Map, error) {
	spec, err := bpf.LoadEgress()
	if err != nil {
		return nil, nil, err
	}
	setRetval, err := haveHelper(ebpf.CGroupSockAddr, asm.FnSetRetval)
	if err != nil {
		return nil, nil, err
	}
	caller, err := howToFindCallers(l.types)
	if err != nil {
		return nil, nil, err
	}
	err = set(spec, map[string]any{
		bpf.EgressVarHasCurrent:      caller.current,
		bpf.EgressVarTaskTgid:        caller.tgid,
		bpf.EgressVarTaskComm:        caller.comm,
		bpf.EgressVarOverLimitReject: l.policy.SMTP.OverLimit == policy.Reject,
		bpf.EgressVarHasSetRetval:    setRetval,
		bpf.EgressVarHasHostSide:     l.policy.HostSide == policy.On,
		bpf.EgressVarPoliced:         policed,
	})
	if err != nil {
		return nil, nil, err
	}
	shared, err := l.share(spec, state)
	return spec, shared, err
}

func (l *loaded) programs(state *maps.State, rel string, id uint64) (_ *Programs, err error) {
	spec, shared, err := l.prepare(state, policedCgroup(rel, id, l.policy.Recognises(rel)))
	if err != nil {
		return nil, err
	}
	var progs struct {
		Egress   *ebpf.Program `ebpf:"egress"`
		Connect4 *ebpf.Program `ebpf:"connect4"`
		Connect6 *ebpf.Program `ebpf:"connect6"`
		Sendmsg4 *ebpf.Program `ebpf:"sendmsg4"`
		Sendmsg6 *ebpf.Program `ebpf:"sendmsg6"`
	}
	// A Collection would keep the constants mapped until the garbage collector runs.
	if err := maps.Cause(spec.LoadAndAssign(&progs, &ebpf.CollectionOptions{MapReplacements: shared, Cache: l.types})); err != nil {
		return nil, fmt.Errorf("load programs: %w", err)
	}
	p := &Programs{doc: document{Version: Version(), Cgroup: rel, Policy: l.policy, Attach: l.attach}, byHook: map[string]*ebpf.Program{
		bpf.EgressProgEgress:   progs.Egress,
		bpf.EgressProgConnect4: progs.Connect4,
		bpf.EgressProgConnect6: progs.Connect6,
		bpf.EgressProgSendmsg4: progs.Sendmsg4,
		bpf.EgressProgSendmsg6: progs.Sendmsg6,
	}}
	if err := p.bind(); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func set(spec *ebpf.CollectionSpec, constants map[string]any) error {
	for name, value := range constants {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set constant %s: %w", name, err)
		}
	}
	return nil
}

// policedCgroup returns a policed cgroup as a constant of the programs.
func policedCgroup(rel string, id uint64, recognises bool) bpf.EgressPolicedCgroup {
	p := bpf.EgressPolicedCgroup{Id: id, Level: cgroup.Level(rel)}
	if recognises {
		p.Recognises = 1
	}
	return p
}

// policedBy returns all cgroups that an attach polices.
func policedBy(targets []*target) (all [maxPoliced]bpf.EgressPolicedCgroup) {
	for i, t := range targets {
		all[i] = policedCgroup(t.rel, t.id, t.recognises)
	}
	return all
}

// share sets the constants of bpf/policy.h, and returns the maps that the programs of spec
// use instead of their own.
func (l *loaded) share(spec *ebpf.CollectionSpec, state *maps.State) (map[string]*ebpf.Map, error) {
	var smtpPorts maps.Words
	for _, port := range l.policy.SMTP.Ports {
		smtpPorts.Set(port)
	}
	coarseClock, err := haveHelper(ebpf.CGroupSKB, asm.FnKtimeGetCoarseNs)
	if err != nil {
		return nil, err
	}
	err = set(spec, map[string]any{
		bpf.EgressVarEnforce:        l.policy.Mode == policy.Enforce,
		bpf.EgressVarHasExempt:      len(l.policy.SMTP.Exempt) > 0,
		bpf.EgressVarHasCoarseClock: coarseClock,
		bpf.EgressVarDefaultLimit:   maps.LimitOf(l.policy.SMTP.Limit()),
		bpf.EgressVarSuspects4:      l.rules.Suspects4,
		bpf.EgressVarSuspects6:      l.rules.Suspects6,
		bpf.EgressVarSmtpPorts:      smtpPorts,
		bpf.EgressVarSketch:         maps.SketchOf(&l.rules.Suspects4, &l.rules.Suspects6, &smtpPorts),
	})
	if err != nil {
		return nil, err
	}
	shared, err := state.Use(spec)
	if err != nil {
		return nil, err
	}
	for name, m := range l.maps {
		spec.Maps[name].MaxEntries = m.MaxEntries()
		shared[name] = m
	}
	return shared, nil
}

// haveHelper says whether the kernel has a helper for programs of a type.
func haveHelper(typ ebpf.ProgramType, helper asm.BuiltinFunc) (bool, error) {
	err := features.HaveProgramHelper(typ, helper)
	var rejected *ebpf.VerifierError
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, ebpf.ErrNotSupported):
		return false, nil
	case errors.As(err, &rejected) && errors.Is(err, unix.EINVAL):
		// The verifier knows the helper, and complains about arguments, which the library leaves
		// out. The library expects EACCES then; of bpf_set_retval, Linux 7.2 says EINVAL.
		return true, nil
	}
	return false, fmt.Errorf("probe %v: %w", helper, err)
}

// callers is how the programs of a socket's address find the calling process.
type callers struct {
	current bool // by helpers
	// tgid and comm are offsets in struct task_struct, for kernels without these helpers; 0
	// if there is no way.
	tgid, comm uint32
}

// howToFindCallers never fails because there is no way: then events lack the process.
func howToFindCallers(types *btf.Cache) (c callers, err error) {
	if c.current, err = haveHelper(ebpf.CGroupSockAddr, asm.FnGetCurrentComm); c.current || err != nil {
		return c, err
	}
	for _, helper := range []asm.BuiltinFunc{asm.FnGetCurrentTask, asm.FnProbeReadKernel} {
		if ok, err := haveHelper(ebpf.CGroupSockAddr, helper); !ok || err != nil {
			return c, err
		}
	}
	kernel, err := types.Kernel()
	if err != nil {
		return c, nil
	}
	var task *btf.Struct
	if kernel.TypeByName("task_struct", &task) != nil {
		return c, nil
	}
	for _, m := range task.Members {
		switch m.Name {
		case "tgid":
			c.tgid = m.Offset.Bytes()
		case "comm":
			c.comm = m.Offset.Bytes()
		}
	}
	return c, nil
}
