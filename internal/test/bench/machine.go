package main

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
	"github.com/egressbpf/egressbpf/internal/test/bench/results"
	"github.com/egressbpf/egressbpf/internal/test/bench/traffic"
)

// machine says where the measurements are taken. It takes a second.
func machine() results.Machine {
	m := results.Machine{
		Time: time.Now().UTC().Truncate(time.Second), Version: loader.Version(), CPUs: runtime.NumCPU(),
		Tools: map[string]string{}, Busy: traffic.Busy(time.Second),
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	for _, tool := range []string{"iptables-nft", "iptables-legacy", "nft"} {
		path, err := lab.Tool(tool)
		if err != nil {
			continue
		}
		if out, err := exec.Command(path, "--version").Output(); err == nil {
			m.Tools[tool] = strings.TrimSpace(string(out))
		}
	}
	return m
}
