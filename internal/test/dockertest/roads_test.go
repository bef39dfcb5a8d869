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

// TestRoads holds the table of docs/roads.md against the attacks: TestAttacks shows of each
// that it succeeds without the filter, and is stopped by what the table says.
func TestRoads(t *testing.T) {
	var want bytes.Buffer
	fmt.Fprint(&want, roadsHead)
	for _, p := range []profile{bridged, netAdmin, hostNet} {
		fmt.Fprintf(&want, "\n## %s\n\n| road | needs | filter | `socket_families` | `host_side` |\n|---|---|---|---|---|\n", profileTitles[p])
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
		t.Error("docs/roads.md is not what the attacks are: go test ./internal/test/dockertest -run TestRoads -update")
	}
}

const roadsHead = `# Roads around the filter

Each row is an attack of the test suite, made from a real container (internal/test/dockertest). The
suite shows that it gets through without egressbpf, then what each defence does on its own.
"Stops it" means that nothing reaches a blocked destination, and no more mail than the
bucket of the container and that of its bridge have tokens for. With the default
settings, all three defences stand together.

The tests of internal/test/e2e beside it follow connections and not only packets: what mail
servers accept, in random sequences too. The [threat model](threat-model.md) says which
kernel has which defence, and what is left open.

This page is written by TestRoads.
`

var profileTitles = map[profile]string{
	bridged:  "Docker's default capabilities, on a bridge",
	netAdmin: "With CAP_NET_ADMIN, on a bridge",
	hostNet:  "Docker's default capabilities, `--network=host`",
}

// needs says what an attack takes beside its profile.
func (a attack) needs(p profile) string {
	var needs []string
	switch {
	case a.sight == families && a.name == "RDS":
		needs = append(needs, "RDS sockets")
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
