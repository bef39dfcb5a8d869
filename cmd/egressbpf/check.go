package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/docker"
	"github.com/egressbpf/egressbpf/internal/preflight"
)

type checkOptions struct {
	*globals
	configOptions
	output *output
}

func newCheck(g *globals) *cobra.Command {
	o := checkOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "check [--config FILE] [flags]",
		Short: "Check whether the filter works on this host",
		Long: `Checks the kernel, the cgroups, Docker, the host's DNS servers and other programs on
the same cgroups, and lets the kernel verify the filter's programs. A self-test
attaches them to a cgroup of its own, where a connection to a blocked destination
must be refused and one to another destination must not. Nothing is left behind, and
what is in force is not touched.

Exits with 3 if the filter cannot be in force on this host.`,
		Example: `  egressbpf check
  egressbpf check --config /etc/egressbpf/config.yaml`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.Flags(), cmd.OutOrStdout())
		},
	}
	o.register(cmd.Flags())
	o.output = outputFlag(cmd)
	return cmd
}

func (o *checkOptions) run(ctx context.Context, flags *pflag.FlagSet, stdout io.Writer) error {
	config, err := o.read(flags)
	if err != nil {
		return usageError{err}
	}
	client, err := docker.Open(o.dockerHost)
	if err != nil {
		return usageError{fmt.Errorf("--docker-host: %w", err)}
	}
	defer client.Close()
	if err := checkCapabilities(capability{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE"}); err != nil {
		return err
	}
	filter, root, err := o.filter()
	if err != nil {
		return err
	}
	if err := filter.CheckCgroups(config.Cgroups, config.Policy); err != nil {
		return err
	}
	if unix.Access(string(root), unix.W_OK) == unix.EROFS {
		return fmt.Errorf("%s is read-only, and the self-test makes a cgroup there: in a container, mount it with -v /sys/fs/cgroup:/sys/fs/cgroup", root)
	}
	pods, err := container.OpenCRI(o.criEndpoint, root, false)
	if err != nil {
		return usageError{fmt.Errorf("--cri-endpoint: %w", err)}
	}
	defer pods.Close()
	host := preflight.Host{
		Filter: filter, Root: root, Docker: client, Pods: pods, Config: config, Resolvers: blockedResolvers(config.Policy),
	}
	report := host.Run(ctx)
	if *o.output == jsonText {
		err = writeJSON(stdout, report)
	} else {
		err = printReport(stdout, report)
	}
	if err == nil && !report.Ready {
		return errNotInForce
	}
	return err
}

func printReport(w io.Writer, r *preflight.Report) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "CHECK\tRESULT\tDETAIL")
	for _, c := range r.Checks {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", c.Name, c.Result, strings.Map(visible, strings.ReplaceAll(c.Detail, "\n", "; ")))
	}
	return tw.Flush()
}
