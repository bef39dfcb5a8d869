package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/iptables"
	"github.com/egressbpf/egressbpf/internal/policy"
)

func newImport() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import",
		Short: "Make a config file from other tools' rules",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  help,
	}
	cmd.AddCommand(newImportIptables())
	return cmd
}

func newImportIptables() *cobra.Command {
	var live bool
	cmd := &cobra.Command{
		Use:   "iptables [FILE]...",
		Short: "Make a config file from iptables rules",
		Long: `Reads the output of iptables-save and ip6tables-save from files, from stdin, or with
--live from this host, and prints a config file that does the same for containers.
It covers the rules of DOCKER-USER and of the chains they jump to, and rules of
FORWARD about metadata services or mail.

On stderr it names each rule of DOCKER-USER that has no counterpart in the config or
is stricter or weaker there, with its line and the reason. It changes nothing on this
host.`,
		Example: `  iptables-save | egressbpf import iptables >config.yaml
  egressbpf import iptables /etc/iptables/rules.v4 /etc/iptables/rules.v6 >config.yaml
  sudo egressbpf import iptables --live >config.yaml
  egressbpf attach --config config.yaml`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var sources []iptables.Source
			var err error
			switch {
			case live && len(args) > 0:
				return usageError{errors.New("import iptables: want files or --live, not both")}
			case live:
				sources, err = liveRules(cmd.Context(), cmd.ErrOrStderr())
			case len(args) == 0 && terminal(cmd.InOrStdin()):
				return usageError{errors.New("import iptables: want a file, the output of iptables-save on stdin, or --live")}
			case len(args) == 0:
				args = []string{"-"}
				fallthrough
			default:
				sources, err = savedRules(cmd.InOrStdin(), args)
			}
			if err != nil {
				return err
			}
			return importRules(sources, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&live, "live", false, "read the rules in force on this host, those of iptables-nft and of iptables-legacy")
	return cmd
}

func importRules(sources []iptables.Source, stdout, stderr io.Writer) error {
	result, err := iptables.Translate(sources...)
	if result != nil {
		for _, n := range result.Notes {
			fmt.Fprintln(stderr, strings.Map(visible, n.String()))
		}
	}
	if err != nil {
		return fmt.Errorf("import iptables: %w", err)
	}
	config := result.Config.YAML(result.Comments)
	// Read it back, to be sure that attach accepts it.
	if _, err := policy.ParseConfig("config.yaml", config); err != nil {
		return fmt.Errorf("import iptables: %w", err)
	}
	if _, err := stdout.Write(config); err != nil {
		return err
	}
	fmt.Fprintf(stderr, "%d rules carried over\n", result.Carried)
	return nil
}

// maxRules bounds the bytes that are read: a million rules would take too long.
const maxRules = 16 << 20

func savedRules(stdin io.Reader, names []string) ([]iptables.Source, error) {
	var sources []iptables.Source
	for _, name := range names {
		in, shown := stdin, "stdin"
		if name != "-" {
			f, err := os.Open(name)
			if err != nil {
				return nil, err
			}
			defer f.Close()
			in, shown = f, name
		}
		text, err := readAtMost(in, shown, maxRules)
		if errors.Is(err, errTooLarge) {
			err = fmt.Errorf("%w: save only the tables that matter, with iptables-save -t filter and -t nat", err)
		}
		if err != nil {
			return nil, err
		}
		sources = append(sources, iptables.Source{Name: shown, Text: string(text)})
	}
	return sources, nil
}

// liveRules reads the tables of iptables-nft and iptables-legacy, which can be in force at the
// same time. A host without these two names has only one of them.
func liveRules(ctx context.Context, stderr io.Writer) ([]iptables.Source, error) {
	var sources []iptables.Source
	for _, family := range []string{"iptables", "ip6tables"} {
		found := false
		for _, name := range []string{family + "-nft-save", family + "-legacy-save", family + "-save"} {
			path, err := exec.LookPath(name)
			if err != nil || found && name == family+"-save" {
				continue
			}
			found = true
			var out, errs bytes.Buffer
			save := exec.CommandContext(ctx, path)
			save.Stdout, save.Stderr = &out, &errs
			if err := save.Run(); err != nil {
				return nil, fmt.Errorf("%s: %w: %s", path, err, strings.TrimSpace(errs.String()))
			}
			rules := 0
			for line := range strings.Lines(out.String()) {
				if strings.HasPrefix(line, "-A ") {
					rules++
				}
			}
			fmt.Fprintf(stderr, "%s: %d rules\n", name, rules)
			if rules > 0 || strings.Contains(out.String(), "incompatible") { // some rules were made with nft, and are not shown
				sources = append(sources, iptables.Source{Name: name, Text: out.String(), Live: true})
			}
		}
		if !found {
			fmt.Fprintf(stderr, "%s-save: not found\n", family)
		}
	}
	if err := warnNative(ctx, stderr); err != nil {
		return nil, err
	}
	if len(sources) == 0 {
		return nil, errors.New("import iptables: there are no rules on this host, or no iptables-save to read them with")
	}
	return sources, nil
}

// warnNative names tables of nftables that filter what containers send and that iptables-save
// does not show.
func warnNative(ctx context.Context, stderr io.Writer) error {
	path, err := exec.LookPath("nft")
	if err != nil {
		fmt.Fprintln(stderr, "nft: not found: cannot tell whether this host has rules other than those of iptables")
		return nil
	}
	var out, errs bytes.Buffer
	list := exec.CommandContext(ctx, path, "-j", "list", "ruleset")
	list.Stdout, list.Stderr = &out, &errs
	if err := list.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", path, err, strings.TrimSpace(errs.String()))
	}
	native, docker, err := nativeTables(out.Bytes())
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if docker {
		fmt.Fprintln(stderr, "Docker uses nftables itself here, and does not use the chain DOCKER-USER: the rules there stop nothing, but the policy will")
	}
	for _, t := range native {
		fmt.Fprintf(stderr, "nft table %s: not read: it filters what containers send, and import reads only rules of iptables\n", printable(t))
	}
	return nil
}

// nativeTables returns, from the output of nft, the tables (family and name) that filter what
// containers send and are not those of iptables. It leaves out Docker's own tables; docker
// says whether there are any.
func nativeTables(ruleset []byte) (tables []string, docker bool, err error) {
	var list struct {
		Nftables []struct {
			Chain *struct{ Family, Table, Name, Type, Hook string }
		}
	}
	if err := json.Unmarshal(ruleset, &list); err != nil {
		return nil, false, err
	}
	for _, entry := range list.Nftables {
		c := entry.Chain
		if c == nil || c.Type != "filter" || !slices.Contains([]string{"prerouting", "forward", "postrouting", "ingress", "egress"}, c.Hook) {
			continue
		}
		table := c.Family + " " + c.Table
		switch {
		case c.Table == "docker-bridges":
			docker = true
		case (c.Family == "ip" || c.Family == "ip6") && slices.Contains([]string{"filter", "mangle", "raw", "security"}, c.Table) && c.Name == strings.ToUpper(c.Name):
			// Of iptables-nft.
		case !slices.Contains(tables, table):
			tables = append(tables, table)
		}
	}
	return tables, docker, nil
}

func terminal(in io.Reader) bool {
	f, ok := in.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
