package programs

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/test/bench/deny"
	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
)

// place is where the packets seem to be.
type place struct {
	policed   string
	id        uint64
	container uint64
	// outgoing is a struct __sk_buff.
	outgoing []byte
	network  *lab.Netns
}

// loaded is a program with the context in which it runs.
type loaded struct {
	*ebpf.Program
	context []byte
	free    func()
}

func newPlace(root cgroup.Root, c *lab.Cgroups) (_ *place, err error) {
	p := new(place)
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	slice, err := root.Rel(c.Policed)
	if err != nil {
		return nil, err
	}
	if p.id, err = root.ID(slice); err != nil {
		return nil, err
	}
	// In a cgroup of this name, every child is a container.
	p.policed = strings.TrimSuffix(slice, ".slice")
	inner, err := root.Rel(c.Container)
	if err != nil {
		return nil, err
	}
	if p.container, err = root.ID(inner); err != nil {
		return nil, err
	}
	if p.network, err = lab.NewNetns(); err != nil {
		return nil, err
	}
	if err := p.network.Run("link add eth0 type veth peer name eth1", "ip", "-batch", "-"); err != nil {
		return nil, err
	}
	// The packets seem to leave by a device other than the loopback, over which mail is
	// free. Nothing is sent.
	return p, p.network.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		const size, ifindex = 192, 40
		p.outgoing = make([]byte, size)
		binary.NativeEndian.PutUint32(p.outgoing[ifindex:], uint32(eth0.Index))
		return nil
	})
}

func (p *place) close() error {
	if p.network == nil {
		return nil
	}
	return p.network.Close()
}

// inCgroup runs fn with this process in a cgroup: BPF_PROG_TEST_RUN charges the packets to
// the cgroup of the process.
func inCgroup(root cgroup.Root, path string, fn func() error) (err error) {
	home, err := cgroup.OfProcess(os.Getpid())
	if err != nil {
		return err
	}
	enter := func(path string) error { return os.WriteFile(path+"/cgroup.procs", []byte("0"), 0) }
	if err := enter(path); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, enter(root.Path(home))) }()
	return fn()
}

func loadEmptyEgress(p *place, _ *benchmark) (*loaded, error) {
	prog, err := lab.NewEmpty(ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress)
	if err != nil {
		return nil, err
	}
	return &loaded{prog, p.outgoing, func() { prog.Close() }}, nil
}

func loadDeny(p *place, b *benchmark) (*loaded, error) {
	prog, err := deny.New(b.prefixes)
	if err != nil {
		return nil, err
	}
	return &loaded{prog.Program, p.outgoing, func() { prog.Close() }}, nil
}

func loadEgress(p *place, b *benchmark) (_ *loaded, err error) {
	state, err := maps.CreateState()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			state.Close()
		}
	}()
	if b.containers > 1 {
		for id := range uint64(b.containers) {
			if err := state.ByName()[bpf.EgressMapContainers].Put(1<<32+id, maps.Container{}); err != nil {
				return nil, err
			}
		}
	}
	policed, id := p.policed, p.id
	if b.sender != "" {
		policed, id = "/", 1
	}
	if b.sender == container {
		if _, err := state.Enrol(p.container); err != nil {
			return nil, err
		}
	}
	progs, err := loader.Load(b.policy, state, policed, id)
	if err != nil {
		return nil, err
	}
	return &loaded{progs.Egress(), p.outgoing, func() { progs.Close(); state.Close() }}, nil
}
