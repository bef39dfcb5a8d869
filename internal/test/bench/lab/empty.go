package lab

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/internal/loader"
)

// hooks are places in the kernel that run a program.
type hooks struct {
	cgroup    []ebpf.AttachType
	netfilter []link.NetfilterInfo
}

// learn reads at which hooks the filter of a status runs its programs.
func (s *Site) learn(status *loader.Status) error {
	var found hooks
	for _, h := range status.Hooks {
		if !h.Attached || h.Link == 0 {
			continue
		}
		l, err := link.NewFromID(link.ID(h.Link))
		if err != nil {
			return fmt.Errorf("hook %s: %w", h.Name, err)
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			return fmt.Errorf("hook %s: %w", h.Name, err)
		}
		if c := info.Cgroup(); c != nil {
			found.cgroup = append(found.cgroup, ebpf.AttachType(c.AttachType))
		}
		if n := info.Netfilter(); n != nil {
			found.netfilter = append(found.netfilter, *n)
		}
	}
	if s.hooks == nil || len(s.hooks.netfilter) < len(found.netfilter) {
		s.hooks = &found
	}
	return nil
}

// emptyPrograms attaches an empty program to each hook of the whole tool.
func (l *Lab) emptyPrograms() error {
	if l.site.hooks == nil {
		// The tool has to be asked first.
		scratch, err := l.site.New(Filter{Name: Egressbpf, attach: (*Lab).egressbpf})
		if err != nil {
			return err
		}
		if err := scratch.Close(); err != nil {
			return err
		}
	}
	for _, at := range l.site.hooks.cgroup {
		prog, err := emptyAtCgroup(at)
		if err != nil {
			return fmt.Errorf("empty program for %s: %w", at, err)
		}
		if err := errors.Join(l.attachTo(l.Cgroups.Policed, at, prog), prog.Close()); err != nil {
			return err
		}
	}
	return l.attachEmptyNetfilter(l.site.hooks.netfilter)
}

// emptyNetfilter attaches an empty program where any host side has to see packets first.
func (l *Lab) emptyNetfilter() error {
	return l.attachEmptyNetfilter([]link.NetfilterInfo{
		{ProtocolFamily: link.NetfilterProtoIPv4, Hook: link.NetfilterInetPreRouting, Priority: -450},
		{ProtocolFamily: link.NetfilterProtoIPv6, Hook: link.NetfilterInetPreRouting, Priority: -450},
	})
}

func (l *Lab) attachEmptyNetfilter(all []link.NetfilterInfo) error {
	for _, at := range all {
		prog, err := NewEmpty(ebpf.Netfilter, ebpf.AttachNetfilter)
		if err != nil {
			return fmt.Errorf("empty netfilter program: %w", err)
		}
		err = l.Host.Do(func() error {
			held, err := link.AttachNetfilter(link.NetfilterOptions{
				Program: prog, ProtocolFamily: at.ProtocolFamily, Hook: at.Hook, Priority: at.Priority,
			})
			if err == nil {
				l.onClose(held.Close)
			}
			return err
		})
		if err := errors.Join(err, prog.Close()); err != nil {
			return fmt.Errorf("attach an empty netfilter program: %w", err)
		}
	}
	return nil
}

// attachTo attaches a program to a cgroup until the lab is closed.
func (l *Lab) attachTo(cgroup string, at ebpf.AttachType, prog *ebpf.Program) error {
	dir, err := os.Open(cgroup)
	if err != nil {
		return err
	}
	defer dir.Close()
	held, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: prog, Attach: at})
	if err != nil {
		return fmt.Errorf("attach at %s: %w", at, err)
	}
	l.onClose(held.Close)
	return nil
}

func emptyAtCgroup(at ebpf.AttachType) (*ebpf.Program, error) {
	typ := ebpf.CGroupSockAddr
	switch at {
	case ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress:
		typ = ebpf.CGroupSKB
	case ebpf.AttachCGroupInetSockCreate, ebpf.AttachCGroupInet4PostBind, ebpf.AttachCGroupInet6PostBind, ebpf.AttachCgroupInetSockRelease:
		typ = ebpf.CGroupSock
	}
	return NewEmpty(typ, at)
}

// NewEmpty loads a program that lets everything pass.
func NewEmpty(typ ebpf.ProgramType, at ebpf.AttachType) (*ebpf.Program, error) {
	const pass = 1 // and NF_ACCEPT
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         typ,
		AttachType:   at,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, pass), asm.Return()},
		License:      "Dual BSD/GPL",
	})
}
