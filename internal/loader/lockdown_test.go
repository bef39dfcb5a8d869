package loader_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Where the kernel is locked down, containers cannot be told by their names, as is said
// by that word; what needs no look into its memory works. Elsewhere all does.
func TestLockedDown(t *testing.T) {
	lockHost(t)
	ownNetwork(t)
	h := newHost(t)
	h.mkdir("own.slice", "docker")
	addBridge(t, "docker0")
	locked := loader.LockedDown()
	err := h.attach(policy.Default(), "own.slice")
	if errors.Is(err, loader.ErrLockedDown) != locked || errors.Is(err, loader.ErrCannotRecognise) != locked || (err != nil) != locked {
		t.Errorf("attach to a slice: got %v", err)
	}
	h.mustAttach(policy.Default(), "docker")
	if d := h.defence("host_side"); !d.Active || strings.Contains(d.Reason, "locked down") {
		t.Errorf("got %+v", d)
	}
	for _, row := range h.status().Hooks {
		if !row.Attached && !(locked && strings.Contains(row.Reason, loader.ErrLockedDown.Error())) {
			t.Errorf("%s is not attached: %s", row.Name, row.Reason)
		}
	}
}
