package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// waitStep is the time between two looks of status --wait.
const waitStep = 500 * time.Millisecond

func newStatus(g *globals) *cobra.Command {
	var (
		wait    time.Duration
		engines bool
	)
	cmd := &cobra.Command{
		Use:   "status [--wait DURATION] [--engines]",
		Short: "Show whether the filter is in force",
		Long: `Reads back from the kernel which programs are attached where, with which policy, and
shows which defences are missing and why, and which running containers are not
covered. Looking changes nothing.

Exits with 3 unless packets are dropped for every running container of Docker,
Podman, containerd and CRI-O. With --wait, looks until that is so, and shows the last
look.`,
		Example: `  egressbpf status
  egressbpf status --wait 30s >/dev/null && start-jobs`,
		Args: usageArgs(cobra.NoArgs),
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long to wait until the filter is in force, such as 30s")
	cmd.Flags().BoolVar(&engines, "engines", false, "exit with 3 too if no engine or container runtime answers, or one of them does not: rules for single containers are not applied then")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if wait < 0 {
			return usageError{errors.New("--wait: want a time that is not negative, such as 30s")}
		}
		names, err := g.names(cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		filter, _, err := g.filter()
		if err != nil {
			return err
		}
		names.asked = names.asked || engines
		g.warnNoEngine(names.containers, cmd.ErrOrStderr())
		complete := func(s *loader.Status) bool { return s.InForce() && !(engines && names.err != nil) }
		status, err := awaitStatus(cmd.Context(), filter, names, wait, complete)
		if err != nil {
			return err
		}
		if *out == jsonText {
			err = writeJSON(cmd.OutOrStdout(), status)
		} else {
			err = printStatus(cmd.OutOrStdout(), status)
		}
		if err == nil && !complete(status) {
			return errNotInForce
		}
		return err
	}
	return cmd
}

// awaitStatus returns the status when the filter is in force and complete says so too, or when the time to wait
// is over.
func awaitStatus(ctx context.Context, filter *loader.Filter, names *names, wait time.Duration, complete func(*loader.Status) bool) (*loader.Status, error) {
	for end := time.Now().Add(wait); ; {
		status, err := readStatus(filter)
		last := time.Until(end) <= 0 || ctx.Err() != nil
		if err == nil && (last || status.InForce()) {
			names.addToStatus(ctx, filter, status)
		}
		if last || err == nil && complete(status) {
			return status, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(min(waitStep, time.Until(end))):
		}
		names.askAgain(ctx)
	}
}

func readStatus(filter *loader.Filter) (*loader.Status, error) {
	status, err := filter.Status()
	if err != nil {
		return nil, err
	}
	if err := filter.AddState(status); err != nil {
		return nil, err
	}
	if err := filter.AddExposed(status); err != nil {
		return nil, err
	}
	if status.Elsewhere, err = filter.Elsewhere(); err != nil {
		return nil, err
	}
	return status, nil
}

func printStatus(w io.Writer, s *loader.Status) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(format string, args ...any) { fmt.Fprintf(tw, format+"\n", args...) }
	row("enforcing\t%s", yesNo(s.Enforcing))
	if s.Policy != nil {
		row("mode\t%s", s.Mode)
		row("blocked\t%s", summary(s.Policy.Presets, s.Policy.Block))
		if allowed := s.Policy.Allowed(); len(allowed) > 0 {
			row("allowed\t%s", summary(nil, allowed))
		}
		smtp := s.Policy.SMTP
		row("mail\tports %s: %s, burst %d, then %s", join(smtp.Ports), smtp.Rate, smtp.Burst, smtp.OverLimit)
		if len(smtp.Exempt) > 0 {
			row("\texempt %s", join(smtp.Exempt))
		}
		row("version\t%s", printable(s.Version))
	}
	row("")
	row("HOOK\tCGROUP\tATTACHED\tPROGRAM\tLINK\tSINCE")
	for _, h := range s.Hooks {
		row("%s", hookRow(h))
	}
	row("")
	row("DEFENCE\tACTIVE")
	for _, d := range s.Defences {
		what := yesNo(d.Active)
		if d.Reason != "" {
			what += ": " + d.Reason
		}
		row("%s\t%s", d.Name, what)
	}
	if len(s.Unknown) > 0 {
		row("")
		row("unknown pins\t%s: of another version; detach removes them", join(s.Unknown))
	}
	printTable(row, "PINNED ELSEWHERE\tCGROUP\tPROGRAM\tLINK", s.Elsewhere, func(e loader.Elsewhere) string {
		return fmt.Sprintf("egressbpf %s\t%s\t%d\t%d", printable(e.Version), printable(e.Cgroup), e.Program, e.Link)
	})
	if s.Room != nil && s.Room.Short() {
		row("")
		row("room\t%s", roomText(*s.Room))
	}
	printTable(row, "METADATA ALLOWED\tCGROUP", s.MetadataAllowed, containerRow)
	printTable(row, "SOCKETS ALLOWED\tCGROUP\tFAMILIES", s.FamiliesAllowed, func(c loader.WithFamilies) string {
		return fmt.Sprintf("%s\t%s", containerRow(c.Uncovered), c.Families)
	})
	printTable(row, "EXPOSED CGROUPS\tCGROUP\tWHAT THE CONTAINER HAS", s.Exposed, func(c loader.Exposed) string {
		var has []string
		if c.Namespace {
			has = append(has, "the host's cgroup namespace (--cgroupns=host)")
		}
		if c.Writable {
			has = append(has, "the host's cgroup tree, writable")
		}
		return containerRow(c.Uncovered) + "\t" + strings.Join(has, ", ")
	})
	printTable(row, "NOT POLICED\tCGROUP\tENGINE", s.Systems, func(c cgroup.System) string {
		return fmt.Sprintf("%s\t%s\t%s: name it with --scopes if you do not trust it", printable(c.Name), printable(c.Cgroup), c.Engine)
	})
	printTable(row, "NOT COVERED\tCGROUP", s.Uncovered, containerRow)
	return tw.Flush()
}

