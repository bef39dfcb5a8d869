package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"
)

type detachOptions struct {
	*globals
	cgroups   []string
	elsewhere bool
}

func newDetach(g *globals) *cobra.Command {
	o := detachOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "detach [--cgroup PATH]... | --elsewhere",
		Short: "Take the filter away",
		Long: `Takes the filter off the named cgroups, or off all of them, and removes its pins.
With the last cgroup the counters go too. Doing it twice is no error. The service
(egressbpf run) puts back what is taken off: stop it before.

What another egressbpf has in force, that is not pinned at the same path, stays and is
told of. With --elsewhere that is taken off instead.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.elsewhere && len(o.cgroups) > 0 {
				return usageError{errors.New("--elsewhere takes off all that is pinned elsewhere: leave --cgroup out")}
			}
			filter, _, err := o.filter()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), lockPatience)
			defer cancel()
			if o.elsewhere {
				return filter.DetachElsewhere(ctx)
			}
			if err := filter.Detach(ctx, o.cgroups); err != nil {
				return err
			}
			return warnElsewhere(cmd.ErrOrStderr(), filter)
		},
	}
	cmd.Flags().StringArrayVar(&o.cgroups, "cgroup", nil, "a policed cgroup; may be repeated (default: all)")
	cmd.Flags().BoolVar(&o.elsewhere, "elsewhere", false, "take off what is in force and not pinned at --pin-path")
	return cmd
}
