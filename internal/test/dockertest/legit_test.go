package dockertest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

const busybox = "/bin/busybox"

// big is the file that a web server serves.
var big = func() []byte {
	b := make([]byte, 10<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(b)
	return b
}()

// neighbourhood is an engine with all kinds of peers.
type neighbourhood struct {
	*engine
	seen *lab.Capture

	plain, admin  *container
	router        *container // may make networks
	host, server  *lab.Agent // outside of every container
	web4, second4 netip.Addr // web servers in containers, on the default and on another network
}

// TestLegitimateUses shows that with all defences in force, everything that is not refused
// works as before.
func TestLegitimateUses(t *testing.T) {
	n := newNeighbourhood(t)
	n.Egressbpf(t, "attach", "--cgroup", policed)
	t.Cleanup(func() { n.Egressbpf(t, "detach", "--cgroup", policed) })
	for _, user := range []struct {
		name  string
		agent *lab.Agent
		hops  int // to the server
		v6    bool
	}{
		{"container", n.plain.Agent, 2, true},
		{"NET_ADMIN container", n.admin.Agent, 2, true},
		{"container of another network", n.run(t, "second", "--network", "other", "--sysctl", pingSockets).Agent, 2, false},
		{"host network container", n.run(t, "shared", "--network=host").Agent, 1, true},
		{"host", n.host, 1, true},
	} {
		t.Run(user.name, func(t *testing.T) {
			n.testNames(t, user.agent)
			n.testPing(t, user.agent, user.v6)
			n.testTraceroute(t, user.agent, user.hops, user.v6)
			n.testTransfers(t, user.agent, user.v6)
			n.testMail(t, user.agent)
		})
	}
	t.Run("between containers", n.testBetween)
	t.Run("published ports", n.testPublished)
	t.Run("nested network", n.testNested)
	t.Run("host's services", n.testHostServices)
	t.Run("tunnels to elsewhere", n.testTunnels)
	t.Run("host's packet sockets", n.testPacketSockets)
	t.Run("host's metadata", n.testHostMetadata)
	if total := n.Stats(t).Total; total.Blocked.Packets+total.Blocked.Connects+total.Malformed.Packets+total.HostSide.Packets+total.SMTP.RateLimited > 0 {
		t.Errorf("counted %+v, want nothing stopped", total)
	}
	t.Run("allowed DNS", n.testAllowedDNS)
}

const pingSockets = "net.ipv4.ping_group_range=0 2147483647"

func newNeighbourhood(t *testing.T) *neighbourhood {
	t.Helper()
	n := &neighbourhood{engine: startEngine(t, lab.New(t))}
	n.seen = n.Capture(t)
	n.serve(t)
	n.Host.Sysctl(t, "ipv4/ping_group_range", "0 2147483647")
	// Docker may have made the cgroup above a parent of containers.
	host := cgroups + outside + "/host"
	if err := os.MkdirAll(host, 0o755); err != nil {
		t.Fatal(err)
	}
	n.host, n.server = n.Host.Agent(t, host), n.Server.Agent(t, host)
	n.docker(t, "network", "create", "--subnet", "172.31.0.0/24", "other")
	t.Cleanup(func() { n.docker(t, "network", "rm", "other") })
	n.plain = n.run(t, "plain", "--sysctl", pingSockets)
	n.docker(t, "network", "connect", "other", "plain")
	n.admin = n.run(t, "admin", "--cap-add", "NET_ADMIN", "--sysctl", pingSockets)
	n.router = n.run(t, "router", "--cap-add", "NET_ADMIN", "--cap-add", "SYS_ADMIN", "-v", "/:/host:ro", "--sysctl", "net.ipv4.ip_forward=1")
	web := func(name string, flags ...string) netip.Addr {
		n.sleeper(t, name, flags...)
		n.docker(t, "exec", "-d", name, busybox, "httpd", "-f", "-p", "80", "-h", "/bin")
		addr, err := netip.ParseAddr(n.docker(t, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name))
		if err != nil {
			t.Fatal(err)
		}
		return addr
	}
	n.web4 = web("web", "-p", "8081:80")
	n.second4 = web("second-web", "--network", "other", "-p", "8082:80")
	return n
}

// serve serves big at the server's port 8080.
func (n *neighbourhood) serve(t *testing.T) {
	t.Helper()
	var l net.Listener
	var err error
	n.Server.Do(func() { l, err = net.Listen("tcp", "[::]:8080") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(big) }))
	}()
}

// expectDownload fetches a file with wget and checks its checksum.
func expectDownload(t *testing.T, a *lab.Agent, url string, want [sha256.Size]byte) {
	t.Helper()
	script := fmt.Sprintf("%s wget -q -O - %s | %[1]s sha256sum", busybox, url)
	out, err := a.Command("", busybox, "sh", "-c", script)
	if err != nil || !strings.Contains(out, fmt.Sprintf("%x", want)) {
		t.Errorf("download %s: %v %s", url, err, out)
	}
}

// The containers' web servers serve their busybox.
func expectBusybox(t *testing.T, a *lab.Agent, host string) {
	t.Helper()
	content, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	expectDownload(t, a, "http://"+host+"/busybox", sha256.Sum256(content))
}

