package daemon_test

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/metrics"
)

// Scrapes while the daemon is at work show what holds then.
func TestMetrics(t *testing.T) {
	s := newService(t, "")
	var reload metrics.Reload
	s.Loaded = reload.Done
	c := &metrics.Collector{Filter: s.Filter, Root: s.Root, Engines: s.Containers, Containers: true, Reload: &reload}
	var last string
	shows := func(want string) bool {
		var out bytes.Buffer
		if err := c.Write(&out); err != nil {
			t.Log(err)
		}
		last = out.String()
		return strings.Contains(last, want)
	}
	eventually := func(want string) {
		t.Helper()
		s.eventually(want, func() bool { return shows(want) })
	}
	s.start()
	for _, want := range []string{"\negressbpf_enforcing 1\n", "\negressbpf_policy_reload_successful 1\n", "\negressbpf_policy_reload_timestamp_seconds 1"} {
		if !shows(want) {
			t.Errorf("%q is missing in\n%s", want, last)
		}
	}

	const series = `egressbpf_container_info{container="%",id="ID",image=`
	of := func(name string) string { return strings.NewReplacer("%", name, "ID", id(1)).Replace(series) }
	s.container(1)
	eventually(of(""))
	s.engine.Run("start", id(1), "agent", nil)
	eventually(of("agent"))
	s.engine.Run("rename", id(1), "front", nil)
	eventually(of("front"))

	s.write("nonsense: yes\n")
	eventually("\negressbpf_policy_reload_successful 0\n")
	if !strings.Contains(last, "\negressbpf_enforcing 1\n") {
		t.Errorf("a bad configuration: %s", last)
	}
	s.write("mode: audit\n")
	eventually("\negressbpf_mode{mode=\"audit\"} 1\n")
	eventually("\negressbpf_policy_reload_successful 1\n")

	// Only Docker knows that this is a container.
	s.engine.SetProcess(id(2), os.Getpid())
	before := strings.Count(last, "uncovered_containers 0\n")
	s.engine.Run("start", id(2), "lost", nil)
	if before > 0 {
		s.eventually("an uncovered container", func() bool {
			return shows("\negressbpf_uncovered_containers ") && !strings.Contains(last, "uncovered_containers 0\n")
		})
	}
}
