package daemon_test

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/daemon"
	"github.com/egressbpf/egressbpf/internal/test/netns"
)

// messages are what the kernel tells of the devices of this thread's network namespace while do
// runs.
func messages(t *testing.T, do func()) (all []netlink.LinkUpdate) {
	t.Helper()
	updates, done := make(chan netlink.LinkUpdate), make(chan struct{})
	check(t, netlink.LinkSubscribe(updates, done))
	defer close(done)
	do()
	const last = "last"
	check(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: last}}))
	for u := range updates {
		if u.Attrs().Name == last {
			break
		}
		all = append(all, u)
	}
	check(t, netlink.LinkDel(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: last}}))
	return all
}

// TestPairs makes pairs of devices in the ways of Docker and of the network plugins of
// Kubernetes. Those of Docker cost no look at anything.
func TestPairs(t *testing.T) {
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	check(t, unix.Unshare(unix.CLONE_NEWNET))
	host, err := netns.Open("/proc/thread-self/ns/net")
	check(t, err)
	defer host.Close()
	pod, err := netns.New()
	check(t, err)
	defer pod.Close()
	link := func(name string) netlink.Link {
		t.Helper()
		l, err := netlink.LinkByName(name)
		check(t, err)
		return l
	}
	fd := func(n *netns.Namespace) (fd int) {
		t.Helper()
		fd, err := unix.Open(n.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		check(t, err)
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	hostFD, podFD := fd(host), fd(pod)
	for _, name := range []string{"docker0", "cni0"} {
		check(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}))
	}
	veth := func(name, peer string) netlink.Link {
		return &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: peer}
	}
	// docker is how libnetwork does it.
	docker := func(name string) {
		check(t, netlink.LinkAdd(veth(name, "p"+name)))
		check(t, netlink.LinkSetMaster(link(name), link("docker0")))
		check(t, netlink.LinkSetNsFd(link("p"+name), podFD))
		check(t, netlink.LinkSetUp(link(name)))
	}
	// inside is how the plugins of the CNI project do it: from within the pod's network.
	inside := func(name string) {
		check(t, pod.Do(func() error {
			if err := netlink.LinkAdd(veth(name, "p"+name)); err != nil {
				return err
			}
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			return netlink.LinkSetNsFd(l, hostFD)
		}))
		check(t, netlink.LinkSetUp(link(name)))
	}
	known, lookups := daemon.NewPorts()
	for _, step := range []struct {
		name string
		do   func()
		want []string
	}{
		{"Docker", func() { docker("veth0") }, nil},
		{"Docker again", func() {
			for i := range 20 {
				docker(fmt.Sprint("veth1", i))
			}
		}, nil},
		{"a pair within the host", func() { check(t, netlink.LinkAdd(veth("a", "b"))) }, nil},
		{"routed", func() { inside("cali1") }, []string{"cali1"}},
		{"changed", func() { check(t, netlink.LinkSetDown(link("cali1"))) }, nil},
		{"a port of another bridge", func() {
			inside("veth2")
			check(t, netlink.LinkSetMaster(link("veth2"), link("cni0")))
		}, []string{"veth2", "cni0"}},
		{"another port", func() {
			inside("veth3")
			check(t, netlink.LinkSetMaster(link("veth3"), link("cni0")))
		}, []string{"veth3", "cni0"}},
	} {
		var got []string
		*lookups = 0
		for _, u := range messages(t, step.do) {
			if u.Header.Type != unix.RTM_NEWLINK {
				continue
			}
			if device, ok := known.Leads(u.Link); ok {
				got = append(got, device)
			}
		}
		if !slices.Equal(got, step.want) {
			t.Errorf("%s: the daemon looks at %q, want %q", step.name, got, step.want)
		}
		if *lookups > 1 || step.name == "Docker again" && *lookups > 0 {
			t.Errorf("%s: %d devices looked up", step.name, *lookups)
		}
	}
}

// TestNoContainerBehindAPair is about a device behind which there is no container: the daemon
// gives up after half a minute, when the periodic check has looked.
func TestNoContainerBehindAPair(t *testing.T) {
	s := newService(t, "host_devices: [mine*]\n")
	end, err := s.Begin(t.Context())
	check(t, err)
	defer end()
	delays := s.Pairs(t.Context(), "veth0")
	var all time.Duration
	for i, d := range delays {
		if all += d; i > 0 && d < delays[i-1] {
			t.Errorf("the daemon looks after %v, want delays that grow", delays)
		}
	}
	if len(delays) == 0 || delays[0] > 100*time.Millisecond || all < 20*time.Second || all > time.Minute || len(delays) > 10 {
		t.Errorf("the daemon looks after %v", delays)
	}
	status, err := s.Filter.Status()
	check(t, err)
	if status.JudgesNewDevice("mine0") {
		if delays := s.Pairs(t.Context(), "mine0"); len(delays) > 0 {
			t.Errorf("at a device that is judged already, the daemon looks after %v", delays)
		}
	}
}
