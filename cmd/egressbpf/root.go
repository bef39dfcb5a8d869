package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/text"
)

// Exit codes, on which scripts rely.
const (
	exitDone       = 0
	exitFailed     = 1
	exitUsage      = 2
	exitNotInForce = 3
	exitRefused    = 3
)

// usageError is bad input, refused before anything was touched.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// errNotInForce ends status if the filter is not in force; the status has been printed.
var errNotInForce = errors.New("not in force")

// globals are the flags of every command.
type globals struct {
	pinPath     string
	cgroupRoot  string
	dockerHost  string
	criEndpoint string
	podNetworks bool // set by commands that compare containers with rules
	debug       bool
	tried       bool // run --or-defaults has tried to put something in force
}

// filter returns the filter of the flags.
func (g *globals) filter() (*loader.Filter, cgroup.Root, error) {
	if err := checkCapabilities(); err != nil {
		return nil, "", err
	}
	if err := cgroup.CheckNamespace(); err != nil {
		return nil, "", err
	}
	if err := loader.New(g.pinPath, "").CheckContainer(); err != nil {
		return nil, "", err
	}
	if err := loader.CheckBPF(); err != nil {
		return nil, "", err
	}
	root := cgroup.Root(g.cgroupRoot)
	if root == "" {
		var err error
		if root, err = cgroup.FindRoot(); err != nil {
			return nil, "", err
		}
	} else if !cgroup.IsRoot(g.cgroupRoot) {
		return nil, "", usageError{fmt.Errorf("--cgroup-root %s: not a mount of the whole cgroup2 hierarchy", g.cgroupRoot)}
	}
	return loader.New(g.pinPath, root), root, nil
}

// reader returns a reader of the filter's counters, which the caller closes.
func (g *globals) reader() (*stats.Reader, error) {
	filter, root, err := g.filter()
	if err != nil {
		return nil, err
	}
	return stats.Open(filter, root)
}

// run is the command line: it returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var g globals
	cmd := newRoot(&g)
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	addCompletion(cmd)
	err := cmd.ExecuteContext(ctx)
	var usage usageError
	if errors.As(err, &usage) {
		err = errors.Join(err, g.putWithoutFlags(ctx, args, stderr))
	}
	switch {
	case err == nil:
		return exitDone
	case errors.Is(err, errNotInForce):
		return exitNotInForce
	case errors.Is(err, errRefused):
		return exitRefused
	case errors.As(err, new(unknownError)):
		report(stderr, err, g.debug)
		return exitFailed
	case cannotBe(err):
		report(stderr, err, g.debug)
		return exitNotInForce
	case errors.As(err, &usage) || errors.Is(err, cgroup.ErrNotBelowRoot) ||
		errors.Is(err, loader.ErrNested) || errors.Is(err, loader.ErrPinPath) || errors.Is(err, loader.ErrWholeHost):
		report(stderr, err, g.debug)
		return exitUsage
	}
	report(stderr, err, g.debug)
	return exitFailed
}

// cannotBe says whether the filter cannot be in force on this host, so that trying again
// does not help.
func cannotBe(err error) bool {
	for _, cause := range []error{cgroup.ErrNoCgroup2, cgroup.ErrNotInitialNamespace, loader.ErrCannotRecognise, loader.ErrPrivateMount,
		loader.ErrOwnPIDs, loader.ErrOwnNetwork, loader.ErrNotMounted, loader.ErrHidden, ebpf.ErrNotSupported} {
		if errors.Is(err, cause) {
			return true
		}
	}
	return loader.Rejected(err) != nil
}

func newRoot(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "egressbpf",
		Short: "Keep containers from cloud metadata services and from sending spam",
		Long: `egressbpf keeps containers from reaching the cloud's metadata service, which hands
out the machine's credentials, and limits the mail connections of each container. It
works in the kernel, with eBPF programs on the containers' parent cgroups, and needs
no process to stay in force.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not fully in force (status), not possible
on this host (check, attach, run) or refused (explain).`,
		Args:          usageArgs(cobra.NoArgs),
		RunE:          help,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	cmd.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return checkFlags(cmd.Flags()) }
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w (see %s --help)", err, cmd.CommandPath())}
	})
	flags := cmd.PersistentFlags()
	flags.StringVar(&g.pinPath, "pin-path", loader.DefaultPinPath, "directory in a bpf filesystem where the filter is pinned")
	flags.StringVar(&g.cgroupRoot, "cgroup-root", "", "mount point of the cgroup2 filesystem (default: from /proc/self/mountinfo)")
	flags.StringVar(&g.dockerHost, "docker-host", "", "Docker daemon to ask for the names of containers: unix:///PATH or tcp://HOST:PORT (default: $DOCKER_HOST, or the usual socket)")
	flags.StringVar(&g.criEndpoint, "cri-endpoint", "", "container runtime to ask for the names of pods: unix:///PATH (default: $CONTAINER_RUNTIME_ENDPOINT, or on a Kubernetes node the first usual socket)")
	flags.BoolVar(&g.debug, "debug", false, "show the kernel verifier's full log if it rejects a program")
	cmd.AddCommand(newAttach(g), newCheck(g), newDetach(g), newStatus(g), newStats(g), newMonitor(g), newTop(g), newExplain(g), newSuggest(g), newLimit(g), newNotify(), newImport(), newRun(g), newMan(), newVersion())
	return cmd
}

