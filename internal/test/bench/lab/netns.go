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
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Netns is a network namespace. It ends when nobody has it open and no socket is in it.
type Netns struct{ file *os.File }

const threadNetns = "/proc/thread-self/ns/net"

// NewNetns makes a namespace.
func NewNetns() (n *Netns, err error) {
	n = new(Netns)
	err = inside(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		n.file, err = os.Open(threadNetns)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	return n, nil
}

// OpenNetns opens a namespace by its path.
func OpenNetns(path string) (*Netns, error) {
	file, err := os.Open(path)
	return &Netns{file}, err
}

// inside runs fn on a thread that returns to its network namespace afterwards.
func inside(fn func() error) (err error) {
	runtime.LockOSThread()
	home, err := os.Open(threadNetns)
	if err != nil {
		return err
	}
	defer home.Close()
	defer func() {
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
			// The thread ends with its goroutine, since it stays locked.
			err = errors.Join(err, back)
			return
		}
		runtime.UnlockOSThread()
	}()
	return fn()
}

// Do runs fn on a thread that is in the namespace. Sockets and processes that fn makes are
// in the namespace.
func (n *Netns) Do(fn func() error) error {
	return inside(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return fn()
	})
}

// Enter moves this thread into the namespace for good.
func (n *Netns) Enter() error { return unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET) }

// Path is the path of the namespace for other processes, as long as this one has it open.
func (n *Netns) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

// Close lets the namespace end.
func (n *Netns) Close() error { return n.file.Close() }

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
