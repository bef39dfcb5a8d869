package lab

import (
	"errors"
	"fmt"
	"net/netip"
)

// Addresses. Each lab has the same ones, in namespaces of its own.
var (
	Container4 = netip.MustParseAddr("172.17.0.2")
	Container6 = netip.MustParseAddr("fd4d:1::2")
	Host4      = netip.MustParseAddr("192.0.2.1") // to the outside
	Host6      = netip.MustParseAddr("2001:db8:1::1")
	Server4    = netip.MustParseAddr("192.0.2.2")
	Server6    = netip.MustParseAddr("2001:db8:1::2")
	// The server discards what is for these as soon as it comes: it arrives with the address
	// of another device. A route to nowhere would cost more and vary: for IPv4, the kernel
	// makes an entry for each such packet.
	Sink4 = netip.MustParseAddr("198.51.100.9")
	Sink6 = netip.MustParseAddr("2001:db8:5::9")
	// Metadata4 and Metadata6 are the server's.
	Metadata4 = netip.MustParseAddr("169.254.169.254")
	Metadata6 = netip.MustParseAddr("fd00:ec2::254")
)

// Network is a host with a container, and a server beyond.
type Network struct{ Container, Host, Server *Netns }

func newNetwork() (_ *Network, err error) {
	n := new(Network)
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	for _, ns := range []**Netns{&n.Container, &n.Host, &n.Server} {
		if *ns, err = NewNetns(); err != nil {
			return nil, err
		}
		err = (*ns).sysctl(map[string]string{
			// It would make addresses unusable for a second.
			"ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0",
			"ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0",
			// Else connections run out of ports.
			"ipv4/ip_local_port_range": "1024 65535",
			// A rule that rejects has to tell the sender, each time.
			"ipv4/icmp_ratelimit": "0", "ipv4/icmp_msgs_per_sec": "1000000", "ipv6/icmp/ratelimit": "0",
		})
		if err != nil {
			return nil, err
		}
	}
	err = n.Host.sysctl(map[string]string{
		"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1",
		// Docker has a bridge pass no packets between its ports to iptables.
		"bridge/bridge-nf-call-iptables": "0", "bridge/bridge-nf-call-ip6tables": "0",
	})
	if err != nil {
		return nil, err
	}
	return n, n.connect()
}

// connect makes devices, addresses and routes. All neighbours are entered, so that no packet
// waits for an answer.
func (n *Network) connect() error {
	const (
		bridge    = "02:00:00:00:17:01"
		container = "02:00:00:00:17:02"
		uplink    = "02:00:00:00:02:01"
		server    = "02:00:00:00:02:02"
		nobody    = "02:00:00:00:02:03"
	)
	steps := []struct {
		ns    *Netns
		batch string
	}{
		{n.Host, fmt.Sprintf(`
link set lo up
link add docker0 address %[1]s type bridge forward_delay 0 stp_state 0 mcast_snooping 0
link add veth0 type veth peer name eth0 address %[2]s netns %[3]s
link set veth0 master docker0 up
link set docker0 up
addr add 172.17.0.1/16 dev docker0
addr add fd4d:1::1/64 dev docker0 nodad
link add eth0 address %[4]s type veth peer name eth0 address %[5]s netns %[6]s
link set eth0 up
addr add 192.0.2.1/24 dev eth0
addr add 2001:db8:1::1/64 dev eth0 nodad
`, bridge, container, n.Container.Path(), uplink, server, n.Server.Path())},
		{n.Container, fmt.Sprintf(`
link set lo up
link set eth0 up
addr add 172.17.0.2/16 dev eth0
addr add fd4d:1::2/64 dev eth0 nodad
neigh replace 172.17.0.1 lladdr %[1]s dev eth0 nud permanent
neigh replace fd4d:1::1 lladdr %[1]s dev eth0 nud permanent
route add default via 172.17.0.1
route add default via fd4d:1::1
`, bridge)},
		{n.Server, fmt.Sprintf(`
link set lo up
link set eth0 up
addr add 192.0.2.2/24 dev eth0
addr add 2001:db8:1::2/64 dev eth0 nodad
addr add 169.254.169.254/32 dev lo
addr add fd00:ec2::254/128 dev lo nodad
neigh replace 192.0.2.1 lladdr %[1]s dev eth0 nud permanent
neigh replace 2001:db8:1::1 lladdr %[1]s dev eth0 nud permanent
`, uplink)},
		{n.Host, fmt.Sprintf(`
neigh replace 172.17.0.2 lladdr %[1]s dev docker0 nud permanent
neigh replace fd4d:1::2 lladdr %[1]s dev docker0 nud permanent
neigh replace 192.0.2.2 lladdr %[2]s dev eth0 nud permanent
neigh replace 2001:db8:1::2 lladdr %[2]s dev eth0 nud permanent
neigh replace 192.0.2.3 lladdr %[3]s dev eth0 nud permanent
neigh replace 2001:db8:1::3 lladdr %[3]s dev eth0 nud permanent
route add 198.51.100.0/24 via 192.0.2.3
route add 2001:db8:5::/64 via 2001:db8:1::3
route add default via 192.0.2.2
route add default via 2001:db8:1::2
`, container, server, nobody)},
	}
	for _, s := range steps {
		if err := s.ns.Run(s.batch, "ip", "-batch", "-"); err != nil {
			return err
		}
	}
	return nil
}

func (n *Network) close() error {
	var errs []error
	for _, ns := range []*Netns{n.Container, n.Host, n.Server} {
		if ns != nil {
			errs = append(errs, ns.Close())
		}
	}
	return errors.Join(errs...)
}