// checkFlags refuses empty values of flags for which an empty value would mean something, such
// as the working directory: it probably comes from a variable that is not set.
func checkFlags(flags *pflag.FlagSet) (err error) {
	flags.Visit(func(f *pflag.Flag) {
		values := []string{f.Value.String()}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			values = list.GetSlice()
		}
		switch f.Name {
		case "cgroup", "cgroup-root", "config", "container", "cri-endpoint", "destination", "docker-host", "fields", "input", "pin-path",
			"process", "reason", "web-config-file", "web-listen":
			if len(values) == 0 || slices.Contains(values, "") {
				err = usageError{fmt.Errorf("--%s: want a value, got none", f.Name)}
			}
		}
	})
	return err
}

// addCompletion adds cobra's command, which writes to the output that is set now. Without
// this, cobra would answer an unknown shell with its help.
func addCompletion(root *cobra.Command) {
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "completion" {
			cmd.Args, cmd.RunE = usageArgs(cobra.NoArgs), help
			for _, shell := range cmd.Commands() {
				shell.Args = usageArgs(cobra.NoArgs)
			}
		}
	}
}

func help(cmd *cobra.Command, _ []string) error { return cmd.Help() }

// usageArgs makes the errors of a cobra argument check usage errors.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{fmt.Errorf("%w (see %s --help)", err, cmd.CommandPath())}
		}
		return nil
	}
}

// report prints an error and what to do about it.
func report(w io.Writer, err error, debug bool) {
	text := strings.ReplaceAll(err.Error(), loader.MemlockHint, "")
	fmt.Fprintf(w, "egressbpf: %s\n", strings.Map(visible, text))
	if rejected := loader.Rejected(err); rejected != nil {
		// Inside another error, only one line is shown.
		format := "%-20v\n"
		if debug {
			format = "%+v\n"
		}
		fmt.Fprintf(w, format, rejected)
	}
	if remedy := remedyFor(err); remedy != "" {
		fmt.Fprintf(w, "egressbpf: %s\n", remedy)
	}
}

