package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/docker"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/preflight"
)

// lockPatience is how long a command waits for another one to finish.
const lockPatience = 20 * time.Second

type attachOptions struct {
	*globals
	configOptions
	output *output
}

func newAttach(g *globals) *cobra.Command {
	o := attachOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "attach [--cgroup PATH]... [--config FILE] [flags]",
		Short: "Put the filter in force, or replace its policy",
		Long: `Loads the programs, attaches them to the policed cgroups and exits. The filter
stays in force without any process. Missing cgroup directories are made, so attach
can run before the first container starts.

Run it again to replace the policy and the programs. No packet goes unpoliced while
they are replaced, and buckets and counters are kept. Cgroups that are already policed stay
policed and get the new policy. On an error, the policy that was in force stays.

A flag overrides the same key of the config file. A list replaces the list in the
file; it is not added to it.`,
		Example: `  egressbpf attach
  egressbpf attach --cgroup /sys/fs/cgroup/docker --allow-dns --smtp-rate 10/minute
  egressbpf attach --block 10.0.0.0/8 --allow 10.0.0.53:53/udp --allow '[2001:db8::1]:443/tcp'`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.Flags(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	o.register(cmd.Flags())
	o.output = outputFlag(cmd)
	return cmd
}

func (o *attachOptions) run(ctx context.Context, flags *pflag.FlagSet, stdout, stderr io.Writer) error {
	config, err := o.read(flags)
	if err != nil {
		return usageError{err}
	}
	if o.exposed {
		fmt.Fprintf(stderr, "warning: %s\n", o.exposedRemedy())
	}
	names, err := o.names(stderr)
	if err != nil {
		return err
	}
	filter, root, err := o.filter()
	if err != nil {
		return err
	}
	o.warnNoEngine(names.containers, stderr)
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	before, _ := filter.Status() // for the warning alone
	if err := filter.Attach(ctx, config.Cgroups, config.Policy); err != nil {
		return err
	}
	o.warnUnread(before, config.Policy, stderr)
	if err := o.tell(ctx, config, filter, root, names, stdout, stderr); err != nil {
		return fmt.Errorf("the policy is in force, but cannot be read back: %w", err)
	}
	return nil
}

// warnUnread warns if an attach without --config has replaced another policy, although there is the usual
// config file.
func (o *attachOptions) warnUnread(before *loader.Status, now policy.Policy, stderr io.Writer) {
	if o.config != "" || before == nil || before.Policy == nil || before.Policy.Equal(now) {
		return
	}
	if _, err := os.Stat(defaultConfig); err == nil {
		fmt.Fprintf(stderr, "warning: the policy that was in force is replaced, and %s was not read: use --config %s, or systemctl restart egressbpf\n", defaultConfig, defaultConfig)
	}
}

// tell prints what is in force after an attach, and warns of what is not.
func (o *attachOptions) tell(ctx context.Context, config policy.Config, filter *loader.Filter, root cgroup.Root, names *names, stdout, stderr io.Writer) error {
	status, err := filter.Status()
	if err != nil {
		return err
	}
	if err := filter.AddState(status); err != nil {
		return err
	}
	if err := filter.AddExposed(status); err != nil {
		return err
	}
	names.addToStatus(ctx, filter, status)
	if err := warnElsewhere(stderr, filter); err != nil {
		return err
	}
	if err := filter.CheckMount(); err != nil && !inTest {
		fmt.Fprintf(stderr, "warning: %v: the filter ends with this mount namespace, and status on the host does not show it\n", err)
	}
	warn(stderr, status, blockedResolvers(config.Policy))
	if status.Policy != nil {
		for _, text := range preflight.PodWarnings(root, *status.Policy) {
			fmt.Fprintf(stderr, "warning: %s\n", text)
		}
	}
	switch {
	case filter.Served():
		fmt.Fprintln(stderr, "warning: egressbpf run is running and will restore its own configuration: change its config file or flags instead")
	case len(status.MetadataAllowed)+len(status.FamiliesAllowed) > 0:
		fmt.Fprintln(stderr, "warning: containers keep the exceptions that rules gave them, shown below: only egressbpf run revokes them")
	case len(config.Containers) > 0:
		fmt.Fprintf(stderr, "warning: %d rules for single containers are not applied: only egressbpf run applies them\n", len(config.Containers))
	}
	if err := warnHolders(stderr, filter, status); err != nil {
		return err
	}
	if *o.output == jsonText {
		return writeJSON(stdout, status)
	}
	return printStatus(stdout, status)
}

// policyFlags are the policy's keys as flags.
type policyFlags struct {
	mode, overLimit, rate, families, hostSide                       string
	presets, block, allow, smtpPorts, exempted, hostDevices, scopes []string
	allowDNS                                                        bool
	burst                                                           uint32
}

func (p *policyFlags) register(flags *pflag.FlagSet) {
	def := policy.Default()
	flags.StringSliceVar(&p.presets, "preset", def.Presets, "clouds whose metadata service to block: "+strings.Join(policy.PresetNames(), ", "))
	flags.StringSliceVar(&p.block, "block", nil, "destinations to block: ADDR|CIDR[:PORT][/PROTO]; an IPv6 address with a port goes in brackets")
	flags.StringSliceVar(&p.allow, "allow", nil, "destinations to leave open although a preset or --block covers them: ADDR|CIDR[:PORT][/PROTO]")
	flags.BoolVar(&p.allowDNS, "allow-dns", false, "leave port 53 of every blocked address open")
	flags.StringSliceVar(&p.smtpPorts, "smtp-ports", []string{"25", "465", "587"}, "TCP ports that count as mail")
	flags.StringVar(&p.rate, "smtp-rate", def.SMTP.Rate.String(), "new mail connections a container may open: N/second|minute|hour|day, or unlimited")
	flags.Uint32Var(&p.burst, "smtp-burst", def.SMTP.Burst, "mail connections a container may open at once")
	flags.StringVar(&p.overLimit, "over-limit", string(def.SMTP.OverLimit), "what happens to mail connections over the limit: drop (the client tries again) or reject (they fail at once)")
	flags.StringSliceVar(&p.exempted, "smtp-exempt", nil, "destinations to which mail is not limited: ADDR|CIDR")
	flags.StringVar(&p.families, "socket-families", string(def.Families), "socket families containers may use: restrict (only those whose packets pass the filter), any, or families to add to restrict, such as vsock")
	flags.StringVar(&p.hostSide, "host-side", string(def.HostSide), "judge packets from containers' bridges again on the host: on or off")
	flags.StringSliceVar(&p.hostDevices, "host-devices", nil, "bridges and other devices of the host that lead to containers, besides Docker's: NAME or NAME*")
	flags.StringSliceVar(&p.scopes, "scopes", strings.Fields(join(def.Scopes)), "names of containers' cgroups, in the root and in slices; default stands for the defaults; any makes each child of a policed cgroup a container")
	flags.StringVar(&p.mode, "mode", string(def.Mode), "enforce, or audit to count what would be refused and let it pass")
}

// apply sets the keys whose flags were given. An error names the flag.
func (p *policyFlags) apply(flags *pflag.FlagSet, to *policy.Policy) error {
	for _, f := range []struct {
		name string
		set  func() error
	}{
		{"preset", func() (err error) {
			if len(p.presets) == 0 {
				// Probably a variable that is not set.
				return errors.New("want a preset, or none to block nothing")
			}
			to.Presets, err = policy.ParsePresets(p.presets)
			return err
		}},
		{"block", func() (err error) { to.Block, err = parseAll(p.block, policy.ParseRule); return err }},
		{"allow", func() (err error) { to.Allow, err = parseAll(p.allow, policy.ParseRule); return err }},
		{"allow-dns", func() error { to.AllowDNS = p.allowDNS; return nil }},
		{"smtp-ports", func() (err error) { to.SMTP.Ports, err = policy.ParsePorts(p.smtpPorts); return err }},
		{"smtp-rate", func() (err error) { to.SMTP.Rate, err = policy.ParseRate(p.rate); return err }},
		{"smtp-burst", func() error { to.SMTP.Burst = p.burst; return nil }},
		{"over-limit", func() (err error) { to.SMTP.OverLimit, err = policy.ParseOverLimit(p.overLimit); return err }},
		{"smtp-exempt", func() (err error) { to.SMTP.Exempt, err = parseAll(p.exempted, policy.ParsePrefix); return err }},
		{"socket-families", func() (err error) { to.Families, err = policy.ParseFamilies(p.families); return err }},
		{"host-side", func() (err error) { to.HostSide, err = policy.ParseSwitch(p.hostSide); return err }},
		{"scopes", func() (err error) { to.Scopes, err = policy.ParseScopes(p.scopes); return err }},
		{"host-devices", func() (err error) { to.HostDevices, err = parseAll(p.hostDevices, policy.ParseDevice); return err }},
		{"mode", func() (err error) { to.Mode, err = policy.ParseMode(p.mode); return err }},
	} {
		if !flags.Changed(f.name) {
			continue
		}
		if err := f.set(); err != nil {
			return fmt.Errorf("--%s: %w", f.name, err)
		}
	}
	return nil
}

func parseAll[T any](texts []string, parse func(string) (T, error)) ([]T, error) {
	all := make([]T, 0, len(texts))
	for _, text := range texts {
		v, err := parse(text)
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, nil
}

// warn prints one line for each gap that is left open.
func warn(w io.Writer, s *loader.Status, resolvers []netip.Addr) {
	for _, h := range s.Hooks {
		if !h.Attached {
			fmt.Fprintf(w, "warning: hook %s %s is not attached: %s\n", h.Name, h.Cgroup, h.Reason)
		}
	}
	for _, d := range s.Defences {
		switch {
		case !d.Active:
			fmt.Fprintf(w, "warning: no defence %s: %s\n", d.Name, d.Reason)
		case d.Reason != "":
			fmt.Fprintf(w, "warning: defence %s is not as the policy says: %s\n", d.Name, d.Reason)
		}
	}
	if s.Policy != nil {
		for allow, service := range s.Policy.Opens() {
			fmt.Fprintf(w, "warning: --allow %s opens the metadata service %s to all containers\n", allow, service)
		}
	}
	if !loader.InHostsNetwork() {
		fmt.Fprintln(w, "warning: this is not the host's network namespace: host_side sees only packets that this namespace forwards")
	}
	if s.Policy != nil && len(s.Policy.Blocked()) == 0 {
		fmt.Fprintln(w, "warning: nothing is blocked")
	}
	if s.Mode == policy.Audit {
		fmt.Fprintln(w, "warning: the mode is audit: refusals are counted, and nothing is refused")
	}
	if n := len(s.Uncovered); n > 0 {
		fmt.Fprintf(w, "warning: %d running containers are not policed, such as %s in %s: %s%s\n", n, title(s.Uncovered[0].Name, s.Uncovered[0].ID), printable(s.Uncovered[0].Cgroup), uncoveredRemedy(s), judgedAllTheSame(s))
	}
	if n := len(s.Systems); n > 0 {
		fmt.Fprintf(w, "warning: %d system containers are not policed, such as %s of %s in %s: if you do not trust them, police them with --scopes 'default,lxc.payload.*,systemd-nspawn@*,machine-*.scope'\n",
			n, printable(s.Systems[0].Name), s.Systems[0].Engine, printable(s.Systems[0].Cgroup))
	}
	if s.Room != nil && s.Room.Short() {
		fmt.Fprintf(w, "warning: %s\n", roomText(*s.Room))
	}
	for _, addr := range resolvers {
		fmt.Fprintf(w, "warning: containers cannot reach the DNS server %s that they are given: it is blocked; use --allow-dns\n", addr)
	}
}

// uncoveredRemedy says how to cover containers that are not.
func uncoveredRemedy(s *loader.Status) string {
	if s.Recognises {
		return "name their cgroups with --scopes"
	}
	return "attach --cgroup to the cgroup that all are in, which may be the root of the hierarchy, or name their own with --cgroup"
}

// judgedAllTheSame says what still holds for containers that are not policed: the host cannot
// tell which container behind a bridge sent a packet.
func judgedAllTheSame(s *loader.Status) string {
	if !s.HasDefence(loader.HostSide) {
		return ""
	}
	return "; host_side still judges what they send through bridges"
}

// warnHolders names containers that still have sockets which they could not open now. Without
// the defence they could open them again after a restart, so there is nothing to say.
func warnHolders(w io.Writer, filter *loader.Filter, s *loader.Status) error {
	if !s.HasDefence(loader.SocketFamilies) {
		return nil
	}
	holders, err := filter.Holders()
	if err != nil {
		return err
	}
	for _, h := range holders {
		fmt.Fprintf(w, "warning: container %s still has sockets open that it could not open now (%s); they bypass the filter: restart the container\n",
			printable(fmt.Sprintf("%.12s", path.Base(h.Cgroup))), strings.Join(h.Families, ", "))
	}
	return nil
}

// warnElsewhere names filters that are in force and not pinned here.
func warnElsewhere(w io.Writer, filter *loader.Filter) error {
	others, err := filter.Elsewhere()
	for _, e := range others {
		fmt.Fprintf(w, "warning: %s is also policed by another egressbpf (link %d), which is not pinned below %s: it has another --pin-path, or a mount hides its bpf filesystem; detach --elsewhere detaches it\n", printable(e.Cgroup), e.Link, filter.Pins())
	}
	return err
}

// resolvConfs are read for the DNS servers that Docker gives to containers. Docker reads the
// second if the first names only a stub on the loopback.
var resolvConfs = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}

// dockerConfig is read for the DNS servers that Docker gives to containers instead.
var dockerConfig = docker.ConfigFile

// blockedResolvers returns the DNS servers of containers that the policy blocks. It does not
// know those of single containers (docker run --dns).
func blockedResolvers(p policy.Policy) []netip.Addr {
	const udp, domain = 17, 53
	var blocked []netip.Addr
	for _, text := range resolvers() {
		addr, err := netip.ParseAddr(text)
		if err == nil && p.Blocks(addr.WithZone(""), udp, domain) && !slices.Contains(blocked, addr) {
			blocked = append(blocked, addr)
		}
	}
	return blocked
}

func resolvers() (found []string) {
	// check reports a file that Docker cannot read.
	if config, err := docker.ReadConfig(dockerConfig); err == nil && len(config.DNS) > 0 {
		return config.DNS
	}
	for _, name := range resolvConfs {
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			break
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if fields := strings.Fields(lines.Text()); len(fields) >= 2 && fields[0] == "nameserver" {
				found = append(found, fields[1])
			}
		}
		f.Close()
	}
	return found
}
