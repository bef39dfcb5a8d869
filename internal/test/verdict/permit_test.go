package verdict

import (
	"net/netip"
	"testing"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// TestPermitted opens what the presets block to one container, and nothing else.
func TestPermitted(t *testing.T) {
	const other, both = "192.0.2.80", "100.100.100.200"
	p := limited(strict)
	p.Block = []policy.Rule{{Prefix: netip.MustParsePrefix(other + "/32")}, {Prefix: netip.MustParsePrefix(both + "/32")}}
	web := func(to string) packet { return packet{dst: to, payload: tcp(80, syn)} }

	at := newSender(t)
	f := at.load(t, p)
	announced := func() map[bpf.EgressFlowKey]uint32 {
		found := map[bpf.EgressFlowKey]uint32{}
		var key bpf.EgressFlowKey
		var p bpf.EgressPermit
		for all := f.state.ByName()[bpf.EgressMapPermitted].Iterate(); all.Next(&key, &p); {
			found[key] = p.Packets
		}
		return found
	}
	at.inside(t, func() {
		f.wants(t, "before", web(metadata), blocked)
		if err := f.state.Configure(f.container, maps.Change{Mask: maps.MayReachMetadata, Flags: maps.MayReachMetadata}); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			f.wants(t, "metadata", web(metadata), pass)
		}
		f.wants(t, "metadata by UDP", packet{dst: metadata, payload: udp(53)}, pass)
		f.wants(t, "on the block list", web(other), blocked)
		f.wants(t, "on the block list too", web(both), blocked)
		f.wants(t, "sent as the metadata service", packet{src: metadata, dst: open4, payload: icmp()}, blocked)
		f.wants(t, "malformed", packet{dst: metadata, payload: udp(53), length: 1}, malformed)
		f.wants(t, "mail there", packet{dst: metadata, payload: tcp(25, syn)}, admitted)
		f.wants(t, "more mail there", packet{dst: metadata, payload: tcp(25, syn)}, rateLimited)
		if err := f.state.Configure(f.container, maps.Change{Mask: maps.MayReachMetadata}); err != nil {
			t.Fatal(err)
		}
		f.wants(t, "closed again", web(metadata), blocked)
	})
	// Each packet that may pass is announced to the host side.
	counts := map[uint32]int{}
	for key, n := range announced() {
		if netip.AddrFrom16(key.Dst).Unmap().String() != metadata {
			t.Errorf("the host side is told of %+v", key)
		}
		counts[n]++
	}
	if len(counts) != 2 || counts[3] != 1 || counts[1] != 2 {
		t.Errorf("announced: got %v packets of flows, want 3 of the one, 1 of two others", counts)
	}
}
