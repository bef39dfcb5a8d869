// Command egressbpf keeps containers from reaching cloud metadata services and
// from sending spam.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/notify"
	"github.com/egressbpf/egressbpf/internal/preflight"
	"github.com/egressbpf/egressbpf/internal/web"
)

// inTest is for tests, which have a bpf filesystem of their own and may be built with cgo.
var inTest bool

func main() {
	// A panic in any goroutine would exit with 2, the code for wrong usage. Make it SIGABRT
	// instead, and exit with 1 where the panic can be caught.
	debug.SetTraceback("crash")
	defer func() {
		if cause := recover(); cause != nil {
			fmt.Fprintf(os.Stderr, "egressbpf: panic: %v\n%s", cause, debug.Stack())
			os.Exit(exitFailed)
		}
	}()
	if len(os.Args) > 1 && os.Args[1] == web.ServeArg {
		exit(web.Serve(os.Args[2:]))
	}
	switch err := confine(os.Args[1:]); {
	case errors.Is(err, errKept):
		if !inTest {
			fmt.Fprintf(os.Stderr, "warning: %v\n", err)
		}
	case err != nil:
		fmt.Fprintf(os.Stderr, "egressbpf: %v\n", err)
		os.Exit(exitFailed)
	}
	if len(os.Args) == 3 && os.Args[1] == preflight.SelfTestArg {
		exit(preflight.SelfTest(os.Args[2]))
	}
	if len(os.Args) == 2 && os.Args[1] == notify.SendArg {
		os.Exit(notify.Child(os.Stdin, os.Stdout))
	}
	_ = cgroup.JoinHosts() // commands that need it say what is wrong
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	// A second signal ends a command that does not react to the first, such as one that waits
	// for a pipe.
	context.AfterFunc(ctx, stop)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// exit ends a process that this program has started.
func exit(err error) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "egressbpf: %v\n", err)
		os.Exit(exitFailed)
	}
	os.Exit(exitDone)
}
