package dockertest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/docker"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// TestNames asks a real daemon, which is restarted and stopped during the test.
func TestNames(t *testing.T) {
	n := lab.New(t)
	n.Egressbpf(t, "attach", "--cgroup", policed)
	t.Cleanup(func() { n.Egressbpf(t, "detach") })
	e := startEngine(t, n)
	host := "unix://" + e.path("socket")
	client, err := docker.Open(host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	told := watch(t, client)
	expectEvent(t, told, docker.Event{Action: docker.Resync})

	info, err := client.Info(t.Context())
	if err != nil || info.CgroupDriver != "cgroupfs" || info.CgroupVersion != 2 || info.Rootless || info.Version == "" {
		t.Errorf("info: %+v, %v", info, err)
	}

	web := e.sleeper(t, "web", "--label", "what=ever", "--restart", "always", "--stop-timeout", "1")
	expectEvent(t, told, docker.Event{Action: docker.Start, ID: web, Name: "web"})
	other := e.sleeper(t, "other", "--cgroup-parent", outside, "--network", "host")
	expectEvent(t, told, docker.Event{Action: docker.Start, ID: other, Name: "other"})

	imageID := e.docker(t, "inspect", "-f", "{{.Image}}", "web")
	want := []docker.Container{
		{ID: other, Name: "other", Names: []string{"other"}, Labels: map[string]string{}, Image: image, ImageID: imageID,
			Networks: []docker.Network{{Name: "host", ID: e.docker(t, "network", "inspect", "-f", "{{.Id}}", "host")}}},
		{ID: web, Name: "web", Names: []string{"web"}, Labels: map[string]string{"what": "ever"}, Image: image, ImageID: imageID,
			Networks: []docker.Network{{Name: "bridge", ID: e.docker(t, "network", "inspect", "-f", "{{.Id}}", "bridge")}}},
	}
	got, err := client.Containers(t.Context())
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("containers: %v\n got %+v\nwant %+v", err, got, want)
	}
	for i, parent := range []string{outside, ""} {
		one := want[i]
		one.CgroupParent = parent
		if one.Pid, err = strconv.Atoi(e.docker(t, "inspect", "-f", "{{.State.Pid}}", one.ID)); err != nil {
			t.Fatal(err)
		}
		got, err := client.Inspect(t.Context(), one.ID)
		if err != nil || !reflect.DeepEqual(got, one) {
			t.Errorf("inspect: %v\n got %+v\nwant %+v", err, got, one)
		}
	}
	if _, err := client.Inspect(t.Context(), strings.Repeat("0", 64)); !errors.Is(err, docker.ErrNoContainer) {
		t.Errorf("inspect: %v, want ErrNoContainer", err)
	}

	// The real command: without the capabilities that it does not need.
	if got := n.Egressbpf(t, "stats", "--docker-host", host); !strings.Contains(got, "\nweb  ") {
		t.Errorf("stats:\n%s", got)
	}
	n.Egressbpf(t, "limit", "set", "web", "--burst", "7", "--docker-host", host)
	status := n.Run(t, exec.Command(lab.Binary(t), "status", "--docker-host", host))
	if status.Code != 3 || !strings.Contains(status.Stdout, "\nother ") {
		t.Errorf("status: exit code %d\n%s%s", status.Code, status.Stdout, status.Stderr)
	}

	e.docker(t, "rename", "web", "shop")
	expectEvent(t, told, docker.Event{Action: docker.Rename, ID: web, Name: "shop"})
	e.removeAfter(t, "shop")
	if got := n.Egressbpf(t, "limit", "get", "shop", "--docker-host", host); got != "5/minute, burst 7\n" {
		t.Errorf("limit get: %s", got)
	}
	if exit := n.Run(t, exec.Command(lab.Binary(t), "limit", "get", "web", "--docker-host", host)); exit.Code != 1 {
		t.Errorf("limit get of the old name: exit code %d", exit.Code)
	}
	e.docker(t, "update", "--restart", "always", "shop")
	expectEvent(t, told, docker.Event{Action: docker.Update, ID: web, Name: "shop"})
	e.docker(t, "rm", "-f", "other")
	expectEvent(t, told, docker.Event{Action: docker.Destroy, ID: other, Name: "other"})

	// If the daemon hangs, only the names are missing.
	if err := e.daemon.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	exit := n.Run(t, exec.Command(lab.Binary(t), "stats", "--docker-host", host))
	if exit.Code != 0 || !strings.Contains(exit.Stdout, "\n"+web[:12]) || !strings.Contains(exit.Stderr, "no answer in time") {
		t.Errorf("stats: exit code %d\n%s%s", exit.Code, exit.Stdout, exit.Stderr)
	}
	if err := e.daemon.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}

	e.stopDaemon(t)
	expectEvent(t, told, docker.Event{Action: docker.Lost})
	if _, err := client.Containers(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("containers without a daemon: %v", err)
	}
	e.startDaemon(t)
	expectEvent(t, told, docker.Event{Action: docker.Resync})
	got, err = client.Containers(t.Context())
	if err != nil || len(got) != 1 || got[0].ID != web || got[0].Name != "shop" {
		t.Errorf("containers after the restart: %+v, %v", got, err)
	}
	if got := n.Egressbpf(t, "stats", "--docker-host", host); !strings.Contains(got, "\nshop ") {
		t.Errorf("stats:\n%s", got)
	}
	e.docker(t, "kill", "shop")
	expectEvent(t, told, docker.Event{Action: docker.Die, ID: web, Name: "shop"})
}

// watch returns the events that a client receives, until the test ends.
func watch(t *testing.T, c *docker.Client) <-chan docker.Event {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	told, ended := make(chan docker.Event, 100), make(chan error)
	go func() { ended <- c.Watch(ctx, func(e docker.Event) { told <- e }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("watch: %v", err)
		}
	})
	return told
}

// expectEvent waits for an event, after any number of other events.
func expectEvent(t *testing.T, told <-chan docker.Event, want docker.Event) {
	t.Helper()
	late := time.After(time.Minute)
	for {
		select {
		case e := <-told:
			e.Err = nil
			if e == want {
				return
			}
			t.Logf("told %+v", e)
		case <-late:
			t.Fatalf("not told %+v", want)
		}
	}
}
