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
	"slices"
	"sync"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	service "github.com/egressbpf/egressbpf/internal/daemon"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/journal"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/metrics"
	"github.com/egressbpf/egressbpf/internal/notify"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/tell"
	"github.com/egressbpf/egressbpf/internal/web"
)

// defaultConfig is the file that run reads if it exists.
const defaultConfig = "/etc/egressbpf/config.yaml"

type runOptions struct {
	*globals
	configOptions
	orDefaults bool
	web        webOptions
}

// webOptions say where and how metrics and the page are served.
type webOptions struct {
	listen     string
	config     string
	containers bool
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

run tells of refusals in its log: the first of each container and reason at once, then
sums at most once a minute. The config file's key notify names who else is told; see
egressbpf notify test.

With --web-listen, run serves a page at / that shows what is in force and what was
refused, and metrics for Prometheus at /metrics. A process without privileges serves
them.

When run ends, however that happens, the filter stays in force; detach removes it. run
works as a systemd service of Type=notify or notify-reload, with a watchdog.`,
		Example: `  egressbpf run
  egressbpf run --config /etc/egressbpf/config.yaml --allow-dns
  egressbpf run --web-listen 9750`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.Flags(), cmd.ErrOrStderr())
		},
	}
	o.register(cmd.Flags())
	cmd.Flags().BoolVar(&o.orDefaults, "or-defaults", false, "if --web-listen or the address of an engine is refused and nothing is in force, put the policy in force before failing; if the config file is refused, or its policy cannot be put in force, the defaults and the other flags; if a flag is refused, the defaults alone")
	cmd.Flags().StringVar(&o.web.listen, "web-listen", "", "serve a page and metrics for Prometheus at ADDR:PORT; PORT alone is served to this machine only (default: neither)")
	cmd.Flags().StringVar(&o.web.config, "web-config-file", "", "file with TLS and users for --web-listen, in the format of Prometheus's exporter-toolkit")
	cmd.Flags().BoolVar(&o.web.containers, "metrics-containers", true, "serve metrics of each container, besides the totals")
	cmd.Flags().SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "web.config.file" { // as exporters call it
			name = "web-config-file"
		}
		return pflag.NormalizedName(name)
	})
	return cmd
}

func (o *runOptions) run(ctx context.Context, flags *pflag.FlagSet, stderr io.Writer) error {
	if _, err := o.load(flags)(); err != nil {
		return usageError{errors.Join(err, o.putDefaults(ctx, flags, stderr))}
	}
	o.podNetworks = true
	containers, err := o.inventory()
	if err != nil {
		return errors.Join(err, o.putDefaults(ctx, flags, stderr))
	}
	defer containers.Close()
	filter, root, err := o.filter()
	if err != nil {
		return err
	}
	if err := filter.CheckMount(); err != nil && !inTest {
		return err // the filter would end with the unit, and run promises that it does not
	}
	o.warnNoEngine(containers, stderr)
	log := newLogger(stderr)
	node, _ := os.Hostname() // then nobody is told where something happened
	named := &events.Names{Node: node, Filter: filter, Root: root, Find: patiently(containers.Find)}
	hub := newHub(filter, named, log)
	var reload metrics.Reload
	stop, err := o.web.serve(ctx, hub, &metrics.Collector{
		Filter: filter, Root: root, Engines: containers, Containers: o.web.containers, Reload: &reload, Log: log,
		LostByReaders: hub.Lost, MaxAge: time.Second,
	})
	if err != nil {
		return errors.Join(err, o.putDefaults(ctx, flags, stderr))
	}
	defer stop()
	watchdog, err := sd.SdWatchdogEnabled(false)
	if err != nil {
		return err
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, unix.SIGHUP)
	defer signal.Stop(hangup)
	d := service.Daemon{
		Filter: filter, Root: root, Containers: containers,
		Load: o.warned(log, o.load(flags)), File: o.config,
		Log:      log,
		Notify:   func(state string) { _, _ = sd.SdNotify(false, state) },
		Watchdog: watchdog,
		Reload:   hangup,
		Loaded:   reload.Done,
	}
	ctx, cancel := context.WithCancel(ctx)
	var telling sync.WaitGroup
	defer telling.Wait()
	defer cancel()
	teller := newTeller(filter, root, named, log)
	var first sync.Once
	d.InForce = func(config policy.Config) {
		teller.SetTargets(config.Notify)
		first.Do(func() { telling.Go(func() { hub.Run(ctx) }) })
	}
	telling.Go(func() { teller.Run(ctx, hub.Subscribe()) })
	if filter.Served() {
		log.Warn("another egressbpf run keeps the filter in force: each puts its own policy in force, again and again; end one of them")
	}
	if err := d.Run(ctx); err != nil {
		// What can be wrong with the policy shows only now. If the defaults cannot be put in force either,
		// the reason is the same.
		_ = o.putDefaults(ctx, flags, stderr)
		return err
	}
	return nil
}

// newHub returns what reads the events of the filter for all parts of the service.
func newHub(filter *loader.Filter, names *events.Names, log *slog.Logger) *events.Hub {
	const size = 1 << 19
	return &events.Hub{
		Open:   func() (events.SourceCloser, error) { return events.Open(filter, names, size) },
		Failed: func(err error) { log.Warn("refusals are counted, but not told as they happen", "err", err) },
	}
}

// patiently returns find for events: a container may be refused something before its engine has
// told of it. It waits for that once for each container, and no more than a tenth of the time, since
// the events of all other containers wait too.
func patiently(find func(id string) (container.Container, bool)) func(id string) (container.Container, bool) {
	const patience, step, rest = 500 * time.Millisecond, 20 * time.Millisecond, 9
	var (
		mu      sync.Mutex
		missing = map[string]bool{}
		next    time.Time // when to wait again
	)
	// waits says whether to wait for a container.
	waits := func(id string) bool {
		mu.Lock()
		defer mu.Unlock()
		if missing[id] || time.Now().Before(next) {
			return false
		}
		if len(missing) > maxMissing {
			clear(missing)
		}
		missing[id] = true
		next = time.Now().Add((rest + 1) * patience)
		return true
	}
	return func(id string) (container.Container, bool) {
		c, ok := find(id)
		if ok || cgroup.ContainerID(id) == "" || !waits(id) {
			return c, ok
		}
		begun := time.Now()
		for !ok && time.Since(begun) < patience {
			time.Sleep(step)
			c, ok = find(id)
		}
		mu.Lock()
		defer mu.Unlock()
		next = time.Now().Add(rest * time.Since(begun))
		return c, ok
	}
}

// newTeller returns what tells of refusals in the log and to the targets of notifications.
func newTeller(filter *loader.Filter, root cgroup.Root, names *events.Names, log *slog.Logger) *tell.Teller {
	return tell.New(tell.Options{
		Tally: func() (*stats.Tally, error) {
			r, err := stats.Open(filter, root)
			if err != nil {
				return nil, err
			}
			defer r.Close()
			return r.Tally()
		},
		Describe: names.Container,
		Log:      log, Node: names.Node, Send: notify.Send,
	})
}

// warned returns load, with a warning if the file has secrets that every user can read.
func (o *runOptions) warned(log *slog.Logger, load func() (policy.Config, error)) func() (policy.Config, error) {
	return func() (policy.Config, error) {
		config, err := load()
		if err == nil && o.exposed {
			log.Warn(o.exposedRemedy())
		}
		return config, err
	}
}

// serve serves metrics and the page until stop is called, if the flags say so.
func (o webOptions) serve(ctx context.Context, hub *events.Hub, collector *metrics.Collector) (stop func(), err error) {
	if o.listen == "" {
		if o.config != "" {
			return nil, usageError{errors.New("--web-config-file: want --web-listen too")}
		}
		return func() {}, nil
	}
	if err := checkCapabilities(webCapabilities...); err != nil {
		return nil, fmt.Errorf("--web-listen: %w", err)
	}
	node, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	recent := &web.Recent{}
	server, err := web.Open(o.listen, o.config, web.Source{
		Recent:  recent,
		Metrics: func(w io.Writer) error { return collector.Read().Write(w) },
		Page: func() web.Page {
			page := collector.Read().Page()
			page.Node = node
			return page
		},
	}, collector.Log)
	if usage := (web.UsageError{}); errors.As(err, &usage) {
		return nil, usageError{fmt.Errorf("--web-listen: %w", err)}
	}
	if err != nil {
		return nil, fmt.Errorf("--web-listen: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { server.Run(ctx) })
	running.Go(func() { _ = recent.Follow(ctx, hub.Subscribe()) }) // ends with the hub
	return func() { cancel(); running.Wait() }, nil
}

// choice is a configuration that run --or-defaults can put in force.
type choice struct {
	name string
	load func() (policy.Config, error)
}

// builtIn holds whatever is wrong with the flags.
var builtIn = choice{"defaults, without any flags, are", func() (policy.Config, error) { return policy.Config{Policy: policy.Default()}, nil }}

// putDefaults puts the policy of the config file in force if run cannot start and nothing is in force,
// as after a boot; or the defaults, if there is something wrong with it.
func (o *runOptions) putDefaults(ctx context.Context, flags *pflag.FlagSet, stderr io.Writer) error {
	if !o.orDefaults {
		return nil
	}
	o.tried = true
	return o.putFirst(ctx, stderr,
		choice{"policy is", o.load(flags)},
		choice{"defaults are", func() (policy.Config, error) { return o.withoutFile(flags) }},
		builtIn)
}

// putWithoutFlags is putDefaults for arguments that cannot be parsed, as a drop-in of the unit may have them.
func (g *globals) putWithoutFlags(ctx context.Context, args []string, stderr io.Writer) error {
	if g.tried || !slices.Contains(args, "run") || !slices.Contains(args, "--or-defaults") {
		return nil
	}
	filter, _, err := g.filter()
	if err != nil {
		return err
	}
	// What comes behind the error was not read, such as --pin-path.
	if others, err := filter.Elsewhere(); err != nil || len(others) > 0 {
		return err
	}
	return g.putFirst(ctx, stderr, builtIn)
}

// putFirst puts the first configuration in force that can be, if nothing is.
func (g *globals) putFirst(ctx context.Context, stderr io.Writer, choices ...choice) error {
	filter, _, err := g.filter()
	if err != nil {
		return err
	}
	if status, err := filter.Status(); err != nil || len(status.Cgroups) > 0 {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	for _, choice := range choices {
		config, wrong := choice.load()
		if wrong != nil {
			continue // which the caller reports
		}
		if err = filter.Attach(ctx, config.Cgroups, config.Policy); err == nil {
			newLogger(stderr).Warn("the " + choice.name + " in force: nothing was in force before")
			return nil
		}
	}
	return err
}

// load returns a function that reads the configuration. It is no error if the file at its usual
// path is missing, unless it was there before.
func (o *runOptions) load(flags *pflag.FlagSet) func() (policy.Config, error) {
	optional := !flags.Changed("config")
	return func() (policy.Config, error) {
		// A link that leads nowhere is not a file that is missing on purpose.
		if _, err := os.Lstat(o.config); optional && errors.Is(err, fs.ErrNotExist) {
			o.exposed = false
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

// newLogger returns a logger that writes lines, without the time if the journal adds that. If
// standard error is the journal, it gets the lines with fields.
func newLogger(w io.Writer) *slog.Logger {
	inJournal := os.Getenv("JOURNAL_STREAM") != ""
	text := slog.NewTextHandler(w, &slog.HandlerOptions{ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == journal.MessageID || inJournal && a.Key == slog.TimeKey) {
			return slog.Attr{}
		}
		return a
	}})
	if w == os.Stderr && journal.Enabled() {
		return slog.New(journal.New(text))
	}
	return slog.New(text)
}
