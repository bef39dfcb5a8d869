// Command bench measures what egressbpf costs and how exact it is, side by side with other
// ways to the same end. It needs root.
package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/test/bench/report"
	"github.com/egressbpf/egressbpf/internal/test/bench/traffic"
)

// subcommands by name. What they return is why they failed.
var subcommands = map[string]func(args []string) error{
	"run":    run,
	"report": report.Run,
}

func main() {
	if slices.Equal(os.Args[1:], []string{traffic.WorkerArg}) {
		exit(traffic.Work())
	}
	if len(os.Args) > 1 {
		if command := subcommands[os.Args[1]]; command != nil {
			exit(command(os.Args[2:]))
		}
	}
	var names []string
	for name := range subcommands {
		names = append(names, name)
	}
	slices.Sort(names)
	exit(fmt.Errorf("usage: bench %s", strings.Join(names, "|")))
}

func exit(err error) {
	if err == nil {
		os.Exit(0)
	}
	if !errors.Is(err, errSaid) {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	os.Exit(1)
}
