package e2e

import (
	"encoding/binary"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// delivers says whether all packets to the host itself are judged, and whether any are by
// programs of their own. Before 6.4, one program judges all packets.
func (s *scene) delivers() (all, own bool) {
	s.t.Helper()
	status, _ := s.Status(s.t)
	attached := func(name string) bool {
		return slices.ContainsFunc(status.Hooks, func(h loader.Hook) bool { return h.Name == name && h.Attached })
	}
	v4, v6 := attached("host_deliver4"), attached("host_deliver6")
	return !attached("host_forward4") || v4 && v6, v4 || v6
}

// setUp runs commands of ip(8) in the host's network, and skips the test if the kernel has no
// such devices.
func (s *scene) setUp(commands ...string) {
	s.t.Helper()
	for _, command := range commands {
		cmd := exec.Command("ip", strings.Fields(command)...)
		var out []byte
		var err error
		s.Host.Do(func() { out, err = cmd.CombinedOutput() })
		if err != nil {
			s.t.Skipf("ip %s: %v: %s", command, err, out)
		}
	}
}

// TestUnusualTunnels sends packets for the metadata service through tunnels of the host that
// are not devices of a tunnel's kind in the host's network.
func TestUnusualTunnels(t *testing.T) {
	const mac, session = "02:00:00:00:77:01", 7
	frame := lab.Link{Gateway: []byte{2, 0, 0, 0, 0x77, 1}, Source: []byte{2, 0, 0, 0, 0x77, 2}}
	for _, tt := range []struct {
		name  string
		setUp func(s *scene)
		outer func(s *scene, inner []byte) (proto uint8, payload []byte)
	}{
		{"L2TP over IP", func(s *scene) {
			s.setUp(
				"l2tp add tunnel tunnel_id 1 peer_tunnel_id 1 encap ip local 10.90.0.1 remote "+s.a.IPv4.String(),
				fmt.Sprintf("l2tp add session tunnel_id 1 session_id %d peer_session_id %d name l2tp0 l2spec_type none", session, session),
				"link set l2tp0 address "+mac+" up")
		}, func(s *scene, inner []byte) (uint8, []byte) {
			return 115, append(binary.BigEndian.AppendUint32(nil, session), frame.Frame(inner)...)
		}},
		{"IP in IP, for another network", func(s *scene) {
			s.throughNetwork("type ipip local 10.90.0.1 remote " + s.a.IPv4.String())
		}, func(_ *scene, inner []byte) (uint8, []byte) { return 4, inner }},
		{"GRE, for another network", func(s *scene) {
			s.throughNetwork("type gre local 10.90.0.1 remote " + s.a.IPv4.String())
		}, func(_ *scene, inner []byte) (uint8, []byte) { return 47, append([]byte{0, 0, 8, 0}, inner...) }},
		{"VXLAN, for another network", func(s *scene) {
			s.throughNetwork("address " + mac + " type vxlan id 7 dstport 4789")
		}, func(_ *scene, inner []byte) (uint8, []byte) {
			vxlan := append([]byte{8, 0, 0, 0, 0, 0, session, 0}, frame.Frame(inner)...)
			udp := lab.UDP(5000, 4789, len(vxlan))
			return unix.IPPROTO_UDP, append(udp[:8], vxlan...)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScene(t)
			stop := s.serve()
			seen := s.Capture(t)
			tt.setUp(s)
			soon(t, "packets to the host are judged", func() bool { all, _ := s.delivers(); return all })
			inner := segment(at(s.a.IPv4, 2000), at(lab.Metadata4, 80), 1, 0, tcpSYN)
			proto, payload := tt.outer(s, inner)
			outer := lab.Header{Src: s.a.IPv4, Dst: lab.Gateway4, Proto: proto}.Packet(payload)
			if err := s.a.Send("raw IP", toHost, outer); err != nil {
				t.Fatal(err)
			}
			if n := lab.Count(seen.Settle(t), toMetadata); n > 0 {
				t.Error("a packet for the metadata service got through")
			}
			stop()
			if all, _ := s.delivers(); !all {
				t.Error("nobody watches for tunnels, and packets to the host are not all judged")
			}
		})
	}
}

// throughNetwork makes a tunnel that ends at the host and whose device is in another network,
// which forwards to the host.
func (s *scene) throughNetwork(tunnel string) {
	s.t.Helper()
	other := s.Container(s.t)
	s.setUp("link add t0 "+tunnel, "link set t0 netns "+other.Path(),
		"link add router type veth peer name uplink netns "+other.Path(),
		"link set router up", "addr add 10.92.0.1/30 dev router")
	other.Sysctl(s.t, "ipv4/ip_forward", "1")
	for _, conf := range []string{"all", "default", "t0"} {
		other.Sysctl(s.t, "ipv4/conf/"+conf+"/rp_filter", "0")
	}
	other.IP(s.t, "link set eth0 down", "link set t0 up", "link set uplink up", "addr add 10.92.0.2/30 dev uplink", "route replace default via 10.92.0.1")
}

func toMetadata(p lab.Packet) bool { return p.Dst == at(lab.Metadata4, 80) }
