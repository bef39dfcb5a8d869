package commands

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// Each operation has as many samples as there were rounds.
func TestMeasure(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "egressbpf")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "github.com/egressbpf/egressbpf/cmd/egressbpf")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	costs, err := measure(binary, 10, 2, true)
	if err != nil {
		t.Fatal(err)
	}
	if len(costs) != 5 {
		t.Errorf("got %d costs, want 5", len(costs))
	}
	for _, c := range costs {
		if len(c.Samples) != 2 || c.Samples[0] <= 0 || c.Samples[1] <= 0 || c.Part != "commands" || c.Containers != 10 {
			t.Errorf("got %+v", c)
		}
	}
}
