package verdict

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

const (
	etherARP = 0x0806
	ether8Q  = 0x8100
	etherAD  = 0x88a8

	actUnspec = ^uint32(0) // pass, on to the next filter
	actShot   = 2
)

// ingress is the host side of kernels before 6.4, loaded and not attached. The sockets of test
// runs are in the sender's container, so that container is the sender.
type ingress struct {
	*filter
}

func (p *sender) loadIngress(t testing.TB, pol policy.Policy) *ingress {
	t.Helper()
	state, err := maps.CreateState()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { state.Close() })
	prog, err := loader.LoadHostIngress(pol, state, p.rel, p.policed)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { prog.Close() })
	return &ingress{&filter{p, prog, state, pol, false}}
}

// wants receives a frame and checks what happens to it.
func (f *ingress) wants(t *testing.T, what string, etherType uint16, data []byte, passes bool) {
	t.Helper()
	before := f.counts(t)
	returned := f.run(t, etherType, data, f.device)
	after := f.counts(t)
	want, drops := actUnspec, uint64(0)
	if !passes {
		want, drops = actShot, 1
	}
	if !passes && f.policy.Mode == policy.Audit {
		want = actUnspec
	}
	if returned != want {
		t.Errorf("%s: returned %d, want %d", what, int32(returned), int32(want))
	}
	if got := after.total.HostSide.Packets - before.total.HostSide.Packets; got != drops {
		t.Errorf("%s: %d packets counted in total, want %d", what, got, drops)
	}
	bytes := after.total.HostSide.Bytes - before.total.HostSide.Bytes
	if whole := etherType == etherIPv4 && !passes && int(binary.BigEndian.Uint16(data[2:])) == len(data); whole && bytes != uint64(len(data)) {
		t.Errorf("%s: %d bytes counted, want those from the IP header on, %d", what, bytes, len(data))
	}
	for _, n := range []struct{ after, before maps.Counters }{{after.total, before.total}, {after.container, before.container}} {
		if got := byReason(n.after) - byReason(n.before); got != drops {
			t.Errorf("%s: %d packets counted by reason, want %d", what, got, drops)
		}
	}
	if got := after.container.HostSide.Packets - before.container.HostSide.Packets; got != drops {
		t.Errorf("%s: %d packets counted for the container, want %d", what, got, drops)
	}
}

// byReason returns how many packets the host side has dropped, for whatever reasons.
func byReason(c maps.Counters) (n uint64) {
	for _, t := range c.HostDropped {
		n += t.Packets
	}
	return n
}

// refill fills the device's bucket, and forgets mail connections.
func (f *ingress) refill(t *testing.T) {
	t.Helper()
	f.empty(t, bpf.TcMapDevices, bpf.TcMapMails)
}

