// Command egressbpf keeps containers from reaching cloud metadata services and
// from sending spam.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/preflight"
)

func main() {
	if err := confine(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "egressbpf: %v\n", err)
		os.Exit(exitFailed)
	}
	if len(os.Args) == 3 && os.Args[1] == preflight.SelfTestArg {
		if err := preflight.SelfTest(os.Args[2]); err != nil {
			fmt.Fprintf(os.Stderr, "egressbpf: %v\n", err)
			os.Exit(exitFailed)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
