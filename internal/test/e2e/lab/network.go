package lab

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/egressbpf/egressbpf/internal/test/netns"
)

// Addresses of the server. All other addresses of their networks are the server's too.
var (
	Metadata4   = netip.MustParseAddr("169.254.169.254")
	Metadata6   = netip.MustParseAddr("fd00:ec2::254")
	Resolver    = netip.MustParseAddr("169.254.169.253")
	Mail4       = netip.MustParseAddr("198.51.100.25")
	Mail6       = netip.MustParseAddr("2001:db8::25")
	Relay4      = netip.MustParseAddr("198.51.100.26")
	Relay6      = netip.MustParseAddr("2001:db8::26")
	Other4      = netip.MustParseAddr("198.51.100.1")
	Other6      = netip.MustParseAddr("2001:db8::1")
	Narrow4     = netip.MustParseAddr("198.51.100.80") // behind a path MTU of 1280
	Narrow6     = netip.MustParseAddr("2001:db8::80")
	NAT64       = netip.MustParseAddr("64:ff9b::a9fe:a9fe") // of Metadata4
	serverNets  = []string{"169.254.169.0/24", "198.51.100.0/24", "fd00:ec2::/64", "2001:db8::/64", "64:ff9b::/96"}
	narrowPaths = []netip.Addr{Narrow4, Narrow6}
)

// Mapped returns the v4-mapped spelling of an IPv4 address.
func Mapped(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }

// The host's addresses on the containers' bridge.
var (
	// OpenStack's metadata service on networks without IPv4.
	MetadataLocal = netip.MustParseAddr("fe80::a9fe:a9fe%eth0")

	Gateway4 = netip.MustParseAddr("10.90.0.1")
	Gateway6 = netip.MustParseAddr("fd90::1")
)

// The host's and the server's ends of the link between them.
var (
	hostEnd   = [2]netip.Addr{netip.MustParseAddr("10.91.0.1"), netip.MustParseAddr("fd91::1")}
	serverEnd = [2]netip.Addr{netip.MustParseAddr("10.91.0.2"), netip.MustParseAddr("fd91::2")}
)

// Netns is a network namespace that ends with the test.
type Netns struct{ *netns.Namespace }

func newNetns(t testing.TB) *Netns {
	t.Helper()
	made, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	// It ends when no process is in it and nobody has it open.
	t.Cleanup(func() { made.Close() })
	n := &Netns{made}
	// Duplicate address detection would make addresses unusable for a second.
	n.Sysctl(t, "ipv6/conf/all/accept_dad", "0")
	n.Sysctl(t, "ipv6/conf/default/accept_dad", "0")
	n.IP(t, "link set lo up")
	return n
}

// Do runs fn on a thread that is in the namespace. Sockets and processes that fn makes are
// in the namespace.
func (n *Netns) Do(fn func()) {
	if err := n.Namespace.Do(func() error { fn(); return nil }); err != nil {
		panic(err)
	}
}

