package verdict

import (
	"testing"

	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// TestRecognised sends from a slice, in which only recognised cgroups are containers.
// Packets of other cgroups pass, whatever they are, and leave no trace.
func TestRecognised(t *testing.T) {
	slice := testenv.Child(t, testenv.Cgroup(t), "own.slice")
	service := testenv.Child(t, slice, "a.service")
	sub := testenv.Child(t, testenv.Child(t, slice, "sub.slice"), "deep.slice")
	container := testenv.Child(t, sub, "container")
	nested := testenv.Child(t, container, "nested")
	newer := testenv.Child(t, sub, "newer")
	nestedNewer := testenv.Child(t, newer, "nested")

	packets := map[string]packet{
		"metadata":  {dst: metadata, payload: icmp()},
		"mail":      mail,
		"malformed": {dst: open4, payload: udp(53), length: 1},
	}
	for _, tt := range []struct {
		name, sender string
		stateless    string // a container without state
		policed      bool
		full         bool // the sender has no entry
	}{
		{"the slice itself", slice, "", false, false},
		{"service", service, "", false, false},
		{"slice around a container", sub, "", false, false},
		{"container", container, "", true, false},
		{"nested cgroup", nested, "", true, false},
		{"service beside one without state", service, newer, false, false},
		{"slice around one without state", sub, newer, false, false},
		{"one without state", newer, newer, true, true},
		{"nested in one without state", nestedNewer, newer, true, true},
		{"container beside one without state", nested, newer, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			at := newSenderIn(t, slice, container, tt.sender)
			f := at.load(t, limited(strict))
			if _, err := f.state.Enrol(f.container); err != nil {
				t.Fatal(err)
			}
			if tt.stateless != "" {
				if err := f.state.Bury(cgroupID(t, tt.stateless)); err != nil {
					t.Fatal(err)
				}
			}
			f.full = tt.full
			at.inside(t, func() {
				switch {
				case !tt.policed:
					for range 3 {
						for what, p := range packets {
							f.wants(t, what, p, pass)
						}
					}
				case tt.full:
					f.wants(t, "mail", mail, noBucket)
				default:
					f.wants(t, "mail", mail, admitted)
					f.wants(t, "more mail", mail, rateLimited)
				}
				if tt.policed {
					f.wants(t, "metadata", packets["metadata"], blocked)
					f.wants(t, "malformed", packets["malformed"], malformed)
					f.wants(t, "web", web, pass)
				}
			})
			if known, err := f.state.Containers(); err != nil || len(known) != 1 {
				t.Errorf("entries: got %+v, %v; want the container's alone", known, err)
			}
		})
	}
}

// TestAnyScope checks that with scope any, each child of a slice is a container.
func TestAnyScope(t *testing.T) {
	slice := testenv.Child(t, testenv.Cgroup(t), "own.slice")
	service := testenv.Child(t, slice, "a.service")
	at := newSenderIn(t, slice, service, service)
	p := policy.Default()
	p.Scopes = []policy.Scope{policy.AnyScope}
	f := at.load(t, p)
	at.inside(t, func() { f.wants(t, "metadata", packet{dst: metadata, payload: icmp()}, blocked) })
}
