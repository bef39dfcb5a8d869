// Package lab makes hosts with a container each, and puts a filter in force on each host.
// A host is a set of network namespaces and cgroups; no packet leaves them. They end with
// the process, except for the cgroups.
package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/egressbpf/egressbpf/internal/test/netns"
)

// Netns is a network namespace, with commands in it.
type Netns struct{ *netns.Namespace }

// NewNetns makes a namespace.
func NewNetns() (*Netns, error) {
	n, err := netns.New()
	return &Netns{n}, err
}

// OpenNetns opens a namespace by its path.
func OpenNetns(path string) (*Netns, error) {
	n, err := netns.Open(path)
	return &Netns{n}, err
}

// Run runs a command with stdin in the namespace.
func (n *Netns) Run(stdin, name string, args ...string) error {
	_, err := n.command(stdin, name, args)
	return err
}

// Output runs a command in the namespace and returns what it prints.
func (n *Netns) Output(name string, args ...string) (string, error) {
	return n.command("", name, args)
}

func (n *Netns) command(stdin, name string, args []string) (string, error) {
	path, err := Tool(name)
	if err != nil {
		return "", err
	}
	var out, errs strings.Builder
	cmd := exec.Command(path, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	if err := n.Do(cmd.Run); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(append([]string{name}, args...), " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// Tool returns the path of a command. Those of an administrator may be outside $PATH.
func Tool(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return exec.LookPath(filepath.Join("/usr/sbin", name))
	}
	return path, nil
}

// sysctl sets parameters below /proc/sys/net. Those that this kernel does not have are left
// out.
func (n *Netns) sysctl(values map[string]string) error {
	return n.Do(func() error {
		for name, value := range values {
			err := os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0)
			if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
				return err
			}
		}
		return nil
	})
}
