package critest

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// TestPod makes a pod on a node with the filter alone.
func TestPod(t *testing.T) {
	n := lab.New(t)
	n.Egressbpf(t, "attach")
	t.Cleanup(func() { n.Egressbpf(t, "detach") })
	k := startNode(t, n, pause)
	told, blocked := k.monitor(t), blocked(t, n)
	seen := k.Capture(t)
	p := k.pod(t, "shop", "web-0")
	c := p.container(t, "nginx", metadata)
	if got := c.said(t, 2); got != blocked {
		t.Errorf("first: %s, want %s", got, blocked)
	}
	if got := c.again(t); got != blocked {
		t.Errorf("again: %s, want %s", got, blocked)
	}
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}

	rows := map[string]stats.Container{}
	for _, row := range k.Stats(t).Containers {
		rows[row.ID] = row
	}
	parent := podCgroup(p.uid) + "/"
	for id, name := range map[string]string{p.id: "shop/web-0/POD", c.id: "shop/web-0/nginx"} {
		if row := rows[id]; row.Name != name || row.Cgroup != parent+id {
			t.Errorf("row of %s: %+v", name, row)
		}
	}
	if row := rows[c.id]; row.Blocked.Connects != 2 || row.Blocked.Packets != 0 {
		t.Errorf("counted %+v, want 2 connects", row.Blocked)
	}
	want := events.K8s{Namespace: "shop", Pod: "web-0", PodUID: p.uid, Container: "nginx"}
	testenv.Eventually(t, "records of 2 refusals", func() bool {
		found := 0
		for _, r := range told() {
			if r.Container != nil && r.Container.ID == c.id && r.Reason == "blocked" {
				if found++; r.K8s == nil || *r.K8s != want {
					t.Fatalf("record %+v has pod %+v, want %+v", r, r.K8s, want)
				}
			}
		}
		return found == 2
	})
}

// monitor starts egressbpf monitor, and returns a function that returns what it has told.
func (k *node) monitor(t *testing.T) func() []events.Record {
	t.Helper()
	var stdout, stderr testenv.Log
	cmd := exec.Command(lab.Binary(t), "monitor", "--output", "json")
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var err error
	k.Host.Do(func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("monitor: %v\n%s", err, stderr.String())
		}
	})
	all := func() (records []events.Record) {
		for line := range strings.Lines(stdout.String()) {
			var r events.Record
			if strings.HasSuffix(line, "\n") {
				if err := json.Unmarshal([]byte(line), &r); err != nil {
					t.Fatalf("%q: %v", line, err)
				}
				records = append(records, r)
			}
		}
		return records
	}
	testenv.Eventually(t, "monitor starts", func() bool { return len(all()) > 0 })
	return all
}