// Sysctl sets a parameter below /proc/sys/net.
func (n *Netns) Sysctl(t testing.TB, name, value string) {
	t.Helper()
	n.Do(func() {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0); err != nil {
			t.Error(err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
}

// NoBridgeNetfilter keeps bridges from passing packets to the hooks of "iptables" or
// "ip6tables" themselves, as they do with br_netfilter.
func (n *Netns) NoBridgeNetfilter(t testing.TB, hooks string) {
	t.Helper()
	if _, err := os.Stat("/proc/sys/net/bridge"); err == nil {
		n.Sysctl(t, "bridge/bridge-nf-call-"+hooks, "0")
	}
}

// IP runs commands of ip(8), without its name.
func (n *Netns) IP(t testing.TB, commands ...string) {
	t.Helper()
	cmd := exec.Command(tool(t, "ip", "iproute2"), "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n"))
	n.Run(t, cmd)
}

// NFT loads commands of nft(8).
func (n *Netns) NFT(t testing.TB, commands string) {
	t.Helper()
	cmd := exec.Command(tool(t, "nft", "nftables"), "-f", "-")
	cmd.Stdin = strings.NewReader(commands)
	n.Run(t, cmd)
}

// Run runs a command in the namespace. The command must succeed.
func (n *Netns) Run(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	var out []byte
	var err error
	n.Do(func() { out, err = cmd.CombinedOutput() })
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}

// tool returns the path of a command, or names the Debian package that has it.
func tool(t testing.TB, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s not found: install the Debian package %s", name, pkg)
	}
	return path
}

// Network is a host with its containers and a server beyond.
type Network struct {
	Host, Server *Netns
	Mail         map[uint16]*Listener // the server's, by port

	probe      *Container
	containers atomic.Uint32
	sentinels  atomic.Uint64
}

// New makes a network that ends with the test.
func New(t testing.TB) *Network {
	t.Helper()
	n := &Network{Host: newNetns(t), Server: newNetns(t)}
	const hostMAC, serverMAC, bridgeMAC = "02:00:00:00:91:01", "02:00:00:00:91:02", "02:00:00:00:90:01"
	for _, ns := range []*Netns{n.Host, n.Server} {
		ns.Sysctl(t, "ipv4/ip_forward", "1")
		ns.Sysctl(t, "ipv6/conf/all/forwarding", "1")
		for _, conf := range []string{"all", "default"} {
			// Only the filter may stop forged packets.
			ns.Sysctl(t, "ipv4/conf/"+conf+"/rp_filter", "0")
			ns.Sysctl(t, "ipv4/conf/"+conf+"/accept_source_route", "1")
			ns.Sysctl(t, "ipv6/conf/"+conf+"/seg6_enabled", "1")
		}
	}
	// All neighbours are entered, so that no packet waits for an answer.
	host := []string{
		"link add server address " + hostMAC + " type veth peer name eth0 address " + serverMAC + " netns " + n.Server.Path(),
		"link set server up",
		"addr add 10.91.0.1/30 dev server",
		"addr add fd91::1/64 dev server nodad",
		"link add br0 address " + bridgeMAC + " type bridge mcast_snooping 0",
		"link set br0 up",
		"addr add 10.90.0.1/24 dev br0",
		"addr add fd90::1/64 dev br0 nodad",
		"addr add fe80::a9fe:a9fe/64 dev br0 nodad",
	}
	server := []string{
		"link set eth0 up",
		"addr add 10.91.0.2/30 dev eth0",
		"addr add fd91::2/64 dev eth0 nodad",
		"addr add 169.254.169.254/32 dev lo",
		"addr add fd00:ec2::254/128 dev lo nodad",
		"route add 10.90.0.0/24 via 10.91.0.1",
		"route add fd90::/64 via fd91::1",
	}
	for i := range hostEnd {
		host = append(host, fmt.Sprintf("neigh add %s lladdr %s dev server nud permanent", serverEnd[i], serverMAC))
		server = append(server, fmt.Sprintf("neigh add %s lladdr %s dev eth0 nud permanent", hostEnd[i], hostMAC))
	}
	for _, network := range serverNets {
		via := serverEnd[btoi(strings.Contains(network, ":"))]
		host = append(host, fmt.Sprintf("route add %s via %s", network, via))
		server = append(server, "route add local "+network+" dev lo")
	}
	for i, addr := range narrowPaths {
		host = append(host, fmt.Sprintf("route add %s via %s mtu 1280", addr, serverEnd[i]))
	}
	n.Host.IP(t, host...)
	n.Server.IP(t, server...)
	n.Server.Listen(t, 80)
	n.Mail = map[uint16]*Listener{}
	for _, port := range []int{25, 465, 587} {
		n.Mail[uint16(port)] = n.Server.Listen(t, port)
	}
	n.Host.Listen(t, 80)
	n.Server.ServeDNS(t, Resolver, Metadata4)
	n.probe = n.Container(t)
	return n
}

// Container is the network of one container.
type Container struct {
	*Netns
	IPv4, IPv6 netip.Addr
	Port       string // of the host's bridge
}

// Container adds a container to the host's bridge.
func (n *Network) Container(t testing.TB) *Container {
	t.Helper()
	id := n.containers.Add(1) + 1
	c := &Container{
		Netns: newNetns(t),
		IPv4:  netip.AddrFrom4([4]byte{10, 90, 0, byte(id)}),
		IPv6:  netip.MustParseAddr(fmt.Sprintf("fd90::%x", id)),
		Port:  fmt.Sprint("c", id),
	}
	mac := fmt.Sprintf("02:00:00:00:90:%02x", id)
	n.Host.IP(t,
		fmt.Sprintf("link add %s type veth peer name eth0 address %s netns %s", c.Port, mac, c.Path()),
		fmt.Sprintf("link set %s master br0 up", c.Port),
		fmt.Sprintf("neigh add %s lladdr %s dev br0 nud permanent", c.IPv4, mac),
		fmt.Sprintf("neigh add %s lladdr %s dev br0 nud permanent", c.IPv6, mac))
	c.IP(t,
		"link set eth0 up",
		fmt.Sprintf("addr add %s/24 dev eth0", c.IPv4),
		fmt.Sprintf("addr add %s/64 dev eth0 nodad", c.IPv6),
		"route add default via 10.90.0.1",
		"route add default via fd90::1",
		"neigh add 10.90.0.1 lladdr 02:00:00:00:90:01 dev eth0 nud permanent",
		"neigh add fd90::1 lladdr 02:00:00:00:90:01 dev eth0 nud permanent")
	c.Sysctl(t, "ipv4/ping_group_range", "0 2147483647")
	return c
}

// Receipt is what a server says about a stream.
type Receipt struct {
	Bytes int64
	CRC   uint32
}

func (r Receipt) String() string { return fmt.Sprintf("%d bytes, crc %08x", r.Bytes, r.CRC) }

// ResolvedTo is the address of every name.
var ResolvedTo = netip.MustParseAddr("192.0.2.53")

// ServeDNS answers DNS queries for addresses at the given addresses, over UDP and TCP.
func (n *Netns) ServeDNS(t testing.TB, at ...netip.Addr) {
	t.Helper()
	for _, addr := range at {
		var udp net.PacketConn
		var tcp net.Listener
		var err error
		n.Do(func() {
			if udp, err = net.ListenPacket("udp4", addr.String()+":53"); err == nil {
				tcp, err = net.Listen("tcp4", addr.String()+":53")
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { udp.Close(); tcp.Close() })
		go func() {
			buf := make([]byte, 512)
			for {
				n, from, err := udp.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = udp.WriteTo(answer(buf[:n]), from)
			}
		}()
		go func() {
			for {
				c, err := tcp.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					buf := make([]byte, 512)
					// The query comes after a length of two bytes.
					if n, err := c.Read(buf); err == nil && n > 2 {
						a := answer(buf[2:n])
						_, _ = c.Write(append([]byte{byte(len(a) >> 8), byte(len(a))}, a...))
					}
				}()
			}
		}()
	}
}

// answer makes the answer to a DNS query (RFC 1035): ResolvedTo for type A, nothing for
// other types.
func answer(query []byte) []byte {
	end := 12
	for end < len(query) && query[end] != 0 {
		end += int(query[end]) + 1
	}
	if end += 5; end > len(query) {
		return nil
	}
	reply := append([]byte{}, query[:end]...)
	copy(reply[2:12], []byte{0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0})
	if reply[end-3] == 1 {
		reply[7] = 1
		reply = append(reply, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4)
		reply = append(reply, ResolvedTo.AsSlice()...)
	}
	return reply
}
