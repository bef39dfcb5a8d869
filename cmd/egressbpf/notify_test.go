package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// checkSender checks that the process that sends can do nothing else, and shows no secret.
func checkSender(t *testing.T, secret string) {
	paths, _ := filepath.Glob("/proc/[0-9]*")
	found := 0
	for _, path := range paths {
		// A process that is gone by now is another one.
		arguments, _ := os.ReadFile(path + "/cmdline")
		environment, _ := os.ReadFile(path + "/environ")
		status, _ := os.ReadFile(path + "/status")
		if string(arguments) != "egressbpf\x00notify-send\x00" || !strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", os.Getpid())) {
			continue
		}
		found++
		if !strings.Contains(string(status), "\nCapEff:\t0000000000000000\n") || !strings.Contains(string(status), "\nCapPrm:\t0000000000000000\n") {
			t.Errorf("the process that sends has capabilities: %s", status)
		}
		if strings.Contains(string(environment), secret) {
			t.Errorf("its environment is %q", environment)
		}
	}
	if found != 1 {
		t.Errorf("%d processes send", found)
	}
}

// TestTold has the service tell of a refusal: in its log, and to a target.
func TestTold(t *testing.T) {
	lockHost(t)
	base := newBase(t)
	const secret = "S3cretS3cret"
	messages := make(chan string, 10)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		checkSender(t, secret)
		messages <- r.URL.Path + " " + string(body)
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "config.yaml")
	check(t, os.WriteFile(file, fmt.Appendf(nil, "notify: [\"generic+%s/%s\"]\n", server.URL, secret), 0o600))

	code, stdout, stderr := execute(t.Context(), "notify", "test", "--config", file)
	if got := <-messages; code != exitDone || !strings.HasSuffix(stdout, ": sent\n") || !strings.HasPrefix(got, "/"+secret+" A test of") {
		t.Errorf("test: exit code %d, %s%s, message %q", code, stdout, stderr, got)
	}

	container := testenv.Child(t, testenv.Child(t, base, "own.slice"), "docker-"+hex+".scope")
	ctx, cancel := context.WithCancel(t.Context())
	var log testenv.Log
	done := make(chan int)
	go func() {
		done <- run(ctx, []string{"run", "--config", file, "--cgroup", filepath.Dir(container)}, io.Discard, &log)
	}()
	testenv.Eventually(t, "in force", func() bool { return strings.Contains(log.String(), `msg="in force"`) })
	connect := testenv.Command(t, container, "/proc/self/exe", "169.254.169.254:80")
	connect.Args[0] = "connect"
	if out, err := connect.CombinedOutput(); err == nil {
		t.Fatalf("was not refused: %s", out)
	}
	testenv.Eventually(t, "a line of the log", func() bool {
		return strings.Contains(log.String(), "level=WARN msg=refused container_id="+hex+" ") && strings.Contains(log.String(), "reason=blocked") && strings.Contains(log.String(), " count=1\n")
	})
	if got := <-messages; !strings.HasPrefix(got, "/"+secret+" Container "+hex[:12]+" on ") || !strings.Contains(got, "\nreason: blocked\n") {
		t.Errorf("message %q", got)
	}
	cancel()
	if code := <-done; code != exitDone || strings.Contains(log.String(), secret) {
		t.Errorf("exit code %d\n%s", code, log.String())
	}
}
