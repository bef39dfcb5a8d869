package e2e

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// plugin is a network plugin of Kubernetes: the names that it gives to its bridge, if it has one,
// and to the host's ends of the pods' veths.
type plugin struct{ name, bridge, veth string }

// plugins has one of each kind: a bridge, names that are judged in advance, names that tell nothing,
// and names that are judged once a pod has one.
var plugins = []plugin{
	{"bridge (flannel, k3s)", "cni0", "veth%08x"},
	{"Calico", "", "cali%011x"},
	{"ptp (kindnet)", "", "veth%07x2"},
	{"AWS VPC CNI", "", "eni%011x"},
}

// pod is a pod of a plugin. It is made as a kubelet makes it: first its network, then its first
// process.
func (s *scene) pod(p plugin, n int) *container {
	s.t.Helper()
	c := &container{
		Container: s.Pod(s.t, p.bridge, fmt.Sprintf(p.veth, n)),
		cgroup:    filepath.Join(s.policed, fmt.Sprintf("%s %d", p.name, n)),
	}
	c.Agent = s.agent(c, c.cgroup)
	return c
}

// getPast returns how many of two packets reach the metadata service, one over IPv4 and one over
// IPv6. They are from a packet socket of a pod, so they do not pass the egress hook.
func (s *scene) getPast(seen *lab.Capture, c *container) int {
	s.t.Helper()
	seen.Forget()
	from4, from6 := at(c.IPv4, 2000), at(c.IPv6, 2000)
	s.forge(c, segment(from4, at(lab.Metadata4, 80), 1, 0, tcpSYN), segment(from6, at(lab.Metadata6, 80), 1, 0, tcpSYN))
	return lab.Count(seen.Settle(s.t), func(p lab.Packet) bool { return p.SYN(80) && (p.Src == from4 || p.Src == from6) })
}

func (s *scene) hostSide() loader.Defence {
	s.t.Helper()
	status, _ := s.Status(s.t)
	return status.Defences[slices.IndexFunc(status.Defences, func(d loader.Defence) bool { return d.Name == loader.HostSide })]
}

// TestPodsAtAttach attaches where each plugin has a pod, and makes another pod of each later,
// while no service runs. Only those of ptp have names that tell nothing; status names them.
func TestPodsAtAttach(t *testing.T) {
	s := newScene(t)
	s.Host.NoBridgeNetfilter(t, "iptables")
	seen := s.Capture(t)
	early, late := map[plugin]*container{}, map[plugin]*container{}
	for _, p := range plugins {
		early[p] = s.pod(p, 0xa1)
		if n := s.getPast(seen, early[p]); n != 2 {
			t.Fatalf("%s: without the filter, %d packets of 2 arrive", p.name, n)
		}
	}
	s.attachHost()
	for _, p := range plugins {
		late[p] = s.pod(p, 0xa2)
	}
	status, _ := s.Status(t)
	// Before 6.4, each device needs a filter of its own.
	each := slices.ContainsFunc(status.Hooks, func(h loader.Hook) bool { return h.Name == "host_ingress" })
	for _, p := range plugins {
		if s.getPast(seen, early[p]) > 0 {
			t.Errorf("%s: a packet of a pod that existed at attach arrives", p.name)
		}
		passes := s.getPast(seen, late[p]) > 0
		d := s.hostSide()
		switch unknown := p.name == "ptp (kindnet)"; {
		case p.bridge == "" && (each || unknown):
			if d.Active || unknown && !each && !strings.Contains(d.Reason, late[p].Port) {
				t.Errorf("%s: status says %+v, want it to name %s", p.name, d, late[p].Port)
			}
		case passes:
			t.Errorf("%s: a packet of a later pod arrives", p.name)
		}
	}
	s.attachHost()
	for _, p := range plugins {
		if s.getPast(seen, late[p]) > 0 {
			t.Errorf("%s: after another attach, a packet arrives", p.name)
		}
	}
	if d := s.hostSide(); !d.Active {
		t.Errorf("status says %+v, want it active", d)
	}
}

