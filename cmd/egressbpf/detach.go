package main

import (
	"context"

	"github.com/spf13/cobra"
)

type detachOptions struct {
	*globals
	cgroups []string
}

func newDetach(g *globals) *cobra.Command {
	o := detachOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "detach [--cgroup PATH]...",
		Short: "Take the filter away",
		Long: `Takes the filter off the named cgroups, or off all of them, and removes its pins.
With the last cgroup the counters go too. Doing it twice is no error. The service
(egressbpf run) puts back what is taken off: stop it before.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			filter, _, err := o.filter()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), lockPatience)
			defer cancel()
			return filter.Detach(ctx, o.cgroups)
		},
	}
	cmd.Flags().StringArrayVar(&o.cgroups, "cgroup", nil, "a policed cgroup; may be repeated (default: all)")
	return cmd
}
