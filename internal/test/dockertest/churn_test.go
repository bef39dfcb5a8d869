package dockertest

import (
	"fmt"
	"math/rand/v2"
	"os/exec"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// testChurn starts and removes containers, each of which asks the metadata service and
// sends mail at once, while the service is killed again and again.
func testChurn(t *testing.T, e *engine) {
	const containers, atOnce = 60, 4
	before := e.Stats(t).Total
	seen := e.Capture(t)

	stop, stopped := make(chan struct{}), make(chan int)
	go func() {
		kills := 0
		defer func() { stopped <- kills }()
		for {
			service := exec.Command(lab.Binary(t), "run", "--docker-host", "unix://"+e.path("socket"))
			var err error
			e.Host.Do(func() { err = service.Start() })
			if err != nil {
				t.Error(err)
				return
			}
			last := false
			select {
			case <-time.After(rand.N(2 * time.Second)): // at any point of what it does
			case <-stop:
				last = true
			}
			service.Process.Signal(unix.SIGKILL)
			service.Wait()
			kills++
			if last {
				return
			}
		}
	}()

	names := make(chan string)
	var runs sync.WaitGroup
	for range atOnce {
		runs.Go(func() {
			for name := range names {
				script := fmt.Sprintf("nc -w 1 %s 80; nc -w 1 %s 80; for i in 1 2 3 4 5 6 7 8; do nc -w 1 %s 25 & done; wait",
					lab.Metadata4, lab.Metadata6, lab.Mail4)
				out, err := e.command("run", "--rm", "--name", name, image, "/bin/busybox", "sh", "-c", script+"; true").CombinedOutput()
				if err != nil {
					t.Errorf("%s: %v: %s", name, err, out)
				}
			}
		})
	}
	for i := range containers {
		names <- fmt.Sprint("churn-", i)
	}
	close(names)
	runs.Wait()
	close(stop)
	kills := <-stopped

	packets := seen.Settle(t)
	if n := lab.Count(packets, func(p lab.Packet) bool { return p.Dst.Addr() == lab.Metadata4 || p.Dst.Addr() == lab.Metadata6 }); n > 0 {
		t.Errorf("%d packets arrived at the metadata service", n)
	}
	if n := syns(packets, 25); n > 6*containers || n < 4*containers {
		t.Errorf("%d mail connections of %d containers arrived, want some 5 of each", n, containers)
	}
	total := e.Stats(t).Total
	if refused := total.Blocked.Connects - before.Blocked.Connects; refused != 2*containers {
		t.Errorf("%d attempts were refused, want %d", refused, 2*containers)
	}
	if kills < 3 {
		t.Errorf("the service was killed %d times", kills)
	}
	expectStatus(t, e.Network, 0)
}
