package loader

import (
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// Pods can be left out by name, and are not called uncovered then; others cannot.
func TestLeftOut(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	docker := policy.Default()
	docker.Scopes = []policy.Scope{"docker-{id}.scope"}
	all := policy.Default()
	for _, tt := range []struct {
		policy *policy.Policy
		rel    string
		want   bool
	}{
		{&docker, "/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope", true},
		{&docker, "/kubepods/besteffort/pod1/" + id, true},
		{&all, "/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope", false},
		{&docker, "/system.slice/cri-containerd-" + id + ".scope", false},
		{&docker, "/kubepods-mine/" + id, false},
		{nil, "/kubepods/" + id, false},
	} {
		if got := leftOut(tt.policy, tt.rel); got != tt.want {
			t.Errorf("%s: left out %v, want %v", tt.rel, got, tt.want)
		}
	}
	if !all.PolicesPods() || docker.PolicesPods() {
		t.Errorf("pods are policed: %v by default, %v with Docker's scope alone", all.PolicesPods(), docker.PolicesPods())
	}
}
