package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"github.com/egressbpf/egressbpf/internal/notify"
)

// errNotTold ends notify test if a target was not told; each has been printed.
var errNotTold = errors.New("not all targets were told")

func newNotify() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "notify",
		Short: "Try the targets of notifications",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  help,
	}
	o := configOptions{config: defaultConfig}
	test := &cobra.Command{
		Use:   "test [--config FILE]",
		Short: "Send a test message to each target",
		Long: `Sends a test message to each target that the config file names with its key notify, and
prints which of them took it. The service does not have to run.

Exit codes: 0 all targets took the message, 1 some did not or there are none, 2 the file
is wrong.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return testTargets(cmd.Context(), &o, cmd)
		},
	}
	test.Flags().StringVar(&o.config, "config", o.config, "YAML file with the policy")
	cmd.AddCommand(test)
	return cmd
}

func testTargets(ctx context.Context, o *configOptions, cmd *cobra.Command) error {
	config, err := o.read(cmd.Flags())
	if err != nil {
		return usageError{err}
	}
	if len(config.Notify) == 0 {
		return fmt.Errorf("%s names no targets: list their URLs under notify", o.config)
	}
	if o.exposed {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s\n", o.exposedRemedy())
	}
	node, _ := os.Hostname()
	node = cmp.Or(node, "this host")
	m := notify.Message{
		Title: "egressbpf on " + node + ": test",
		Text:  "A test of notifications from egressbpf on " + node + ".\nContainers were refused nothing.\n",
	}
	errs := make([]error, len(config.Notify))
	var sending sync.WaitGroup
	for i, target := range config.Notify {
		sending.Go(func() { errs[i] = notify.Send(ctx, target, m) })
	}
	sending.Wait()
	return printTold(cmd.OutOrStdout(), config.Notify, errs)
}

func printTold(w io.Writer, targets []notify.Target, errs []error) error {
	var result error
	for i, target := range targets {
		said := "sent"
		if errs[i] != nil {
			said, result = errs[i].Error(), errNotTold
		}
		if _, err := fmt.Fprintf(w, "%d: %v: %s\n", i+1, target, said); err != nil {
			return err
		}
	}
	return result
}