func remedyFor(err error) string {
	for _, r := range []struct {
		err    error
		remedy string
	}{
		{cgroup.ErrNoCgroup2, "a cgroup v2 hierarchy is needed: boot with systemd.unified_cgroup_hierarchy=1, or mount one with `mount -t cgroup2 none DIR` and name it with --cgroup-root; where the host has one, run it outside of `ip netns exec`, which hides it"},
		{cgroup.ErrNotBelowRoot, "name a directory of the cgroup2 mount, such as its docker directory, or another mount of it with --cgroup-root"},
		{cgroup.ErrNotInitialNamespace, "run it on the host, or with `nsenter --target 1 --cgroup`; in a container, with --cgroupns=host, or with --pid=host and --cap-add=SYS_PTRACE, which let it get there by itself"},
		{loader.ErrOwnPIDs, "run the container with --pid=host"},
		{loader.ErrOwnNetwork, "run the container with --network=host"},
		{loader.ErrNotMounted, "on the host, mount one first: `mount -t bpf bpf /sys/fs/bpf`"},
		{loader.ErrHidden, "run the container with --cap-add=SYS_PTRACE, and where AppArmor is on with --security-opt=apparmor=unconfined"},
		{loader.ErrWholeHost, "name the cgroup whose children are containers, or list the names of containers' cgroups with --scopes"},
		{loader.ErrCannotRecognise, "let Docker put its containers into a cgroup of their own, and name that with --cgroup: /sys/fs/cgroup/docker with its cgroupfs driver, or with its systemd driver a slice (\"cgroup-parent\": \"docker.slice\" in /etc/docker/daemon.json) and --scopes any"},
		{loader.ErrPrivateMount, "run it on the host, in its mount namespace (a unit without PrivateBPF=); in a container, with --pid=host and the host's /sys/fs/bpf mounted (-v /sys/fs/bpf:/sys/fs/bpf)"},
		{loader.ErrUnmounted, "on the host, mount one first: `mount -t bpf bpf /sys/fs/bpf`"},
		{loader.ErrExcluded, "that program was attached to this cgroup, or to one above it, without BPF_F_ALLOW_MULTI: find it with `bpftool cgroup tree`, and detach it, or have its owner attach it with that flag"},
		{loader.ErrInPoliced, "the outer cgroup is policed already, and so are those inside it: leave the inner one out, or take the filter off the outer one first, with `egressbpf detach --cgroup` (counters, buckets and limits start anew)"},
		{loader.ErrNested, "name only the outer cgroup, which takes over from those inside it"},
		{loader.ErrPinPath, "use a directory in a bpf filesystem as --pin-path (`mount -t bpf bpf DIR`, then DIR/egressbpf), or leave --pin-path out"},
		{loader.ErrNotAttached, "run `egressbpf attach` first"},
		{loader.ErrOtherProgram, "ask with the build that attached, or attach with this one, with the same --config and flags as before"},
		{loader.ErrServed, "stop it first: `systemctl stop egressbpf`, or the container in which it runs"},
		{loader.ErrStillPinned, "this link judges no packets any more, but ends only when its pins are removed: unmount what hides their bpf filesystem, and remove the pins or run `egressbpf detach` there"},
		{loader.ErrInterrupted, "attach again, which completes it: `systemctl restart egressbpf`; without the service, `egressbpf attach` with the same --config and flags as before"},
		{loader.ErrBusy, "try again; if it persists, see who holds the directory with `fuser -v`"},
		{loader.ErrOtherVersion, "with that version, run `egressbpf detach --hand-over`, then attach with this one; if you do not have that version, run `egressbpf detach` and attach again: counters and buckets start anew"},
	} {
		if errors.Is(err, r.err) {
			return r.remedy
		}
	}
	// This comes first: its error also looks like a missing permission.
	if loader.Rejected(err) != nil {
		return "this kernel's verifier rejects the program: please report it, with the output of --debug"
	}
	if why := loader.WhyRefused(err); why != "" && checkCapabilities() == nil {
		return why
	}
	for _, r := range []struct {
		err    error
		remedy string
	}{
		{unix.ENOMEM, "the kernel had no memory for it, or the cgroup of this process may not take so much (memory.max; MemoryMax= of its unit): see docs/hosts.md for how much egressbpf needs"},
		{unix.EROFS, "in a container, mount that volume without :ro"},
	} {
		if errors.Is(err, r.err) {
			return r.remedy
		}
	}
	if maps.TooManyFiles(err) {
		return "this process may open too few files: raise the limit (ulimit -n; LimitNOFILE= of its unit)"
	}
	if errors.Is(err, errCapabilities) || errors.Is(err, fs.ErrPermission) {
		const remedy = "this needs root (or CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH)"
		// AppArmor hides the capabilities that a profile denies.
		if confined := loader.Confinement(); len(confined) > 0 && os.Geteuid() == 0 {
			return remedy + "; this process is root, and confined by " + strings.Join(confined, "; and by ")
		}
		return remedy
	}
	return ""
}

// output is the flag --output.
type output string

const (
	table      output = "table"
	jsonText   output = "json"
	prometheus output = "prometheus"
)

// outputValue is the flag as pflag sees it: one of some formats.
type outputValue struct {
	*output
	formats []string
}

func (o outputValue) String() string { return string(*o.output) }
func (o outputValue) Type() string   { return strings.Join(o.formats, "|") }
func (o outputValue) Set(s string) error {
	if !slices.Contains(o.formats, s) {
		last := len(o.formats) - 1
		return fmt.Errorf("want %s or %s", strings.Join(o.formats[:last], ", "), o.formats[last])
	}
	*o.output = output(s)
	return nil
}

// outputFlag adds the flag to a command that has more formats than a table and JSON, or none.
func outputFlag(cmd *cobra.Command, more ...output) *output {
	o := table
	formats := []string{string(table), string(jsonText)}
	for _, format := range more {
		formats = append(formats, string(format))
	}
	cmd.Flags().VarP(outputValue{&o, formats}, "output", "o", "output format")
	return &o
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// visible is [text.Visible].
func visible(r rune) rune { return text.Visible(r) }

// printable is [text.Printable].
func printable(s string) string { return text.Printable(s) }
