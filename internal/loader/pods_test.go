package loader_test

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Devices that are found are judged by the beginnings of their names only if one network plugin
// alone makes such names.
func TestPodDevicesByPrefix(t *testing.T) {
	for _, c := range []struct {
		judged []policy.Device
		found  []string
		want   []policy.Device
	}{
		{nil, []string{"cali0123456789a", "cali0123456789b"}, []policy.Device{"cali*"}},
		{nil, []string{"azv0123456789a", "eni0123456789a", "gke0123456789a", "lxc0123456789ab"}, []policy.Device{"azv*", "eni*", "gke*", "lxc*"}},
		{nil, []string{"veth0123abcd", "cni0", "vlan.eth.1"}, []policy.Device{"veth0123abcd", "cni0", "vlan.eth.1"}},
		{[]policy.Device{"podman0", "eni*"}, []string{"eni0123456789a", "podman1"}, []policy.Device{"podman0", "eni*", "podman1"}},
		// Names that are similar only.
		{nil, []string{"lxcbr0", "eni10np1", "calico", "lxc_health", "gkebr"}, []policy.Device{"lxcbr0", "eni10np1", "calico", "lxc_health", "gkebr"}},
	} {
		if got := loader.WithFound(c.judged, c.found); !slices.Equal(got, c.want) {
			t.Errorf("judged %q, found %q: got %q, want %q", c.judged, c.found, got, c.want)
		}
	}
}

// No device that leads out of the host is judged, whatever containers are found behind.
func TestUplinksAreNoPodDevices(t *testing.T) {
	all := loader.WithFound(loader.UsualPodDevices, []string{"eni0123456789a", "lxc0123456789ab", "cali0123456789a", "veth0123abcd"})
	var p policy.Policy
	p.HostDevices = all
	for _, name := range []string{
		"lo", "eth0", "ens3", "enp3s0", "eno1", "enx0123456789ab", "enP2p1s0", "end0", "ena0", "wlan0", "wlp2s0", "wwan0", "wg0", "ib0", "usb0",
		"bond0", "team0", "br0", "br-lan", "vmbr0", "virbr0", "vlan10", "eth0.10", "vxlan.calico", "flannel.1", "cilium_host", "cilium_vxlan",
		"tunl0", "kube-ipvs0", "nodelocaldns", "tailscale0", "veth1", "lxdbr0", "tap0", "vnet0", "macvtap0", "ppp0", "genev_sys_6081", "ovs-system",
	} {
		if loader.CoversDevice(p, name) {
			t.Errorf("%s would be judged", name)
		}
	}
	// The programs look up the names of all devices whose names begin with the same byte.
	for _, d := range loader.UsualPodDevices {
		if strings.ContainsAny(string(d[:1]), "elb") {
			t.Errorf("%s costs each packet of an uplink a look", d)
		}
	}
}

// On a Kubernetes node, the devices of the usual network plugins are judged before there is one.
func TestNodeWithoutPodNetwork(t *testing.T) {
	ownNetwork(t)
	h := newHost(t)
	h.root = cgroup.Root(h.base)
	h.Filter = loader.New(h.pins, h.root)
	check(t, os.Mkdir(filepath.Join(h.base, "kubepods.slice"), 0o755))
	check(t, os.Mkdir(filepath.Join(h.base, "docker.slice"), 0o755))
	p := withDefences(5)
	p.HostDevices = []policy.Device{"cali*"}
	for _, c := range []struct {
		name   string
		scopes []string
		pods   bool
	}{
		{"kubepods.slice", nil, true},
		{"docker.slice", nil, false},
		{"kubepods.slice", []string{"docker-{id}.scope"}, false},
	} {
		p := p
		if c.scopes != nil {
			var err error
			p.Scopes, err = policy.ParseScopes(c.scopes)
			check(t, err)
		}
		s := h.mustAttach(p, c.name)
		want := []policy.Device{"cali*"}
		if c.pods {
			want = append(want, "cni0", "cbr0", "kube-bridge", "weave", "azv*", "gke*")
		}
		if !slices.Equal(s.HostDevices, want) {
			t.Errorf("%s, scopes %q: %q are judged, want %q", c.name, c.scopes, s.HostDevices, want)
		}
		h.mustDetach()
	}
}

// pairOf returns a device as the kernel describes one end of a pair.
func pairOf(kind, name string, index, master, ns int) netlink.Link {
	return &netlink.GenericLink{LinkType: kind, LinkAttrs: netlink.LinkAttrs{Name: name, Index: index, MasterIndex: master, NetNsID: ns}}
}

func TestDevicesOfPods(t *testing.T) {
	const far = 1 << 30 // no such device exists
	links := []netlink.Link{
		pairOf("bridge", "docker0", far, 0, -1), pairOf("bridge", "cni0", far+1, 0, -1), pairOf("openvswitch", "ovs-system", far+2, 0, -1),
		pairOf("veth", "veth1", far+3, far, 1), pairOf("veth", "veth2", far+4, far+1, 2), pairOf("veth", "veth3", far+5, far+2, 3),
		pairOf("netkit", "lxc1", far+6, 0, 4), pairOf("veth", "inside", far+7, 0, -1), pairOf("dummy", "eth0", far+8, 0, -1),
		pairOf("macvlan", "mac0", far+9, 0, 5), pairOf("veth", "cali1", far+10, 0, 6),
	}
	judged := []policy.Device{"cali*"}
	want := map[int][]string{2: {"cni0"}, 3: {"veth3"}, 4: {"lxc1"}}
	if got := loader.NotJudged(links, judged); !reflect.DeepEqual(got, want) {
		t.Errorf("not judged are %v, want %v", got, want)
	}
	if why, err := loader.WhyPassing(links, judged, false); err != nil || why != "" {
		t.Errorf("without a judged port of Open vSwitch: %q, %v", why, err)
	}
	judged = append(judged, "veth3")
	if why, err := loader.WhyPassing(links, judged, false); err != nil || !strings.HasPrefix(why, `at "veth3", Open vSwitch gets packets first`) {
		t.Errorf("with one: %q, %v", why, err)
	}
	if why, err := loader.WhyPassing(links, judged, true); err != nil || why != "" {
		t.Errorf("with one that has a filter: %q, %v", why, err)
	}
}

func TestFewDevices(t *testing.T) {
	for want, names := range map[string][]string{
		`"a"`:                      {"a"},
		`"a" and "b"`:              {"a", "b"},
		`"a", "b" and "c"`:         {"a", "b", "c"},
		`"a", "b", "c" and 1 more`: {"a", "b", "c", "d"},
		`"a", "b", "c" and 3 more`: {"a", "b", "c", "d", "e", "f"},
		`"\x1b[2J" and "b\nc"`:     {"\x1b[2J", "b\nc"},
	} {
		if got := loader.Few(names); got != want {
			t.Errorf("%q: got %s, want %s", names, got, want)
		}
	}
}
