package lab

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Meddling names the parts of the filter that a process tries to get at, by the kernel's ids.
type Meddling struct{ Link, Program, Map uint32 }

// Meddle tries to detach the filter and to change its state, and returns what succeeded.
func (a *Agent) Meddle(m Meddling) (done []string) {
	a.t.Helper()
	a.call("Meddle", m, &done)
	return done
}

// Overrule attaches a program of the agent, which passes everything, to a cgroup until the
// agent ends.
func (a *Agent) Overrule(cgroupPath string) error {
	a.t.Helper()
	var failed string
	a.call("Overrule", cgroupPath, &failed)
	if failed != "" {
		return errors.New(failed)
	}
	return nil
}

// OwnCgroup is the path at which a container sees its cgroup.
const OwnCgroup = "/sys/fs/cgroup"

const bpffs = "/sys/fs/bpf"

// Meddle is Agent.Meddle.
func (*Remote) Meddle(m Meddling, done *[]string) error {
	for _, try := range []struct {
		name string
		do   func() error
	}{
		{"see the pins", func() error { _, err := os.Stat(bpffs + "/egressbpf"); return err }},
		{"mount a bpffs", func() error { return unix.Mount("bpf", bpffs, "bpf", 0, "") }},
		{"open the link", func() error { l, err := link.NewFromID(link.ID(m.Link)); return closed(l, err) }},
		{"open the program", func() error { p, err := ebpf.NewProgramFromID(ebpf.ProgramID(m.Program)); return closed(p, err) }},
		{"open the map", func() error { p, err := ebpf.NewMapFromID(ebpf.MapID(m.Map)); return closed(p, err) }},
		{"detach whatever is there", detachAny},
		{"leave the cgroup", func() error { return os.WriteFile(OwnCgroup+"/cgroup.procs", []byte("0"), 0) }},
		{"make a cgroup", func() error { return os.Mkdir(OwnCgroup+"/other", 0o755) }},
	} {
		if try.do() == nil {
			*done = append(*done, try.name)
		}
	}
	return nil
}

func closed(c interface{ Close() error }, err error) error {
	if err == nil {
		c.Close()
	}
	return err
}

// letAll returns a program that passes everything, and a cgroup.
func letAll(cgroupPath string) (*ebpf.Program, *os.File, error) {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetEgress, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("load: %w", err)
	}
	dir, err := os.Open(cgroupPath)
	if err != nil {
		prog.Close()
		return nil, nil, err
	}
	return prog, dir, nil
}

func detachAny() error {
	prog, dir, err := letAll(OwnCgroup)
	if err != nil {
		return err
	}
	defer prog.Close()
	defer dir.Close()
	return link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupInetEgress})
}

// Overrule is Agent.Overrule. The link ends with the process.
func (r *Remote) Overrule(cgroupPath string, failed *string) error {
	prog, dir, err := letAll(cgroupPath)
	if err == nil {
		r.overruling, err = link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupInetEgress})
	}
	if err != nil {
		*failed = err.Error()
	}
	return nil
}