func (n *neighbourhood) testNames(t *testing.T, a *lab.Agent) {
	for _, network := range []string{"udp", "tcp"} {
		if addr, err := a.Resolve(lab.Resolver, network); err != nil || addr != lab.ResolvedTo {
			t.Errorf("DNS over %s: %v, %v", network, addr, err)
		}
	}
}

func (n *neighbourhood) testPing(t *testing.T, a *lab.Agent, v6 bool) {
	for _, to := range []netip.Addr{lab.Other4, lab.Other6} {
		if to.Is6() && !v6 {
			continue
		}
		for _, typ := range []int{unix.SOCK_RAW, unix.SOCK_DGRAM} {
			reply := byte(icmpReply)
			if to.Is6() {
				reply = icmp6Reply
			}
			expectICMP(t, a, typ, to, 64, reply)
		}
	}
}

const (
	icmpReply, icmpTimeExceeded   = 0, 11  // RFC 792
	icmp6Reply, icmp6TimeExceeded = 129, 3 // RFC 4443
)

// expectICMP sends an echo request with a hop limit, and waits for an answer of a type.
func expectICMP(t *testing.T, a *lab.Agent, typ int, to netip.Addr, hops int, want byte) {
	t.Helper()
	proto, level, option, header := unix.IPPROTO_ICMP, unix.IPPROTO_IP, unix.IP_TTL, 0
	if to.Is6() {
		proto, level, option = unix.IPPROTO_ICMPV6, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS
	} else if typ == unix.SOCK_RAW {
		header = 20
	}
	s := a.Socket(lab.Family(to), typ, proto)
	defer s.Close()
	s.Set(level, option, hops, nil)
	if r := s.Send(lab.Echo(to.Is6()), at(to, 0)); r.Errno != ok {
		t.Errorf("echo to %s: %v", to, r.Errno)
		return
	}
	// A raw socket sees all ICMP packets that arrive.
	for {
		r := s.Receive()
		if r.Errno != ok {
			t.Errorf("echo to %s, socket type %d, %d hops: no answer of type %d: %v", to, typ, hops, want, r.Errno)
			return
		}
		if r.Data[header] == want {
			return
		}
	}
}

// hops is the number of hops from the user to the server.
func (n *neighbourhood) testTraceroute(t *testing.T, a *lab.Agent, hops int, v6 bool) {
	if hops > 1 {
		expectICMP(t, a, unix.SOCK_RAW, lab.Other4, 1, icmpTimeExceeded)
		if v6 {
			expectICMP(t, a, unix.SOCK_RAW, lab.Other6, 1, icmp6TimeExceeded)
		}
	}
	out, err := a.Command("", busybox, "traceroute", "-n", "-q", "1", "-w", "5", "-m", "5", lab.Other4.String())
	if err != nil || !strings.Contains(out, "  "+lab.Other4.String()+"  ") {
		t.Errorf("traceroute: %v, %s", err, out)
	}
}

func (n *neighbourhood) testTransfers(t *testing.T, a *lab.Agent, v6 bool) {
	for _, to := range []netip.Addr{lab.Other4, lab.Narrow4, lab.Other6, lab.Narrow6} {
		if to.Is6() && !v6 {
			continue
		}
		if sent, received := a.Transfer(at(to, 80), len(big)); received != sent.String() || sent.Bytes != int64(len(big)) {
			t.Errorf("upload to %s: sent %s, received %s", to, sent, received)
		}
		expectDownload(t, a, "http://"+at(to, 8080).String()+"/", sha256.Sum256(big))
	}
}

// The connections of a relay come one after the other.
func (n *neighbourhood) testMail(t *testing.T, a *lab.Agent) {
	for range burst {
		if r := a.Connect(at(lab.Mail4, 25)); r.Errno != ok {
			t.Errorf("mail within the limit: %v after %v", r.Errno, r.Elapsed)
		}
	}
}

func (n *neighbourhood) testBetween(t *testing.T) {
	// The plain container is in both networks.
	for _, web := range []netip.Addr{n.web4, n.second4} {
		expectBusybox(t, n.plain.Agent, web.String())
		expectBusybox(t, n.host, web.String())
	}
	expectBusybox(t, n.admin.Agent, n.web4.String())
}

func (n *neighbourhood) testPublished(t *testing.T) {
	for _, port := range []string{"8081", "8082"} {
		expectBusybox(t, n.server, "10.91.0.1:"+port)
		expectBusybox(t, n.host, "127.0.0.1:"+port)
		expectBusybox(t, n.plain.Agent, "172.30.0.1:"+port)
	}
}

