package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// egressbpf puts the whole tool in force, as far as this kernel supports it.
func (l *Lab) egressbpf() error { return l.attachTool(l.Cgroups.Policed, policy.On) }

func (l *Lab) withoutHost() error { return l.attachTool(l.Cgroups.Policed, policy.Off) }

// hostAlone polices a cgroup that sends nothing.
func (l *Lab) hostAlone() error { return l.attachTool(l.Cgroups.Aside, policy.On) }

// byTrafficControl is the whole tool with the host side of older kernels, whose place is the
// bridge: the way not taken where there are netfilter programs.
func (l *Lab) byTrafficControl() error {
	if err := l.withoutHost(); err != nil {
		return err
	}
	state, err := maps.CreateState()
	if err != nil {
		return err
	}
	defer state.Close()
	rel, err := l.site.Root.Rel(l.Cgroups.Policed)
	if err != nil {
		return err
	}
	id, err := l.site.Root.ID(rel)
	if err != nil {
		return err
	}
	prog, err := loader.LoadHostIngress(policy.Default(), state, rel, id)
	if err != nil {
		return err
	}
	defer prog.Close()
	return l.Host.Do(func() error {
		bridge, err := net.InterfaceByName("docker0")
		if err != nil {
			return err
		}
		at, err := link.AttachTCX(link.TCXOptions{Interface: bridge.Index, Program: prog, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			l.onClose(at.Close)
		}
		return err
	})
}

func (l *Lab) attachTool(policed string, host policy.Switch) error {
	p := policy.Default()
	// What it costs to open a socket of another family is not measured here, and not
	// every kernel can refuse them.
	p.Families, p.HostSide = policy.AnyFamily, host
	p.SMTP.Rate, p.SMTP.Burst = l.Filter.limit().Rate, l.Filter.limit().Burst
	f := loader.New(filepath.Join(pins, strings.TrimSuffix(filepath.Base(l.Cgroups.Policed), ".slice")), l.site.Root)
	l.onClose(func() error {
		err := l.Host.Do(func() error { return f.Detach(context.Background(), nil) })
		if errors.Is(err, loader.ErrNotAttached) {
			return nil
		}
		return err
	})
	return l.Host.Do(func() error {
		// As if the service ran.
		if err := f.Follow(context.Background(), true); err != nil {
			return err
		}
		if err := f.Attach(context.Background(), []string{policed}, p); err != nil {
			return err
		}
		s, err := f.Status()
		if err != nil {
			return err
		}
		for _, d := range s.Defences {
			if d.Name == loader.HostSide && d.Active != (host == policy.On) {
				return fmt.Errorf("host side: active %t: %s", d.Active, d.Reason)
			}
		}
		if !s.Enforcing {
			return errors.New("the filter is not in force")
		}
		return l.site.learn(s)
	})
}
