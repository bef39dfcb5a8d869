package dockertest

import (
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// sight says which defence sees an attack, and so can stop it.
type sight int

const (
	hook     sight = iota // its packets pass the packet hook as they are
	families              // it needs a socket of a refused family
	host                  // the kernel makes its packets behind the hook, from packets that may pass
)

// profile is the kind of container in which an attack is tried.
type profile int

const (
	bridged  profile = 1 << iota // Docker's default capabilities on the default network
	netAdmin                     // the same with CAP_NET_ADMIN
	hostNet                      // the default capabilities with --network=host
)

func (p profile) String() string {
	return map[profile]string{bridged: "bridge", netAdmin: "net-admin", hostNet: "host-network"}[p]
}

// target says which packets are to arrive.
type target struct {
	name  string
	to    netip.AddrPort
	proto uint8
	n     int    // packets
	decoy uint16 // a port of an innocent address, for attacks that rewrite
}

const mails, burst = 60, 5

var targets = []target{
	{"metadata4 UDP", at(lab.Metadata4, 80), unix.IPPROTO_UDP, 1, 9000},
	{"metadata4 SYN", at(lab.Metadata4, 80), unix.IPPROTO_TCP, 1, 9001},
	{"metadata6 UDP", at(lab.Metadata6, 80), unix.IPPROTO_UDP, 1, 9002},
	{"metadata6 SYN", at(lab.Metadata6, 80), unix.IPPROTO_TCP, 1, 9003},
	{"mail4", at(lab.Mail4, 25), unix.IPPROTO_TCP, mails, 9004},
	{"mail6", at(lab.Mail6, 25), unix.IPPROTO_TCP, mails, 9005},
}

func (tg target) v6() bool   { return tg.to.Addr().Is6() }
func (tg target) mail() bool { return tg.n == mails }

func only4(tg target) bool     { return !tg.v6() }
func only6(tg target) bool     { return tg.v6() }
func metadata(tg target) bool  { return !tg.mail() }
func metadata6(tg target) bool { return !tg.mail() && tg.v6() }

// either returns the address in the target's family.
func (tg target) either(v4, v6 netip.Addr) netip.Addr {
	if tg.v6() {
		return v6
	}
	return v4
}

// arrived returns how many of the packets for a target have reached the server. At a mail
// port all packets count, whether they open a connection or not.
func (tg target) arrived(packets []lab.Packet) int {
	if tg.mail() {
		seen := map[[2]any]bool{}
		for _, p := range packets {
			if p.Proto == unix.IPPROTO_TCP && p.Dst.Port() == tg.to.Port() {
				seen[[2]any{p.Src, p.Seq}] = true
			}
		}
		return len(seen)
	}
	return lab.Count(packets, func(p lab.Packet) bool { return blocked(p.Dst.Addr()) || blocked(p.Src.Addr()) })
}

func blocked(a netip.Addr) bool {
	return a == lab.Metadata4 || a == lab.Metadata6 || slices.ContainsFunc(spellings, func(s spelling) bool { return s.addr == a })
}

// attack is a way of sending past the filter.
type attack struct {
	name string
	sight
	in     profile
	only   func(target) bool // nil: all targets
	closed bool              // the host side closes its port, also to host networks
	device string            // the device of the host that it needs
	// begin and end are scripts for prisoner.host.
	begin, end string
	send       func(*prisoner, target) error
}

// unavailable says what an attack needs that not every kernel and engine has, and by which
// errors its lack shows. Any other error is a mistake of the test, or an attack that does
// not work any more.
var unavailable = map[string]struct {
	needs  string
	errors []string
}{
	"socketcall":           {"CONFIG_IA32_EMULATION, and seccomp's leave", []string{"function not implemented", "operation not permitted"}},
	"multicast routing":    {"CONFIG_IP_MROUTE", []string{"MRT_INIT: protocol not available"}},
	"io_uring":             {"Linux 5.19, and seccomp's leave", []string{"function not implemented", "operation not permitted", "operation 45: invalid argument"}},
	"AF_XDP":               {"CONFIG_XDP_SOCKETS", []string{"address family not supported"}},
	"RDS":                  {"CONFIG_RDS_TCP", []string{"address family not supported"}},
	"AF_PACKET on VXLAN":   {"CONFIG_VXLAN", []string{"Unknown device type"}},
	"nft egress of VXLAN":  {"CONFIG_VXLAN", []string{"Unknown device type"}},
	"AF_PACKET on macvlan": {"CONFIG_MACVLAN", []string{"Unknown device type"}},
	"tc pedit":             {"CONFIG_NET_ACT_PEDIT and _CSUM", []string{"Failed to load TC action module"}},
	"tun":                  {"CONFIG_TUN", []string{"no such file or directory"}},
	"nft egress":           {"CONFIG_NETFILTER_EGRESS, of Linux 5.16", []string{"not supported"}},
	"segment route":        {"CONFIG_IPV6_SEG6_LWTUNNEL", []string{"not supported"}},
	"AF_PACKET and mirred": {"CONFIG_NET_ACT_MIRRED", []string{"Failed to load TC action module"}},
	"nft dup":              {"CONFIG_NFT_DUP_IPV4 and _IPV6", []string{"not supported", "No such file or directory"}},
	"nft fwd":              {"CONFIG_NFT_FWD_NETDEV", []string{"not supported", "No such file or directory"}},
	// Segments behind option headers, whose checksums no device computes.
	"VXLAN over IPv6, options and segments": {"Linux 6.11", []string{"input/output error"}},
}

// lacks returns what the attack needs and this machine lacks, according to an error; empty if
// the error is of another kind.
func (a attack) lacks(why string) string {
	says := func(text string) bool { return strings.Contains(why, text) }
	if lack, ok := unavailable[a.name]; ok && slices.ContainsFunc(lack.errors, says) {
		return lack.needs
	}
	if a.device != "" && slices.ContainsFunc([]string{"Unknown device type", "not supported", "Error talking to the kernel", "/proc/sys/net/mpls"}, says) {
		return hostDevices[a.device].needs
	}
	return ""
}

var named = flag.String("attacks", "", "regular expression for the names of the attacks that TestAttacks makes")

func attacks() []attack {
	all := slices.Concat(socketAttacks(), headerAttacks(), answerAttacks(), tunnelAttacks(), adminAttacks())
	wanted := regexp.MustCompile(*named)
	return slices.DeleteFunc(all, func(a attack) bool { return !wanted.MatchString(a.name) })
}

// by sends on a road of the lab.
func by(road string) func(*prisoner, target) error {
	return func(p *prisoner, tg target) error { return p.Send(road, p.link, p.forged(tg, p.own(tg))...) }
}

// socketAttacks use sockets other than IP sockets, and raw IP for comparison.
func socketAttacks() []attack {
	all := []attack{
		// One SYN becomes many when it leaves the host. It comes first, while there are tokens.
		{name: "AF_PACKET TSO", sight: families, in: bridged, only: target.mail, send: func(p *prisoner, tg target) error {
			n := tg.n
			tg.n = 1
			return p.Send("AF_PACKET TSO", p.link, p.each(tg, lab.Header{}, func(h lab.Header, payload []byte) [][]byte {
				return whole(h, append(payload, make([]byte, n*lab.TSOSegment)...))
			})...)
		}},
		{name: "raw IP", sight: hook, in: bridged | netAdmin | hostNet, send: by("raw IP")},
		{name: "AF_PACKET", sight: families, in: bridged | netAdmin | hostNet, send: by("AF_PACKET")},
		{name: "AF_PACKET on lo", sight: families, in: bridged, send: func(p *prisoner, tg target) error {
			none := make(net.HardwareAddr, 6)
			return p.Send("AF_PACKET", lab.Link{Device: "lo", Source: none, Gateway: none}, p.forged(tg, p.stranger(tg))...)
		}},
		{name: "multicast routing", sight: families, in: bridged | hostNet, only: only4, send: by("multicast routing")},
		{name: "AF_PACKET by way of another container", sight: families, in: bridged, send: func(p *prisoner, tg target) error {
			return p.Send("AF_PACKET", p.linkTo(p.other.link.Source), p.forged(tg, p.own(tg))...)
		}},
	}
	// A server with SYN cookies accepts a connection from the last packet of the handshake.
	for _, segment := range []struct {
		name  string
		flags uint8
	}{{"ACK", tcpACK}, {"data", tcpACK | tcpPSH}, {"SYN and ACK", tcpSYN | tcpACK}, {"FIN", tcpFIN | tcpACK}, {"no flags", 0}} {
		by := func(road string) func(*prisoner, target) error {
			return func(p *prisoner, tg target) error {
				return p.Send(road, p.link, p.segments(tg, p.own(tg), segment.flags)...)
			}
		}
		all = append(all,
			attack{name: "raw IP, " + segment.name, sight: hook, in: bridged, only: target.mail, send: by("raw IP")},
			attack{name: "AF_PACKET, " + segment.name, sight: families, in: bridged, only: target.mail, send: by("AF_PACKET")})
	}
	for _, road := range []string{
		"AF_PACKET SOCK_DGRAM", "AF_PACKET QDISC_BYPASS", "AF_PACKET VNET_HDR", "AF_PACKET TX_RING", "AF_PACKET padded",
		"SOCK_PACKET", "socketcall", "io_uring", "AF_XDP",
		"VLAN tag", "two VLAN tags", "three VLAN tags", "802.1ad", "802.1ad over VLAN", "two of 802.1ad",
	} {
		all = append(all, attack{name: road, sight: families, in: bridged | hostNet, send: by(road)})
	}
	return all
}

const tcpFIN, tcpSYN, tcpPSH, tcpACK = 0x01, 0x02, 0x08, 0x10

// siege is an engine with containers that attack.
type siege struct {
	*engine
	seen    *lab.Capture
	serial  uint32           // of forged packets
	devices map[string]error // that the host has, or why not
}

// prisoner is a container that attacks.
type prisoner struct {
	*container
	*siege
	profile
	link     lab.Link
	own4     netip.Addr
	own6     netip.Addr
	gw4, gw6 netip.Addr
	other    *prisoner // on the same bridge
	mails    int       // that arrived in spite of a limit
}

// Addresses that nobody has.
var (
	stranger4 = netip.MustParseAddr("172.30.0.200")
	stranger6 = netip.MustParseAddr("fd00:d0c::200")
)

func newSiege(t *testing.T) (*siege, []*prisoner) {
	t.Helper()
	s := &siege{engine: startEngine(t, lab.New(t)), devices: map[string]error{}}
	s.seen = s.Capture(t)
	// Answers, and ICMP errors about answers that cannot be delivered, look like attacks.
	s.Server.NFT(t, "table inet deaf { chain input { type filter hook input priority 0; policy drop; }; }")
	s.Host.Sysctl(t, "ipv6/icmp/ratelimit", "0")      // all answers of the host must come
	s.Host.IP(t, "link set server gso_max_size 1000") // as a device that does not segment
	// A packet that a bridge itself hands to netfilter is judged before the host's IP stack
	// gets it. Test this for only one of the families.
	s.Host.NoBridgeNetfilter(t, "ip6tables")
	// Only the filter may stop packets from a tunnel.
	s.Host.NFT(t, "add table ip filter; add chain ip filter FORWARD { policy accept; }")
	for _, network := range []string{"::ffff:0:0/96", "::/96", "2002::/16", "64:ff9b:1::/48"} {
		s.Host.IP(t, "route add "+network+" via fd91::2")
		s.Server.IP(t, "route add local "+network+" dev lo")
	}
	var routing []string
	for _, sysctl := range []string{
		"ipv4.ip_forward=1", "ipv4.conf.all.rp_filter=0", "ipv4.conf.default.rp_filter=0", "ipv6.conf.all.disable_ipv6=0",
		"ipv6.conf.all.forwarding=1", "ipv6.conf.all.accept_dad=0", "ipv6.conf.default.accept_dad=0",
	} {
		routing = append(routing, "--sysctl", "net."+sysctl)
	}
	tools := []string{"--cap-add", "NET_ADMIN", "-v", "/:/host:ro"}
	if _, err := os.Stat("/dev/net/tun"); err == nil {
		tools = append(tools, "--device", "/dev/net/tun")
	}
	a, b, c := s.prisoner(t, bridged, routing), s.prisoner(t, netAdmin, append(tools, routing...)), s.prisoner(t, hostNet, []string{"--network=host"})
	a.other, b.other = b, a
	// Without connection tracking, fragments are not reassembled before they are delivered.
	for _, table := range []string{"raw", "mangle", "nat", "filter"} {
		s.Host.NFT(t, "add table ip6 "+table+"; delete table ip6 "+table)
	}
	of := strings.NewReplacer("$gw4", a.gw4.String(), "$gw6", a.gw6.String(), "$peer4", a.own4.String(), "$peer6", a.own6.String())
	devices := hostDevices
	if !slices.ContainsFunc(attacks(), func(a attack) bool { return a.device != "" }) {
		devices = nil // emulated, making them takes long
	}
	for name, device := range devices {
		if exit := s.Run(t, exec.Command("sh", "-ec", of.Replace(device.made))); exit.Code != 0 {
			s.devices[name] = fmt.Errorf("%s: %s", name, strings.TrimSpace(exit.Stderr))
		}
	}
	return s, []*prisoner{a, b, c}
}

// mac returns the address of a device.
func mac(ns *lab.Netns, device string) (addr net.HardwareAddr) {
	ns.Do(func() {
		if found, err := net.InterfaceByName(device); err == nil {
			addr = found.HardwareAddr
		}
	})
	return addr
}

func (s *siege) mac(device string) net.HardwareAddr { return mac(s.Host, device) }

// prisoner starts a container.
func (s *siege) prisoner(t *testing.T, in profile, flags []string) *prisoner {
	t.Helper()
	p := &prisoner{container: s.run(t, in.String(), flags...), siege: s, profile: in}
	if in == hostNet {
		p.link = lab.Link{Device: "server", Source: s.mac("server"), Gateway: mac(s.Server, "eth0")}
		p.own4, p.own6 = netip.MustParseAddr("10.91.0.1"), netip.MustParseAddr("fd91::1")
		return p
	}
	said := strings.Fields(s.docker(t, "inspect", "-f",
		"{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}} {{.MacAddress}} {{.Gateway}} {{.IPv6Gateway}}{{end}}", p.id))
	if len(said) != 5 {
		t.Fatalf("container %s has addresses %v", in, said)
	}
	p.own4, p.own6 = netip.MustParseAddr(said[0]), netip.MustParseAddr(said[1])
	p.gw4, p.gw6 = netip.MustParseAddr(said[3]), netip.MustParseAddr(said[4])
	own, err := net.ParseMAC(said[2])
	if err != nil {
		t.Fatal(err)
	}
	p.link = lab.Link{Device: "eth0", Source: own, Gateway: s.mac("docker0")}
	// Packets that wait for a neighbour's address would arrive too late to be seen.
	for _, gateway := range []netip.Addr{p.gw4, p.gw6} {
		testenv.Eventually(t, "reach "+gateway.String(), func() bool { return p.Connect(at(gateway, 80)).Errno == ok })
	}
	return p
}

func (p *prisoner) own(tg target) netip.Addr     { return tg.either(p.own4, p.own6) }
func (p *prisoner) gateway(tg target) netip.Addr { return tg.either(p.gw4, p.gw6) }
func (*prisoner) stranger(tg target) netip.Addr  { return tg.either(stranger4, stranger6) }

func (p *prisoner) linkTo(mac net.HardwareAddr) lab.Link {
	link := p.link
	link.Gateway = mac
	return link
}

// each makes the packets for a target, from the container unless the header says
// otherwise. SYNs have a sequence number and a source port each.
func (p *prisoner) each(tg target, h lab.Header, pack func(lab.Header, []byte) [][]byte) (packets [][]byte) {
	if !h.Src.IsValid() {
		h.Src = p.own(tg)
	}
	if !h.Dst.IsValid() {
		h.Dst = tg.to.Addr()
	}
	h.Proto = tg.proto
	for range tg.n {
		p.serial++
		h.ID = uint16(p.serial)
		port := uint16(1024 + p.serial%60000)
		payload := lab.UDP(port, tg.to.Port(), 8)
		if tg.proto == unix.IPPROTO_TCP {
			payload = lab.TCP(port, tg.to.Port(), p.serial, tcpSYN)
		}
		packets = append(packets, pack(h, payload)...)
	}
	return packets
}

// segments makes TCP packets that do not ask for a connection.
func (p *prisoner) segments(tg target, from netip.Addr, flags uint8) [][]byte {
	return p.each(tg, lab.Header{Src: from}, func(h lab.Header, payload []byte) [][]byte {
		payload[13] = flags
		if flags&tcpPSH != 0 {
			payload = append(payload, "EHLO there\r\n"...)
		}
		return whole(h, payload)
	})
}

func (p *prisoner) forged(tg target, from netip.Addr) [][]byte {
	return p.each(tg, lab.Header{Src: from}, whole)
}

// decoys makes packets that are to be rewritten for the target.
func (p *prisoner) decoys(tg target, from netip.Addr) [][]byte {
	tg.to = at(tg.either(lab.Other4, lab.Other6), tg.decoy)
	return p.forged(tg, from)
}

// host runs a script with the host's tools, in the container, up to the first
// command that fails.
func (p *prisoner) host(script string) error {
	if script == "" {
		return nil
	}
	script = strings.NewReplacer(
		// What one device sends, the other receives; decoys go there.
		"$pair", "ip link add v0 type veth peer name v1 address 02:00:00:00:00:01; ip link set v0 up; ip link set v1 up; "+
			"for to in 198.51.100.1 2001:db8::1; do ip route add $to dev v0; ip neigh add $to lladdr 02:00:00:00:00:01 dev v0; done",
		"$vxlan", "ip link add x0 type vxlan id 42 dstport 4789 remote 172.30.0.1 dev eth0; ip link set x0 up",
		"$vxmac", p.mac("vxlan0").String(), "$gwmac", p.link.Gateway.String(), "$ownmac", p.link.Source.String(),
		"$gw4", p.gw4.String(), "$gw6", p.gw6.String(),
	).Replace(script)
	_, err := p.Command("set -e; export PATH=/usr/sbin:/usr/bin:/sbin:/bin; "+script+"\n", "/bin/busybox", "chroot", "/host", "/bin/sh")
	return err
}

// outcome is the result of an attack.
type outcome struct {
	arrived map[string]int // by target
	failed  string
}

// settle is Capture.Settle for packets that wait in the queues of more devices than a
// sentinel. In each queue, one sentinel overtakes them.
func (p *prisoner) settle(t *testing.T) []lab.Packet {
	t.Helper()
	const devices = 4
	for range devices - 1 {
		p.seen.Settle(t)
	}
	return p.seen.Settle(t)
}

// try makes an attack on all its targets.
func (p *prisoner) try(t *testing.T, a attack) outcome {
	t.Helper()
	if err := p.devices[a.device]; err != nil {
		return outcome{failed: err.Error()}
	}
	began := p.host(a.begin)
	defer func() {
		if err := p.host(a.end); err != nil && began == nil {
			t.Errorf("%s: %v", a.name, err)
		}
	}()
	if began != nil {
		return outcome{failed: began.Error()}
	}
	o := outcome{arrived: map[string]int{}}
	for _, tg := range targets {
		if a.only != nil && !a.only(tg) {
			continue
		}
		p.seen.Forget()
		if err := a.send(p, tg); err != nil && o.failed == "" {
			o.failed = fmt.Sprintf("%s: %v", tg.name, err)
		}
		o.arrived[tg.name] = tg.arrived(p.settle(t))
	}
	return o
}

// defences are the defences in force besides the filter, if the kernel can have them.
type defences struct {
	name               string
	flags              []string
	families, hostSide bool
}

// TestAttacks shows for each attack that it succeeds without the filter, and then what
// stops it: the filter alone, with one other defence, or with all.
func TestAttacks(t *testing.T) {
	s, prisoners := newSiege(t)
	possible := map[*prisoner][]attack{}
	table := map[string][]string{}
	note := func(p *prisoner, a attack, what string) {
		row := fmt.Sprintf("%-12s %-42s", p.profile, a.name)
		table[row] = append(table[row], fmt.Sprintf("%-9s", what))
	}
	for _, p := range prisoners {
		for _, a := range attacks() {
			if a.in&p.profile == 0 {
				continue
			}
			o := p.try(t, a)
			if o.failed != "" {
				if needs := a.lacks(o.failed); needs != "" {
					t.Logf("unavailable: %s, %s needs %s: %s", p.profile, a.name, needs, o.failed)
				} else {
					t.Errorf("without the filter, %s, %s: %s", p.profile, a.name, o.failed)
				}
				continue
			}
			for _, tg := range targets {
				if n, tried := o.arrived[tg.name]; tried && n < tg.n {
					t.Errorf("without the filter, %s, %s: %d of %d arrived at %s", p.profile, a.name, n, tg.n, tg.name)
				}
			}
			possible[p] = append(possible[p], a)
		}
	}
	sets := []defences{
		{"hook alone", []string{"--socket-families", "any", "--host-side", "off"}, false, false},
		{"families", []string{"--host-side", "off"}, true, false},
		{"host side", []string{"--socket-families", "any"}, false, true},
		{"all", nil, true, true},
	}
	t.Cleanup(func() { s.Egressbpf(t, "detach", "--cgroup", policed) }) // also after a failure
	for _, set := range sets {
		t.Run(set.name, func(t *testing.T) {
			s.Egressbpf(t, append([]string{"attach", "--cgroup", policed, "--smtp-rate", "1/day"}, set.flags...)...)
			s.expectDefences(t, &set)
			for _, p := range prisoners {
				p.mails = 0
				for _, a := range possible[p] {
					note(p, a, p.judge(t, set, a, p.try(t, a)))
				}
			}
			// Each of the two containers has a bucket, and their bridge has one.
			if n := prisoners[0].mails + prisoners[1].mails; n > 3*burst {
				t.Errorf("%s: %d mail connections arrived from one bridge, want at most %d", set.name, n, 3*burst)
			}
			s.Egressbpf(t, "detach", "--cgroup", policed)
		})
	}
	var rows []string
	for row, cells := range table {
		rows = append(rows, row+strings.Join(cells, " "))
	}
	slices.Sort(rows)
	t.Logf("what arrived with each set of defences, in turn:\n%s", strings.Join(rows, "\n"))
}

// expectDefences removes from a set the defences that are not active. Their status must say
// why.
func (s *siege) expectDefences(t *testing.T, set *defences) {
	t.Helper()
	status, _ := s.Status(t)
	for name, want := range map[string]*bool{"socket_families": &set.families, "host_side": &set.hostSide} {
		i := slices.IndexFunc(status.Defences, func(d loader.Defence) bool { return d.Name == name })
		if i < 0 {
			t.Fatalf("%s: status does not tell of %s", set.name, name)
		}
		d := status.Defences[i]
		if d.Active && !*want {
			t.Errorf("%s: %s is active", set.name, name)
		}
		if !d.Active && d.Reason == "" {
			t.Errorf("%s: status does not say why %s is not active", set.name, name)
		}
		if !d.Active && *want {
			t.Logf("%s: no %s: %s", set.name, name, d.Reason)
		}
		*want = d.Active
	}
}

// stops says whether an attack must not succeed.
func (set defences) stops(a attack, in profile) bool {
	return a.sight == hook || a.sight == families && set.families || set.hostSide && (in != hostNet || a.closed)
}

// judge checks the outcome of an attack, and describes it: open, stopped, or what arrived.
func (p *prisoner) judge(t *testing.T, set defences, a attack, o outcome) string {
	t.Helper()
	what := fmt.Sprintf("%s, %s, %s", set.name, p.profile, a.name)
	stops := set.stops(a, p.profile)
	var got []string
	open := true
	for _, tg := range targets {
		n, tried := o.arrived[tg.name]
		if !tried {
			if (a.only == nil || a.only(tg)) && o.failed != "" {
				t.Errorf("%s: not tried: %s", what, o.failed)
			}
			continue
		}
		if n > 0 {
			got = append(got, fmt.Sprintf("%s: %d", tg.name, n))
		}
		open = open && n >= tg.n
		switch {
		case !stops && n < tg.n:
			t.Errorf("%s: %d of %d arrived at %s, and nothing is known to have stopped it (%s)", what, n, tg.n, tg.name, o.failed)
		case stops && tg.mail():
			if p.mails += n; n > 0 && p.mails > 2*burst {
				t.Errorf("%s: %d mail connections arrived at %s, %d in all, want at most %d", what, n, tg.name, p.mails, 2*burst)
			}
		case stops && n > 0:
			t.Errorf("%s: arrived at %s", what, tg.name)
		}
	}
	switch {
	case len(got) == 0:
		return "stopped"
	case open:
		return "open"
	}
	return strings.Join(got, ", ")
}
