package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	service "github.com/egressbpf/egressbpf/internal/daemon"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// defaultConfig is the file that run reads if it exists.
const defaultConfig = "/etc/egressbpf/config.yaml"

type runOptions struct {
	*globals
	configOptions
	orDefaults bool
}

func newRun(g *globals) *cobra.Command {
	o := runOptions{globals: g, configOptions: configOptions{config: defaultConfig}}
	cmd := &cobra.Command{
		Use:   "run [flags]",
		Short: "Keep the filter in force and apply rules to containers as they start",
		Long: `Puts the filter in force as attach does, and keeps it in force. It applies the config
file's rules for single containers to the containers that Docker runs or starts, reads
the file again when it changes and on SIGHUP, and restores what another program
detaches. A file with an error is refused, and the policy that was in force stays.
Until its rule is applied, a new container gets the default policy.

When run ends, however that happens, the filter stays in force; detach removes it. run
works as a systemd service of Type=notify or notify-reload, with a watchdog.`,
		Example: `  egressbpf run
  egressbpf run --config /etc/egressbpf/config.yaml --allow-dns`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.Flags(), cmd.ErrOrStderr())
		},
	}
	o.register(cmd.Flags())
	cmd.Flags().BoolVar(&o.orDefaults, "or-defaults", false, "if the config file is refused and nothing is in force, put the defaults and the other flags in force before failing")
	return cmd
}

func (o *runOptions) run(ctx context.Context, flags *pflag.FlagSet, stderr io.Writer) error {
	if _, err := o.load(flags)(); err != nil {
		return usageError{errors.Join(err, o.putDefaults(ctx, flags, stderr))}
	}
	containers, err := o.inventory()
	if err != nil {
		return usageError{fmt.Errorf("--docker-host: %w", err)}
	}
	defer containers.Close()
	filter, root, err := o.filter()
	if err != nil {
		return err
	}
	watchdog, err := sd.SdWatchdogEnabled(false)
	if err != nil {
		return err
	}
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, unix.SIGHUP)
	defer signal.Stop(reload)
	d := service.Daemon{
		Filter: filter, Root: root, Containers: containers,
		Load: o.load(flags), File: o.config,
		Log:      newLogger(stderr),
		Notify:   func(state string) { _, _ = sd.SdNotify(false, state) },
		Watchdog: watchdog,
		Reload:   reload,
	}
	return d.Run(ctx)
}

// putDefaults puts the defaults in force if a config file is refused and nothing is in force,
// as after a boot.
func (o *runOptions) putDefaults(ctx context.Context, flags *pflag.FlagSet, stderr io.Writer) error {
	config, err := o.withoutFile(flags)
	if !o.orDefaults || err != nil {
		return nil // the flags are wrong, which load has reported
	}
	filter, _, err := o.filter()
	if err != nil {
		return err
	}
	if status, err := filter.Status(); err != nil || len(status.Cgroups) > 0 {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	if err := filter.Attach(ctx, config.Cgroups, config.Policy); err != nil {
		return err
	}
	newLogger(stderr).Warn("the defaults are in force: nothing was in force before")
	return nil
}

// load returns a function that reads the configuration. It is no error if the file at its usual
// path is missing, unless it was there before.
func (o *runOptions) load(flags *pflag.FlagSet) func() (policy.Config, error) {
	optional := !flags.Changed("config")
	return func() (policy.Config, error) {
		if _, err := os.Stat(o.config); optional && errors.Is(err, fs.ErrNotExist) {
			return o.withoutFile(flags)
		}
		optional = false
		return o.read(flags)
	}
}

// withoutFile returns the defaults, changed by the flags.
func (o *runOptions) withoutFile(flags *pflag.FlagSet) (policy.Config, error) {
	without := o.configOptions
	without.config = ""
	return without.read(flags)
}

// newLogger returns a logger that writes lines, without the time if the journal adds that.
func newLogger(w io.Writer) *slog.Logger {
	var options slog.HandlerOptions
	if os.Getenv("JOURNAL_STREAM") != "" {
		options.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(w, &options))
}
