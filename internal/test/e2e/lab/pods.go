package lab

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
)

// Pod adds a container as the network plugins of Kubernetes do. The host's end of its veth is
// device. If bridge is empty, a route of the host leads to the container (ptp, Calico).
// Otherwise the device is a port of that bridge, which is made with the first pod.
func (n *Network) Pod(t testing.TB, bridge, device string) *Container {
	t.Helper()
	id := n.containers.Add(1) + 1
	c := &Container{
		Netns: newNetns(t),
		IPv4:  netip.AddrFrom4([4]byte{10, 90, 0, byte(id)}),
		IPv6:  netip.MustParseAddr(fmt.Sprintf("fd90::%x", id)),
		Port:  device,
	}
	const hostMAC = "02:00:00:00:90:01" // as that of br0
	mac := fmt.Sprintf("02:00:00:00:90:%02x", id)
	leads := device
	n.Host.IP(t, fmt.Sprintf("link add %s address %s type veth peer name eth0 address %s netns %s", device, hostMAC, mac, c.Path()))
	if bridge != "" {
		leads = bridge
		if !n.Host.has(bridge) {
			n.Host.IP(t, fmt.Sprintf("link add %s address %s type bridge mcast_snooping 0", bridge, hostMAC), "link set "+bridge+" up")
		}
		// A port's own address may not be the bridge's.
		n.Host.IP(t, fmt.Sprintf("link set %s address 02:00:00:01:90:%02x", device, id), fmt.Sprintf("link set %s master %s", device, bridge))
	}
	n.Host.IP(t,
		fmt.Sprintf("link set %s up", device),
		fmt.Sprintf("route add %s dev %s", c.IPv4, leads),
		fmt.Sprintf("route add %s dev %s", c.IPv6, leads),
		fmt.Sprintf("neigh add %s lladdr %s dev %s nud permanent", c.IPv4, mac, leads),
		fmt.Sprintf("neigh add %s lladdr %s dev %s nud permanent", c.IPv6, mac, leads))
	c.IP(t,
		"link set eth0 up",
		fmt.Sprintf("addr add %s/32 dev eth0", c.IPv4),
		fmt.Sprintf("addr add %s/128 dev eth0 nodad", c.IPv6),
		fmt.Sprintf("route add %s dev eth0", Gateway4),
		fmt.Sprintf("route add %s dev eth0", Gateway6),
		fmt.Sprintf("route add default via %s", Gateway4),
		fmt.Sprintf("route add default via %s", Gateway6),
		fmt.Sprintf("neigh add %s lladdr %s dev eth0 nud permanent", Gateway4, hostMAC),
		fmt.Sprintf("neigh add %s lladdr %s dev eth0 nud permanent", Gateway6, hostMAC))
	return c
}

// has says whether the namespace has a network device.
func (n *Netns) has(device string) (found bool) {
	n.Do(func() { _, err := net.InterfaceByName(device); found = err == nil })
	return found
}
