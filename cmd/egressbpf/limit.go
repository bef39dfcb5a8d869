package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
)

func newLimit(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "limit",
		Short: "Give a container its own mail limit",
		Long: `Sets, shows or removes a container's own limit on new mail connections, at once.
The tokens that are missing from its bucket stay missing. NAME is the container's name
in Docker, its id or the beginning of it, or its cgroup by name or path.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: help,
	}
	cmd.AddCommand(newLimitSet(g), newLimitGet(g), newLimitUnset(g))
	return cmd
}

// errNoPolicy means that the policy is not known, and so neither is a container's limit.
var errNoPolicy = errors.New("no attached program holds the policy: attach again")

// withContainer calls do with the container of a name.
func (g *globals) withContainer(cmd *cobra.Command, name string, do func(context.Context, *stats.Reader, *stats.Container) error) error {
	names, err := g.names(cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	reader, err := g.reader()
	if err != nil {
		return err
	}
	defer reader.Close()
	s, err := reader.Read()
	if err != nil {
		return err
	}
	c, err := names.selected(cmd.Context(), reader, s, name)
	if err != nil {
		return err
	}
	if !c.SMTP.Known() {
		return errNoPolicy
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), lockPatience)
	defer cancel()
	return do(ctx, reader, c)
}

// oneContainer accepts the name of one container.
func oneContainer(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("want the NAME of one container, got %d arguments", len(args))
	}
	return nil
}

func newLimitSet(g *globals) *cobra.Command {
	var (
		rate  string
		burst uint32
	)
	cmd := &cobra.Command{
		Use:     "set NAME --rate R --burst B",
		Short:   "Give a container its own limit",
		Long:    `Gives a container its own limit. A value whose flag is left out stays as it is.`,
		Example: `  egressbpf limit set mailer --rate 120/minute --burst 30`,
		Args:    usageArgs(oneContainer),
	}
	flags := cmd.Flags()
	flags.StringVar(&rate, "rate", "", "new mail connections the container may open: N/second|minute|hour|day, or unlimited")
	flags.Uint32Var(&burst, "burst", 0, "mail connections the container may open at once")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !flags.Changed("rate") && !flags.Changed("burst") {
			return usageError{errors.New("limit set: want --rate, --burst or both")}
		}
		var newRate policy.Rate
		if flags.Changed("rate") {
			var err error
			if newRate, err = policy.ParseRate(rate); err != nil {
				return usageError{fmt.Errorf("--rate: %w", err)}
			}
		}
		return g.withContainer(cmd, args[0], func(ctx context.Context, r *stats.Reader, c *stats.Container) error {
			limit := policy.Limit{Rate: c.SMTP.Rate, Burst: c.SMTP.Burst}
			if flags.Changed("rate") {
				limit.Rate = newRate
			}
			if flags.Changed("burst") {
				limit.Burst = burst
			}
			if err := limit.Validate(); err != nil {
				return usageError{err}
			}
			return r.SetLimit(ctx, c, limit)
		})
	}
	return cmd
}

func newLimitGet(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get NAME",
		Short: "Show the limit of a container",
		Args:  usageArgs(oneContainer),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return g.withContainer(cmd, args[0], func(_ context.Context, _ *stats.Reader, c *stats.Container) error {
			if *out == jsonText {
				return writeJSON(cmd.OutOrStdout(), c.SMTP)
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s, burst %d\n", c.SMTP.Rate, c.SMTP.Burst)
			return err
		})
	}
	return cmd
}

func newLimitUnset(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "unset NAME",
		Short: "Return a container to the policy's limit",
		Args:  usageArgs(oneContainer),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.withContainer(cmd, args[0], func(ctx context.Context, r *stats.Reader, c *stats.Container) error {
				return r.UnsetLimit(ctx, c)
			})
		},
	}
}
