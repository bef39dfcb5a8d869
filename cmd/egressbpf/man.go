package main

import (
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/egressbpf/egressbpf/internal/loader"
)

func newMan() *cobra.Command {
	return &cobra.Command{
		Use:   "man DIRECTORY",
		Short: "Write the manual pages",
		Long: `Writes a manual page (section 8) for each command into a directory, which is made if
it does not exist. The pages say what --help says.`,
		Example: "  egressbpf man /usr/local/share/man/man8",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true // the same build writes the same pages
			keepColumns(root)
			date := buildDate()
			header := doc.GenManHeader{Section: "8", Source: "egressbpf " + loader.Version(), Manual: "egressbpf", Date: &date}
			return doc.GenManTree(root, &header, args[0])
		},
	}
}

// buildDate returns the date of the commit that this build was made from, if it is known.
func buildDate() time.Time {
	info, _ := debug.ReadBuildInfo()
	for _, s := range info.Settings {
		if date, err := time.Parse(time.RFC3339, s.Value); s.Key == "vcs.time" && err == nil {
			return date
		}
	}
	return time.Unix(0, 0).UTC()
}

// keepColumns indents columns, so that Markdown keeps their lines.
func keepColumns(cmd *cobra.Command) {
	cmd.Long = strings.ReplaceAll(cmd.Long, "\n  ", "\n      ")
	for _, sub := range cmd.Commands() {
		keepColumns(sub)
	}
}