// empty removes all entries of some maps.
func (f *ingress) empty(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		m := f.state.ByName()[name]
		var key []byte
		for m.NextKey(nil, &key) == nil {
			if err := m.Delete(key); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// carriesBlocked are rows whose packet contains a packet for a blocked destination. The far end
// may unpack it, but so may a route of the host.
var carriesBlocked = []string{"IPv6 in IPv6"}

// TestHostIngress tests the host side with the rows of all tables. A mail connection that the
// egress hook has not announced takes a token of the device.
func TestHostIngress(t *testing.T) {
	at := newSender(t)
	at.inside(t, func() { at.forwards(t) })
	for _, table := range tables() {
		t.Run(table.name, func(t *testing.T) {
			enforce := policies(t)[table.policy]
			audit := enforce
			audit.Mode = policy.Audit
			all := []*ingress{at.loadIngress(t, enforce), at.loadIngress(t, audit)}
			for _, row := range table.rows {
				etherType := row.packet.etherType()
				if row.packet.length < 0 || len(row.packet.addition) > 0 {
					continue // the frame is longer: see below
				}
				t.Run(row.name, func(t *testing.T) {
					at.inside(t, func() {
						for _, f := range all {
							f.refill(t)
							// A packet that no TCP socket has paid for takes a token too,
							// except answers, which are dropped, and resets.
							h, _ := read(etherType, row.packet.bytes())
							resets := row.want == rateLimited && h.flags&rst != 0 && h.flags&syn == 0
							takes := row.want == admitted || row.want == rateLimited && h.flags&(syn|ack) != syn|ack
							passes := (row.want == pass || row.want == unlimited) && !slices.Contains(carriesBlocked, row.name)
							f.wants(t, string(f.policy.Mode), etherType, row.packet.bytes(),
								passes || takes || resets || etherType == etherARP)
							if row.want == admitted {
								// With data it is not free: some servers accept a
								// connection from it.
								f.wants(t, string(f.policy.Mode)+", repeated", etherType, row.packet.bytes(), !h.data || f.policy.SMTP.Rate.Unlimited())
								f.empty(t, bpf.TcMapMails)
								f.wants(t, string(f.policy.Mode)+", again", etherType, row.packet.bytes(), f.policy.SMTP.Rate.Unlimited())
							}
						}
					})
				})
			}
		})
	}
}

// The addresses of the host that forwards.
const host4, host6 = "192.0.2.1", "2001:db8:77::1"

// forwards makes the namespace of the sender a host with routes to all destinations. The caller must be inside.
func (p *sender) forwards(t *testing.T) {
	t.Helper()
	for _, args := range []string{
		"link set lo up", "link set verdict up",
		"addr add " + host4 + "/24 dev verdict", "addr add " + host6 + "/128 dev lo", // at once
		"route add default dev verdict", "-6 route add default dev verdict",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
	}
	testenv.Eventually(t, "have "+host6, func() bool {
		out, err := exec.Command("ip", "-6", "route", "show", "table", "local").CombinedOutput()
		return err == nil && strings.Contains(string(out), host6)
	})
	for _, family := range []string{"ipv4", "ipv6"} {
		if err := os.WriteFile("/proc/sys/net/"+family+"/conf/all/forwarding", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// tagged puts VLAN tags before a packet, and returns it with the type of the first tag.
func tagged(p packet, tags ...uint16) (etherType uint16, data []byte) {
	etherType, data = p.etherType(), p.bytes()
	for _, tag := range slices.Backward(tags) {
		data = append([]byte{0, 7, byte(etherType >> 8), byte(etherType)}, data...)
		etherType = tag
	}
	return etherType, data
}

// TestHostIngressFrames tests what is before and after the packet.
func TestHostIngressFrames(t *testing.T) {
	at := newSender(t)
	f := at.loadIngress(t, policies(t)["default"])
	frame := func(what string, passes bool, etherType uint16, data []byte) {
		t.Helper()
		f.wants(t, what, etherType, data, passes)
	}
	at.inside(t, func() {
		for _, dst := range []string{open4, open6, metadata, "fd00:ec2::254"} {
			p := packet{dst: dst, payload: udp(53)}
			passes := dst == open4 || dst == open6
			for n := range 4 {
				frame(fmt.Sprintf("%s with padding of %d", dst, n), passes, p.etherType(), append(p.bytes(), make([]byte, n*20)...))
			}
			for _, tags := range [][]uint16{{ether8Q}, {etherAD}, {ether8Q, ether8Q}, {etherAD, ether8Q}, {ether8Q, etherAD, ether8Q}} {
				etherType, data := tagged(p, tags...)
				frame(fmt.Sprintf("%s behind tags %x", dst, tags), passes, etherType, data)
			}
			etherType, data := tagged(p, ether8Q, ether8Q, ether8Q, ether8Q)
			frame(dst+" behind four tags", false, etherType, data)
		}
		blocked := packet{dst: metadata, payload: udp(53)}
		frame("a packet cut short", false, etherIPv4, packet{dst: open4, payload: udp(53), length: 1}.bytes())
		frame("IPv6 without a length", false, etherIPv6, packet{dst: open6, payload: udp(53), length: -8}.bytes())
		frame("IPv4 without a length", false, etherIPv4, packet{dst: open4, payload: udp(53), length: -28}.bytes())
		frame("ARP", true, etherARP, make([]byte, 28))
		frame("ARP behind a tag", false, ether8Q, append([]byte{0, 7, 8, 6}, make([]byte, 28)...))
		frame("MPLS", false, 0x8847, append([]byte{0, 0, 1, 64}, blocked.bytes()...))
		frame("IEEE 802.3", false, 0x0100, append([]byte{0xaa, 0xaa, 3, 0, 0, 0, 8, 0}, blocked.bytes()...))
	})
}

// announce announces mail to the host side as the egress hook does, for mail that was let
// through some time ago.
func (f *ingress) announce(t *testing.T, p packet, seq uint32, ago time.Duration) {
	t.Helper()
	key := bpf.EgressAnnouncement{Dst: netip.MustParseAddr(p.dst).As16(), Dport: htons(25), Seq: bits.ReverseBytes32(seq)}
	if segment := p.payload.data; segment[13]&(syn|ack) != syn {
		key.Src = addressOf(p.bytes()[12:16])
		key.Sport = binary.NativeEndian.Uint16(segment)
		key.Ack = binary.NativeEndian.Uint32(segment[8:])
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	if err := f.state.ByName()[bpf.EgressMapAdmitted].Put(key, uint64(now.Nano())-uint64(ago)); err != nil {
		t.Fatal(err)
	}
}

// segmentOf returns a segment of a mail connection, with small sequence numbers.
func segmentOf(flags byte, seq, acknowledged byte) packet {
	return packet{dst: open4, payload: tcp(25, flags).edit(7, seq).edit(11, acknowledged)}
}

// TestHostIngressMail checks that packets that the egress hook has announced pass, once for
// each announcement, and so do the packets that continue the connection.
func TestHostIngressMail(t *testing.T) {
	at := newSender(t)
	f := at.loadIngress(t, policies(t)["default"])
	wants := func(what string, p packet, passes bool) {
		t.Helper()
		f.wants(t, what, etherIPv4, p.bytes(), passes)
	}
	at.inside(t, func() {
		wants("the device's only token", segmentOf(syn, 1, 0), true)
		wants("its repeat", segmentOf(syn, 1, 0), true)
		wants("without a token", segmentOf(syn, 2, 0), false)
		f.announce(t, segmentOf(syn, 3, 0), 3, 0)
		wants("announced", segmentOf(syn, 3, 0), true)
		for range 3 {
			wants("its repeats", segmentOf(syn, 3, 0), true)
		}
		wants("what follows", segmentOf(ack, 4, 1), true)
		wants("the SYN again", segmentOf(syn, 3, 0), false)
		f.announce(t, segmentOf(syn, 3, 0), 3, 0)
		wants("opened again with the same number", segmentOf(syn, 3, 0), true)
		f.announce(t, segmentOf(syn, 5, 0), 5, 1100*time.Millisecond)
		wants("held back", segmentOf(syn, 5, 0), false)
		wants("another's", packet{src: "192.0.2.9", dst: open4, payload: tcp(25, ack)}, false)
		wants("an answer", packet{dst: open4, payload: tcp(25, syn|ack).from(1)}, false)
		wants("a reset", packet{dst: open4, payload: tcp(25, rst).from(1)}, true)
		unknown := packet{dst: open4, payload: tcp(25, ack).from(2).edit(7, 9)}
		wants("data of no connection", unknown, false)
		f.announce(t, unknown, 9, 0)
		wants("data that was announced", unknown, true)
	})
}

// TestHostIngressCookies sends segments from which a server with SYN cookies accepts a
// connection: any segment with the first sequence number that acknowledges the server's
// answer.
func TestHostIngressCookies(t *testing.T) {
	at := newSender(t)
	f := at.loadIngress(t, policies(t)["default"])
	wants := func(what string, p packet, passes bool) {
		t.Helper()
		f.wants(t, what, etherIPv4, p.bytes(), passes)
	}
	with := func(p packet, bytes int) packet {
		p.payload = p.payload.grow(bytes)
		return p
	}
	open := func() {
		t.Helper()
		f.refill(t)
		wants("SYN", segmentOf(syn, 1, 0), true)
		wants("the first", segmentOf(ack, 2, 10), true)
	}
	at.inside(t, func() {
		open()
		wants("the first once more", segmentOf(ack, 2, 10), false)
		wants("the first with another MSS", segmentOf(ack, 2, 13), false)
		wants("the first with another MSS", segmentOf(ack, 2, 7), false)
		f.announce(t, segmentOf(ack, 2, 10), 2, 0)
		wants("the first once more, which was paid for", segmentOf(ack, 2, 10), true)
		wants("and again", segmentOf(ack, 2, 10), false)
		for n := range byte(5) {
			wants("with newer acknowledgements", segmentOf(ack, 2, 14+4*n), true)
		}
		wants("the first", segmentOf(ack, 2, 10), false)
		said := with(segmentOf(ack, 2, 30), 10)
		wants("data", said, true)
		wants("its repeat, of which the egress hook has not told", said, false)
		f.announce(t, said, 2, 0)
		wants("its repeat", said, true)
		wants("no newer acknowledgement", segmentOf(ack, 2, 30), false)
		wants("later data", segmentOf(ack, 3, 10), true)
		wants("a keep-alive", segmentOf(ack, 1, 30), true)
		wants("a reset", segmentOf(rst, 2, 10), true)

		open()
		wants("what a client says that speaks first", with(segmentOf(ack, 2, 10), 10), true)
		wants("its repeat", with(segmentOf(ack, 2, 10), 10), false)

		f.refill(t)
		wants("SYN", segmentOf(syn, 1, 0), true)
		far := segmentOf(ack, 2, 10)
		far.payload = far.payload.edit(4, 0x7f)
		wants("somebody's guess", far, true)
		wants("the repeat of the SYN", segmentOf(syn, 1, 0), true)
		wants("what reaches into the window", with(segmentOf(ack, 1, 10), 10), true)
		wants("the SYN again", segmentOf(syn, 1, 0), false)

		f.refill(t)
		wants("SYN with data", with(segmentOf(syn, 1, 0), 10), true)
		wants("its repeat without", segmentOf(syn, 1, 0), false)
	})
}

// TestHostIngressPermits checks that as many packets to the metadata service pass as the egress
// hook has permitted.
func TestHostIngressPermits(t *testing.T) {
	at := newSender(t)
	f := at.loadIngress(t, policies(t)["default"])
	p := packet{dst: metadata, payload: tcp(80, syn)}
	flow := bpf.EgressFlowKey{
		Src: addressOf(p.bytes()[12:16]), Dst: netip.MustParseAddr(metadata).As16(),
		Sport: htons(40000), Dport: htons(80), Proto: protoTCP,
	}
	at.inside(t, func() {
		permit := func(p bpf.EgressPermit) {
			t.Helper()
			if err := f.state.ByName()[bpf.EgressMapPermitted].Put(flow, p); err != nil {
				t.Fatal(err)
			}
		}
		f.wants(t, "without a permit", etherIPv4, p.bytes(), false)
		permit(bpf.EgressPermit{Packets: 2})
		other := packet{dst: metadata, payload: tcp(80, syn).from(40001)}
		f.wants(t, "of another flow", etherIPv4, other.bytes(), false)
		f.wants(t, "the first", etherIPv4, p.bytes(), true)
		f.wants(t, "the second", etherIPv4, p.bytes(), true)
		f.wants(t, "the third", etherIPv4, p.bytes(), false)
		bare := packet{dst: metadata, payload: tcp(80, ack).edit(7, 9)}
		f.wants(t, "an acknowledgement", etherIPv4, bare.bytes(), false)
		permit(bpf.EgressPermit{Closing: bits.ReverseBytes32(9), Closed: 1})
		f.wants(t, "an acknowledgement of its kernel's, after a FIN", etherIPv4, bare.bytes(), true)
		f.wants(t, "with another number", etherIPv4, packet{dst: metadata, payload: tcp(80, ack).edit(7, 8)}.bytes(), false)
		f.wants(t, "a SYN with that number", etherIPv4, packet{dst: metadata, payload: tcp(80, syn).edit(7, 9)}.bytes(), false)
		f.wants(t, "data", etherIPv4, packet{dst: metadata, payload: tcp(80, ack).edit(7, 9).grow(1)}.bytes(), false)
	})
}

// tunnelInsides are packets inside a tunnel, which must be read as closely as others.
func (f *ingress) tunnelInsides(t *testing.T, wants func(what, to string, payload segment, passes bool)) {
	t.Helper()
	const lsrr = 131
	for what, p := range map[string]packet{
		"two extension headers":    {dst: "fd00:ec2::254", payload: hopOpts(dstOpts(udp(53)))},
		"mail behind two of them":  {dst: open6, payload: hopOpts(dstOpts(tcp(25, syn)))},
		"a routing header":         {dst: open6, payload: routing(1, udp(53))},
		"a source route":           {dst: open4, payload: udp(53), options: []byte{optNop, lsrr, 7, 4, 169, 254, 169, 254}},
		"a first fragment of 8":    {dst: open4, payload: tcp(25, syn).cut(8), flags: 1},
		"a first fragment of 8, 6": {dst: open6, payload: fragment(0, true, tcp(25, syn).cut(8))},
		"a later fragment":         {dst: metadata, payload: tcp(25, syn), offset: 24},
		"as the metadata service":  {src: metadata, dst: open4, payload: udp(53)},
	} {
		for _, host := range []string{host4, host6} {
			for name, tunnel := range map[string]segment{"VXLAN": vxlan(p), "GENEVE": geneve(p, 8)} {
				wants(name+" with "+what, host, tunnel, false)
				wants(name+" with "+what+", padded", host, tunnel.grow(100), false)
			}
		}
	}
	wants("VXLAN behind two extension headers", host6, hopOpts(dstOpts(vxlan(packet{dst: metadata, payload: udp(53)}))), false)
	wants("VXLAN with an innocent one there", host6, hopOpts(dstOpts(vxlan(packet{dst: open4, payload: udp(53)}))), true)
}

// tunnelPorts closes some ports to all packets.
func (f *ingress) tunnelPorts(t *testing.T, wants func(what, to string, payload segment, passes bool)) {
	t.Helper()
	if err := f.state.SetTunnels(map[uint16]bool{4789: true, 7777: true}); err != nil {
		t.Fatal(err)
	}
	innocent := packet{dst: open4, payload: udp(53)}
	for _, host := range []string{host4, host6} {
		wants("innocent VXLAN, closed", host, vxlan(innocent), false)
		wants("what reads as nothing, closed", host, udp(7777).grow(30), false)
		wants("an empty datagram, closed", host, udp(7777), false)
		wants("the next port", host, udp(7778).grow(30), true)
		wants("TCP to that port", host, tcp(7777, syn), true)
	}
	wants("a first fragment, closed", host6, fragment(0, true, udp(7777).grow(800)), false)
	wants("a port that is closed here, elsewhere", "192.0.2.77", udp(7777), true)
	if err := f.state.SetTunnels(nil); err != nil {
		t.Fatal(err)
	}
	wants("open again", host4, udp(7777).grow(30), true)
}

func vxlanGPE(p packet) segment {
	header := udp(4790)
	next := byte(1)
	if p.etherType() == etherIPv6 {
		next = 2
	}
	header.data = append(header.data, 0x0c, 0, 0, next, 0, 0, 1, 0)
	return within(p, header)
}

// within puts a packet after the header of a tunnel.
func within(p packet, header segment) segment {
	header.data = append(slices.Clone(header.data), p.bytes()...)
	return header
}

func vxlan(p packet) segment {
	frame := make([]byte, 14)
	binary.BigEndian.PutUint16(frame[12:], p.etherType())
	header := udp(4789)
	header.data = append(append(header.data, 8, 0, 0, 0, 0, 0, 1, 0), frame...)
	return within(p, header)
}

func geneve(p packet, options int) segment {
	header := udp(6081)
	header.data = append(header.data, byte(options/4), 0, byte(p.etherType()>>8), byte(p.etherType()), 0, 0, 1, 0)
	return within(p, header.grow(options))
}

func gre(p packet, flags byte, fields int) segment {
	header := segment{protoGRE, []byte{flags, 0, byte(p.etherType() >> 8), byte(p.etherType())}}
	return within(p, header.grow(fields))
}

func fou(p packet) segment { return within(p, udp(5555)) }

func gue(p packet) segment {
	header := udp(6080)
	proto := byte(protoIPv4)
	if p.etherType() == etherIPv6 {
		proto = protoIPv6
	}
	header.data = append(header.data, 0, proto, 0, 0)
	return within(p, header)
}

// typed is GRE with any type.
func typed(etherType uint16, data []byte) segment {
	return segment{protoGRE, append([]byte{0, 0, byte(etherType >> 8), byte(etherType)}, data...)}
}

// inGUE puts GRE into GUE, inFOU into FOU.
func inGUE(g segment) segment {
	header := udp(6080)
	header.data = append(append(header.data, 0, protoGRE, 0, 0), g.data...)
	return header
}

func inFOU(g segment) segment {
	header := udp(5555)
	header.data = append(header.data, g.data...)
	return header
}

// ethernet is GRE with a frame in it, with tags.
func ethernet(p packet, tags ...uint16) segment {
	etherType, data := tagged(p, tags...)
	frame := append(make([]byte, 12), byte(etherType>>8), byte(etherType))
	return typed(0x6558, append(frame, data...))
}

func ipip(p packet) segment {
	if p.etherType() == etherIPv6 {
		return within(p, segment{protoIPv6, nil})
	}
	return within(p, segment{protoIPv4, nil})
}

// TestHostIngressTunnels sends packets to the host that its tunnels might unpack, and to others
// packets that those might unpack.
func TestHostIngressTunnels(t *testing.T) {
	at := newSender(t)
	f := at.loadIngress(t, policies(t)["default"])
	wants := func(what string, to string, payload segment, passes bool) {
		t.Helper()
		p := packet{dst: to, payload: payload}
		f.wants(t, what+" to "+to, p.etherType(), p.bytes(), passes)
	}
	at.inside(t, func() {
		at.forwards(t)
		for _, dst := range []string{open4, open6, metadata, "fd00:ec2::254"} {
			harmless := dst == open4 || dst == open6
			p := packet{dst: dst, payload: udp(53)}
			tunnels := map[string]segment{
				"VXLAN": vxlan(p), "GENEVE": geneve(p, 0), "GENEVE with options": geneve(p, 40), "GRE": gre(p, 0, 0),
				"GRE with a key": gre(p, 0x20, 4), "GRE with all": gre(p, 0xb0, 12), "FOU": fou(p), "GUE": gue(p), "IPIP": ipip(p),
				"IPIP in VXLAN": vxlan(packet{dst: host4, payload: ipip(p)}),
				"VXLAN in GRE":  gre(packet{dst: host6, payload: vxlan(p)}, 0, 0),
				"GRE in GUE":    inGUE(gre(p, 0, 0)), "GRE in FOU": inFOU(gre(p, 0, 0)),
				"WCCP": typed(0x883e, p.bytes()), "WCCP with a header": typed(0x883e, append(make([]byte, 4), p.bytes()...)),
				"frame": ethernet(p), "frame with tags": ethernet(p, ether8Q, etherAD, ether8Q),
				"frame in FOU": inFOU(ethernet(p)), "frame with tags in FOU": inFOU(ethernet(p, ether8Q, etherAD, ether8Q)),
				"VXLAN-GPE": vxlanGPE(p),
			}
			// Tunnels over IP are closed whatever is in them, and so are nested tunnels.
			closed := []string{"GRE", "GRE with a key", "GRE with all", "IPIP", "IPIP in VXLAN", "VXLAN in GRE", "WCCP", "WCCP with a header", "frame", "frame with tags"}
			wants("frame with four tags, "+dst, host4, inFOU(ethernet(p, ether8Q, ether8Q, ether8Q, ether8Q)), false)
			wants("frame with four tags, "+dst, "192.0.2.77", inFOU(ethernet(p, ether8Q, ether8Q, ether8Q, ether8Q)), true)
			for name, tunnel := range tunnels {
				harmless := harmless && !slices.Contains(closed, name)
				for _, host := range []string{host4, host6} {
					wants(name+" with "+dst, host, tunnel, harmless)
				}
				// To others, who may unpack what they like.
				wants(name+" with "+dst, "192.0.2.77", tunnel, true)
				// But an IPv6 route might unpack it on this host.
				wants(name+" with "+dst, "2001:4860::99", tunnel, name != "IPIP" || dst == open4 || dst == open6)
				// To a broadcast address, which includes the host.
				for _, group := range []string{"224.0.0.1", "255.255.255.255", "0.0.0.0", "ff02::1"} {
					wants(name+" with "+dst, group, tunnel, harmless)
				}
				// In fragments: the first shows what is inside, or is too short for that.
				for n := 8; n < len(tunnel.data) && !harmless; n += 8 {
					part := packet{dst: host4, payload: tunnel.cut(n), flags: 1}
					f.wants(t, fmt.Sprintf("%s with %s, %d bytes of it", name, dst, n), etherIPv4, part.bytes(), false)
					wants(fmt.Sprintf("%s with %s, %d bytes of it", name, dst, n), host6, fragment(0, true, tunnel.cut(n)), false)
				}
				padded := packet{dst: host4, payload: tunnel.cut(8), flags: 1}
				f.wants(t, name+" with "+dst+", behind a fragment's end", etherIPv4, append(padded.bytes(), tunnel.grow(200).data[8:]...), false)
				first := packet{dst: host4, payload: tunnel, flags: 1}
				f.wants(t, name+" with "+dst+", first fragment", etherIPv4, first.bytes(), false)
				long := packet{dst: host4, payload: tunnel.grow(512), flags: 1}
				f.wants(t, name+" with "+dst+", long first fragment", etherIPv4, long.bytes(), harmless)
				wants(name+" with "+dst+", long first fragment", host6, fragment(0, true, tunnel.grow(512)), harmless)
				f.wants(t, name+" with "+dst+", short fragment to others", etherIPv4, packet{dst: "192.0.2.77", payload: tunnel, flags: 1}.bytes(), true)
			}
			wants("a source route to "+dst, host4, within(p, udp(53)), harmless)
		}
		mail := packet{dst: open4, payload: tcp(25, syn)}
		f.refill(t)
		wants("mail in VXLAN", host4, vxlan(mail), false)
		wants("an answer to mail in VXLAN", host4, vxlan(packet{dst: open4, payload: tcp(25, ack)}), false)
		f.tunnelInsides(t, wants)
		f.tunnelPorts(t, wants)
		wants("plain UDP", host4, udp(53).grow(100), true)
		wants("an empty datagram", host4, udp(53), true)
		f.wants(t, "a long datagram's first fragment", etherIPv4, packet{dst: host4, payload: udp(2049).grow(1400), flags: 1}.bytes(), true)
		wants("a small datagram as an atomic fragment", host6, fragment(0, false, udp(53).grow(30)), true)
		// Like the data of OpenVPN: what looks like an IP header cannot be one.
		data := udp(1194).grow(100)
		data.data[8] = 0x48
		copy(data.data[8+16:], netip.MustParseAddr(metadata).AsSlice())
		wants("encrypted data", host4, data, true)
		forged := packet{src: metadata, dst: host4, payload: udp(53)}
		f.wants(t, "sent as the metadata service", etherIPv4, forged.bytes(), false)
		wants("sent as the metadata service, in VXLAN", host4, vxlan(forged), false)
	})
}

func addressOf(ip4 []byte) [16]byte { return netip.AddrFrom4([4]byte(ip4)).As16() }

// htons returns a port as it is in a key.
func htons(port uint16) uint16 { return bits.ReverseBytes16(port) }
