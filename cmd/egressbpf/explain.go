package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/explain"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
)

// errRefused ends explain if the packet would be refused; the answer has been printed.
var errRefused = errors.New("refused")

// unknownError ends explain if it cannot tell, for whatever reason.
type unknownError struct{ error }

func (e unknownError) Unwrap() error { return e.error }

type explainOptions struct {
	*globals
	container string
	output    *output
}

func newExplain(g *globals) *cobra.Command {
	o := explainOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "explain [--container NAME] DEST[:PORT][/PROTO]",
		Short: "Say what would happen to a packet, and why",
		Long: `Says whether a container could send to a destination, and which entry of the policy
decides. The program that is in force decides, on a copy of its state: nothing is sent
or counted, and no token is taken.

DEST is an address. Without a protocol the packet opens a TCP connection; without a
port it is judged by the entries that have none. Without --container it is that of a
new container. The packet is taken to leave by a network device, except to the
loopback addresses.

Exits with 0 if the packet would pass, with 3 if it would be refused, and with 1 if
explain could not tell.`,
		Example: `  egressbpf explain 169.254.169.254:80
  egressbpf explain --container web 192.0.2.25:25
  egressbpf explain '[fd00:ec2::254]:53/udp'`,
		Args: usageArgs(oneDestination),
		RunE: func(cmd *cobra.Command, args []string) error {
			dst, err := policy.ParseDestination(args[0])
			if err != nil {
				return usageError{err}
			}
			return o.run(cmd.Context(), dst, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&o.container, "container", "", "container that sends: its name, its id or the beginning of it, or its cgroup (default: a new container)")
	o.output = outputFlag(cmd)
	return cmd
}

// oneDestination accepts one destination.
func oneDestination(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("want one destination, got %d arguments", len(args))
	}
	return nil
}

func (o *explainOptions) run(ctx context.Context, dst policy.Rule, stdout, stderr io.Writer) error {
	a, err := o.answer(ctx, dst, stderr)
	if cannotBe(err) {
		return unknownError{err}
	}
	if err != nil {
		return err
	}
	if *o.output == jsonText {
		err = writeJSON(stdout, a)
	} else {
		err = printAnswer(stdout, a)
	}
	switch {
	case err != nil:
		return err
	case a.Verdict == explain.Unknown:
		return unknownError{errors.New("could not tell")}
	case a.Verdict == explain.Refused:
		return errRefused
	}
	return nil
}

func (o *explainOptions) answer(ctx context.Context, dst policy.Rule, stderr io.Writer) (*explain.Answer, error) {
	filter, root, err := o.filter()
	if err != nil {
		return nil, err
	}
	if o.container == "" {
		return explain.Explain(filter, dst, nil)
	}
	o.podNetworks = true
	names, err := o.names(stderr)
	if err != nil {
		return nil, err
	}
	reader, err := stats.Open(filter, root)
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	s, err := reader.Read()
	if err != nil {
		return nil, err
	}
	row, err := names.selected(ctx, reader, s, o.container)
	if errors.Is(err, container.ErrNoContainer) {
		c, open := uncovered(ctx, names, filter, root, o.container)
		if !open {
			return nil, err
		}
		return explain.Unpoliced(filter, dst, c)
	}
	if err != nil {
		return nil, err
	}
	names.addTo(ctx, s)
	return explain.Explain(filter, dst, names.known(row.Identity))
}

// known returns a container with all that its source tells.
func (n *names) known(is container.Identity) *container.Container {
	var c container.Container
	if n.containers != nil {
		c, _ = n.containers.Find(is.ID)
	}
	c.Identity = is
	return &c
}

// uncovered returns the running container of a name that is not policed, if there is one.
func uncovered(ctx context.Context, names *names, filter *loader.Filter, root cgroup.Root, name string) (*container.Container, bool) {
	status, err := filter.Status()
	if err != nil {
		return nil, false
	}
	names.addToStatus(ctx, filter, status)
	var all []container.Identity
	for _, c := range status.Uncovered {
		all = append(all, container.Identity{ID: c.ID, Name: c.Name, Cgroup: c.Cgroup})
	}
	i, err := container.Select(root, all, name)
	if err != nil {
		return nil, false
	}
	return &container.Container{Identity: all[i]}, true
}

func printAnswer(w io.Writer, a *explain.Answer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(what, format string, args ...any) { fmt.Fprintf(tw, what+"\t"+format+"\n", args...) }
	who := "a new one"
	if a.Container != nil {
		who = title(a.Container.Name, a.Container.ID)
	}
	row("container", "%s", who)
	row("destination", "%s", destinationText(a.Destination))
	row("verdict", "%s", verdictText(a))
	if a.Rule != "" {
		row("by", "%s", a.Rule)
	} else if a.Policed && a.Verdict == explain.Passes && !a.WouldBlock {
		row("by", "no entry blocks it")
	}
	for _, e := range a.Entries {
		text := e.Entry
		if len(e.Clouds) > 0 {
			text += ": " + e.Destination + " of " + strings.Join(e.Clouds, ", ")
		}
		row("entry", "%s", text)
	}
	if a.SMTP != nil {
		printMail(row, a.SMTP)
	}
	if a.Early {
		row("connect()", "fails at once")
	}
	if a.Blocked {
		row("in audit mode", "it would pass, and be counted")
	}
	for _, note := range a.Notes {
		row("note", "%s", note)
	}
	return tw.Flush()
}

func printMail(row func(what, format string, args ...any), m *explain.Mail) {
	from := map[string]string{explain.FromPolicy: "the policy", explain.FromRule: "a rule of containers", explain.FromHand: "`limit set`"}[m.From]
	row("mail limit", "%s, burst %d, from %s", m.Rate, m.Burst, from)
	switch {
	case m.Loopback:
		row("", "not over the loopback device")
	case m.Exempt != "":
		row("", "not to this destination: %s", m.Exempt)
	}
	if m.Tokens != nil {
		text := strconv.FormatFloat(*m.Tokens, 'f', 1, 64)
		if m.Wait > 0 {
			text += fmt.Sprintf(", the next in %s", time.Duration(m.Wait*1e9).Round(100*time.Millisecond))
		}
		row("tokens left", "%s", text)
	}
}

func verdictText(a *explain.Answer) string {
	switch {
	case a.Verdict == explain.Unknown:
		return "unknown"
	case !a.Policed:
		return "passes: the container is not policed"
	case a.Blocked:
		return "refused: " + a.Reason
	case a.WouldBlock:
		return "passes, since the mode is audit; would be refused: " + a.Reason
	}
	return "passes"
}

func destinationText(d explain.Destination) string {
	text := d.Address.String()
	if d.Port != 0 {
		text = net.JoinHostPort(text, strconv.Itoa(int(d.Port)))
	}
	return text + "/" + d.Protocol
}