// redirector returns a program of traffic control that sends all packets on by a device, as eBPF
// host routing does.
func (s *scene) redirector(name string, device int) *ebpf.Program {
	s.t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R1, int32(device)), asm.Mov.Imm(asm.R2, 0), asm.Mov.Imm(asm.R3, 0), asm.Mov.Imm(asm.R4, 0),
		asm.FnRedirectNeigh.Call(), asm.Return(),
	}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { prog.Close() })
	return prog
}

// TestHostRouting attaches programs at the host's ends of pods' veths that send all packets on
// before netfilter has seen them. The host side cannot stop these, and status says so. What
// passes the egress hook is judged there.
func TestHostRouting(t *testing.T) {
	tcx := func(prog *ebpf.Program, device int) (undo func() error, err error) {
		l, err := link.AttachTCX(link.TCXOptions{Interface: device, Program: prog, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			return nil, err
		}
		return l.Close, nil
	}
	clsact := func(prog *ebpf.Program, device int) (undo func() error, err error) {
		qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: device, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}}
		if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) { // of the host side's own filter
			return nil, err
		}
		filter := &netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: device, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 7, Priority: 2, Protocol: unix.ETH_P_ALL},
			Fd:          prog.FD(), Name: "cil_from_container", DirectAction: true,
		}
		return func() error { return netlink.FilterDel(filter) }, netlink.FilterAdd(filter)
	}
	for name, attach := range map[string]func(*ebpf.Program, int) (func() error, error){"tcx": tcx, "clsact": clsact} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			seen := s.Capture(t)
			c := s.pod(plugin{"Cilium", "", "lxc%012x"}, 1)
			s.attachHost()
			if s.getPast(seen, c) > 0 || !s.hostSide().Active {
				t.Fatalf("without such a program: the packet arrives, or %+v", s.hostSide())
			}
			var undo func() error
			var err error
			s.Host.Do(func() {
				var pod, server *net.Interface
				if pod, err = net.InterfaceByName(c.Port); err != nil {
					return
				}
				if server, err = net.InterfaceByName("server"); err == nil {
					undo, err = attach(s.redirector("cil_from_contai", server.Index), pod.Index)
				}
			})
			if name == "tcx" && errors.Is(err, ebpf.ErrNotSupported) {
				t.Skip("Linux before 6.6: ", err)
			}
			if err != nil {
				t.Fatal(err)
			}
			// Before 6.4, the filter of the host side comes first.
			passes := s.getPast(seen, c) > 0
			if d := s.hostSide(); passes == d.Active || passes && !(strings.Contains(d.Reason, c.Port) && strings.Contains(d.Reason, "cil_from_contai")) {
				t.Errorf("a packet arrives: %t, and status says %+v", passes, d)
			}
			if r := c.Connect(at(lab.Metadata4, 80)); r.Errno == ok {
				t.Error("a connection to a blocked destination succeeds")
			}
			s.Host.Do(func() { err = undo() })
			if err != nil {
				t.Fatal(err)
			}
			if s.getPast(seen, c) > 0 || !s.hostSide().Active {
				t.Errorf("after the program is gone: the packet arrives, or %+v", s.hostSide())
			}
		})
	}
}

// TestNewPods makes pods while the service runs. They are judged soon after their first process
// has begun.
func TestNewPods(t *testing.T) {
	s := newScene(t)
	s.Host.NoBridgeNetfilter(t, "iptables")
	seen := s.Capture(t)
	began := time.Now()
	s.serve("--socket-families", "any")
	// An attach is the longest part of it. The periodic check would come after 30 s.
	longest := 10*time.Second + 10*time.Since(began)
	for _, p := range plugins {
		for n := range 2 {
			c := s.pod(p, n+1)
			began := time.Now()
			soon(t, p.name+": packets of a new pod are judged", func() bool { return s.getPast(seen, c) == 0 })
			took := time.Since(began)
			t.Logf("%s: pod %d is judged %v after its process began", p.name, n+1, took)
			if took > longest {
				t.Errorf("%s: pod %d is judged only after %v", p.name, n+1, took)
			}
		}
	}
}
