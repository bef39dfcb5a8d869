// Package netns makes network namespaces and works in them.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// A Namespace ends when nobody has it open and no socket is in it.
type Namespace struct{ file *os.File }

const ofThread = "/proc/thread-self/ns/net"

// New makes a namespace. The caller closes it.
func New() (n *Namespace, err error) {
	n = new(Namespace)
	err = inside(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		n.file, err = os.Open(ofThread)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	return n, nil
}

// Open opens a namespace by its path. The caller closes it.
func Open(path string) (*Namespace, error) {
	file, err := os.Open(path)
	return &Namespace{file}, err
}

// inside runs fn on a thread that returns to its network namespace afterwards.
func inside(fn func() error) (err error) {
	runtime.LockOSThread()
	home, err := os.Open(ofThread)
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
func (n *Namespace) Do(fn func() error) error {
	return inside(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return fn()
	})
}

// Enter moves this thread into the namespace for good.
func (n *Namespace) Enter() error { return unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET) }

// Path is the path of the namespace for other processes, as long as this one has it open.
func (n *Namespace) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

// Close lets the namespace end.
func (n *Namespace) Close() error { return n.file.Close() }