// A network inside a container, behind the container's own NAT.
func (n *neighbourhood) testNested(t *testing.T) {
	const pidFile = "/tmp/nested"
	n.docker(t, "exec", "-d", "router", busybox, "unshare", "-n", busybox, "sh", "-c",
		busybox+" mkdir -p /tmp; echo $$ > "+pidFile+"; exec "+busybox+" sleep 1000000")
	var pid string
	testenv.Eventually(t, "nested network", func() bool {
		out, err := n.router.Command("", busybox, "cat", pidFile)
		pid = strings.TrimSpace(out)
		return err == nil && pid != ""
	})
	script := fmt.Sprintf(`set -e; export PATH=/usr/sbin:/usr/bin:/sbin:/bin; mount -t proc proc /proc; pid=%s
		ip link add n0 type veth peer name n1; ip link set n1 netns $pid
		ip addr add 10.99.0.1/24 dev n0; ip link set n0 up
		nft add table ip nested
		nft 'add chain ip nested out { type nat hook postrouting priority 100; }'
		nft add rule ip nested out ip saddr 10.99.0.0/24 masquerade
		nsenter --net=/proc/$pid/ns/net sh -c 'ip link set lo up; ip addr add 10.99.0.2/24 dev n1; ip link set n1 up; ip route add default via 10.99.0.1'`, pid)
	// In a mount namespace of its own, so that the host's tools see the container's processes.
	if out, err := n.router.Command(script, busybox, "unshare", "-m", busybox, "chroot", "/host", "/bin/sh"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	nested := lab.StartAgent(t, n.command("exec", "-i", "router", busybox, "nsenter", "--net=/proc/"+pid+"/ns/net", program, lab.AgentArg))
	n.testNames(t, nested)
	if sent, received := nested.Transfer(at(lab.Other4, 80), len(big)); received != sent.String() {
		t.Errorf("upload: sent %s, received %s", sent, received)
	}
	n.testMail(t, nested)
}

// A process that is in no container may use packet sockets, and send anywhere.
func (n *neighbourhood) testPacketSockets(t *testing.T) {
	s := n.host.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(unix.ETH_P_IP<<8&0xff00|unix.ETH_P_IP>>8))
	defer s.Close()
	marker := []byte("seen by the host's packet socket")
	from := n.plain.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	defer from.Close()
	if r := from.Send(marker, at(lab.Other4, 9)); r.Errno != ok {
		t.Fatal(r.Errno)
	}
	for {
		r := s.Receive()
		if r.Errno != ok {
			t.Fatalf("a container's packet was not seen: %v", r.Errno)
		}
		if bytes.Contains(r.Data, marker) {
			break
		}
	}
	uplink := lab.Link{Device: "server", Source: mac(n.Host, "server"), Gateway: mac(n.Server, "eth0")}
	everyone := uplink
	everyone.Gateway = bytes.Repeat([]byte{0xff}, 6)
	for name, send := range map[string]struct {
		link   lab.Link
		header lab.Header
	}{
		"to the metadata service": {uplink, lab.Header{Src: netip.MustParseAddr("10.91.0.1"), Dst: lab.Metadata4}},
		"to the IPv6 one":         {uplink, lab.Header{Src: netip.MustParseAddr("fd91::1"), Dst: lab.Metadata6}},
		"as a DHCP client":        {everyone, lab.Header{Src: netip.IPv4Unspecified(), Dst: netip.MustParseAddr("255.255.255.255")}},
	} {
		n.seen.Forget()
		send.header.Proto = unix.IPPROTO_UDP
		if err := n.host.Send("AF_PACKET", send.link, send.header.Finished(lab.UDP(68, 67, 240))); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		n.seen.Await(t, 1, name, func(p lab.Packet) bool { return p.Dst == at(send.header.Dst, 67) })
	}
}

func (n *neighbourhood) testHostMetadata(t *testing.T) {
	for _, to := range []netip.Addr{lab.Metadata4, lab.Metadata6} {
		if sent, received := n.host.Transfer(at(to, 80), 1<<20); received != sent.String() {
			t.Errorf("%s: sent %s, received %s", to, sent, received)
		}
		own := map[bool]netip.Addr{false: netip.MustParseAddr("10.91.0.1"), true: netip.MustParseAddr("fd91::1")}[to.Is6()]
		s := n.host.Socket(lab.Family(to), unix.SOCK_DGRAM, 0)
		if r := s.Bind(at(own, 9999)); r.Errno != ok {
			t.Fatal(r.Errno)
		}
		packet := lab.Header{Src: to, Dst: own, Proto: unix.IPPROTO_UDP}.Finished(lab.UDP(80, 9999, 8))
		if err := n.server.Send("raw IP", lab.Link{}, packet); err != nil {
			t.Fatal(err)
		}
		if r := s.Receive(); r.Errno != ok {
			t.Errorf("nothing came from %s: %v", to, r.Errno)
		}
		s.Close()
	}
}

// The metadata service is the DNS server too.
func (n *neighbourhood) testAllowedDNS(t *testing.T) {
	n.Egressbpf(t, "attach", "--cgroup", policed, "--allow-dns")
	for _, network := range []string{"udp", "tcp"} {
		if addr, err := n.plain.Resolve(lab.Metadata4, network); err != nil || addr != lab.ResolvedTo {
			t.Errorf("DNS over %s: %v, %v", network, addr, err)
		}
	}
	if r := n.plain.Connect(at(lab.Metadata4, 80)); r.Errno != refused {
		t.Errorf("metadata with its DNS allowed: %v, want ECONNREFUSED", r.Errno)
	}
}
