package dockertest

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/roads.md as TestRoads wants it")

const roadsFile = "../../../docs/roads.md"

// TestRoads checks the tables of docs/roads.md against the attacks. TestAttacks shows that
// each attack succeeds without the filter and is stopped by what the table says.
func TestRoads(t *testing.T) {
	var want bytes.Buffer
	fmt.Fprint(&want, roadsHead)
	for _, p := range []profile{bridged, netAdmin, hostNet} {
		fmt.Fprintf(&want, "\n## %s\n\n| attack | needs | filter alone | with `socket_families` | with `host_side` |\n|---|---|---|---|---|\n", profileTitles[p])
		all := attacks()
		slices.SortStableFunc(all, func(a, b attack) int { return strings.Compare(a.name, b.name) })
		for _, a := range all {
			if a.in&p == 0 {
				continue
			}
			cells := []string{a.name, a.needs(p)}
			for _, set := range []defences{{}, {families: true}, {hostSide: true}} {
				cells = append(cells, map[bool]string{true: "stops it", false: "–"}[set.stops(a, p)])
			}
			fmt.Fprintf(&want, "| %s |\n", strings.Join(cells, " | "))
		}
	}
	if *update {
		if err := os.WriteFile(roadsFile, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(roadsFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Error("docs/roads.md does not match the attacks: go test ./internal/test/dockertest -run TestRoads -update")
	}
}

const roadsHead = `# Attacks on the filter

Each row is an attack of the test suite (internal/test/dockertest), made from a real
container. The suite first shows that the attack gets through without egressbpf. Then it
tries the attack against the filter alone, against the filter with each of the other two
defences, and against all three, which is the default.

"Stops it" means that nothing reaches a blocked destination, and that no more mail gets out
than the buckets of the container and of its bridge have tokens for. "–" means that the
attack gets through.

The tests in internal/test/e2e follow whole connections: they count what mail servers
accept, in random sequences too. The [threat model](threat-model.md) says which kernel has
which defence, and what is left open.

TestRoads generates this page; do not edit it.
`

var profileTitles = map[profile]string{
	bridged:  "Docker's default capabilities, on a bridge",
	netAdmin: "With CAP_NET_ADMIN, on a bridge",
	hostNet:  "Docker's default capabilities, with `--network=host`",
}

// needs says what an attack takes in addition to its profile.
func (a attack) needs(p profile) string {
	var needs []string
	switch {
	case a.sight == families && a.name == "RDS":
		needs = append(needs, "RDS sockets")
	case a.sight == families && a.name == "multicast routing":
		needs = append(needs, "a raw socket of IGMP")
	case a.sight == families:
		needs = append(needs, "packet sockets")
	case p == netAdmin && a.begin != "":
		needs = append(needs, "the container's own routing, nftables or devices")
	default:
		needs = append(needs, "IP sockets")
	}
	if a.device != "" {
		needs = append(needs, "a host with "+hostDevices[a.device].needs)
	}
	return strings.Join(needs, "; ")
}
