package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
)

type detachOptions struct {
	*globals
	cgroups   []string
	elsewhere bool
	handOver  bool
}

func newDetach(g *globals) *cobra.Command {
	o := detachOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "detach [--cgroup PATH]... | --elsewhere | --hand-over",
		Short: "Detach the filter",
		Long: `Detaches the filter from the named cgroups, or from all of them, and removes its
pins. Detaching the last cgroup also removes the counters. It is no error if nothing is
attached. Stop the service (egressbpf run) first, or it restores the filter.

A filter that is not pinned at --pin-path stays in force, and detach warns about it.
With --elsewhere, detach detaches those filters instead.

To go back to an earlier version, use --hand-over: the filter stays in force with all
counters, buckets and limits, in maps that every version knows, and detach removes only
the pins that would keep an earlier version from attaching. Then attach with that version.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if alone := len(o.cgroups) == 0; o.elsewhere && (!alone || o.handOver) || o.handOver && !alone {
				return usageError{errors.New("--elsewhere and --hand-over stand alone")}
			}
			filter, root, err := o.filter()
			if err != nil {
				return err
			}
			o.warnUnknown(cmd.ErrOrStderr(), filter, root)
			ctx, cancel := context.WithTimeout(cmd.Context(), lockPatience)
			defer cancel()
			if o.handOver {
				return filter.HandOver(ctx)
			}
			if o.elsewhere {
				return filter.DetachElsewhere(ctx)
			}
			served := filter.Served()
			if err := filter.Detach(ctx, o.cgroups); err != nil {
				return err
			}
			if served {
				fmt.Fprintln(cmd.ErrOrStderr(), "warning: egressbpf run is running and will restore what its configuration names: stop it first (`systemctl stop egressbpf`, or the container in which it runs), or change its config file")
			}
			return warnElsewhere(cmd.ErrOrStderr(), filter)
		},
	}
	cmd.Flags().StringArrayVar(&o.cgroups, "cgroup", nil, "policed cgroup to detach the filter from; may be repeated (default: all)")
	cmd.Flags().BoolVar(&o.elsewhere, "elsewhere", false, "detach filters that are in force and not pinned at --pin-path")
	cmd.Flags().BoolVar(&o.handOver, "hand-over", false, "keep the filter in force, and let an earlier version attach over it")
	return cmd
}

// warnUnknown names cgroups that are to be detached and are not policed: that is no error, but
// may be a typing mistake.
func (o *detachOptions) warnUnknown(w io.Writer, filter *loader.Filter, root cgroup.Root) {
	status, err := filter.Status()
	if err != nil {
		return // Detach reports this error
	}
	for _, path := range o.cgroups {
		rel, err := root.Rel(path)
		if err == nil && !slices.Contains(status.Cgroups, root.Path(rel)) {
			fmt.Fprintf(w, "warning: %s is not policed\n", printable(path))
		}
	}
}