// printTable prints a row for each of a list, below a header; nothing if the list is empty.
func printTable[T any](row func(format string, args ...any), header string, list []T, text func(T) string) {
	if len(list) == 0 {
		return
	}
	row("")
	row("%s", header)
	for _, item := range list {
		row("%s", text(item))
	}
}

func containerRow(c loader.Uncovered) string { return title(c.Name, c.ID) + "\t" + printable(c.Cgroup) }

func hookRow(h loader.Hook) string {
	if !h.Attached {
		return fmt.Sprintf("%s\t%s\tno: %s", h.Name, location(h), h.Reason)
	}
	attached := "yes"
	if h.Reason != "" {
		attached += ", " + h.Reason
	}
	return fmt.Sprintf("%s\t%s\t%s\t%d\t%d\t%s", h.Name, location(h), attached, h.Program, h.Link, h.Since.Format("2006-01-02 15:04:05"))
}

// roomText says how much room there is for containers, and what a lack of it means.
func roomText(r maps.Room) string {
	text := fmt.Sprintf("state of %d containers, of at most %d", r.Containers, r.Of)
	if r.Removed > 0 {
		text += fmt.Sprintf(", and %d removed containers that the kernel has not released yet, of at most %d (`echo 2 > /proc/sys/vm/drop_caches` frees what it caches for them)", r.Removed, r.OfStateless)
	}
	if r.Without > 0 {
		text += fmt.Sprintf("; %d containers found no room: they are judged, but cannot send mail until there is room and attach has run again", r.Without)
	}
	return text
}

// location is where a hook is: at a device, at a cgroup or on the host.
func location(h loader.Hook) string {
	if h.Device != "" {
		return "(" + printable(h.Device) + ")"
	}
	if h.Cgroup == "" {
		return "(host)"
	}
	return printable(h.Cgroup)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// summary names the presets and the first few rules.
func summary(presets []string, rules []policy.Rule) string {
	const shown = 8
	parts := append([]string{}, presets...)
	for i, r := range rules {
		if i == shown {
			parts = append(parts, fmt.Sprintf("and %d more (--output json)", len(rules)-shown))
			break
		}
		parts = append(parts, r.String())
	}
	if len(parts) == 0 {
		return "nothing"
	}
	return strings.Join(parts, " ")
}

func join[T any](list []T) string {
	return strings.Trim(fmt.Sprint(list), "[]")
}
