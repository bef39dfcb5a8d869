package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/egressbpf/egressbpf/internal/loader"
)

func newVersion() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this build",
		Args:  usageArgs(cobra.NoArgs),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *out == jsonText {
			return writeJSON(cmd.OutOrStdout(), map[string]string{
				"version": loader.Version(), "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH,
			})
		}
		_, err := fmt.Fprintf(cmd.OutOrStdout(), "egressbpf %s (%s, %s/%s)\n", loader.Version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return err
	}
	return cmd
}
