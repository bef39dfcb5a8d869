package pins

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrBusy means that another process is attaching or detaching and does not finish.
var ErrBusy = errors.New("another egressbpf is attaching or detaching")

// Lock excludes other processes until unlock is called. It creates the pin path if it is
// missing, and says whether it did. If ctx ends first, the error wraps ErrBusy.
func (p Path) Lock(ctx context.Context) (unlock func(), created bool, err error) {
	for {
		if err := os.MkdirAll(filepath.Dir(string(p)), 0o700); err != nil {
			return nil, false, err
		}
		err := os.Mkdir(string(p), 0o700)
		created := err == nil
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, false, err
		}
		unlock, err := p.LockExisting(ctx)
		if !errors.Is(err, fs.ErrNotExist) {
			return unlock, created, err
		}
	}
}

// LockExisting does so at a pin path that exists. The error wraps fs.ErrNotExist if there is
// none.
func (p Path) LockExisting(ctx context.Context) (unlock func(), err error) {
	for {
		dir, err := os.Open(string(p))
		if err != nil {
			return nil, err
		}
		if err := flock(ctx, dir); err != nil {
			dir.Close()
			return nil, err
		}
		// A detach that held the lock before may have removed the directory.
		ours, err := dir.Stat()
		if err == nil {
			if current, err := os.Stat(string(p)); err == nil && os.SameFile(ours, current) {
				return func() { dir.Close() }, nil
			}
		}
		dir.Close()
	}
}

// RemoveEmpty removes the pin path that Lock created, unless another process had the lock
// before and has pinned something.
func (p Path) RemoveEmpty() error {
	if err := os.Remove(string(p)); !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// Locked says whether another process is attaching or detaching.
func (p Path) Locked() bool { return locked(string(p), unix.LOCK_SH) }

// locked says whether another process holds a lock of a directory that excludes a lock of
// this kind.
func locked(path string, how int) bool {
	dir, err := os.Open(path)
	if err != nil {
		return false
	}
	defer dir.Close()
	return errors.Is(unix.Flock(int(dir.Fd()), how|unix.LOCK_NB), unix.EWOULDBLOCK)
}

func flock(ctx context.Context, dir *os.File) error {
	const retry = 5 * time.Millisecond
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", dir.Name(), err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("lock %s: %w: %w", dir.Name(), ErrBusy, context.Cause(ctx))
		case <-time.After(retry):
		}
	}
}

// service is a directory beside the pins that a service keeps locked while it runs.
const service = "service"

// Serve tells other processes that this one keeps the filter in force, until it closes the
// file.
func (p Path) Serve() (*os.File, error) {
	path := p.Pin(service)
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return dir, nil
}

// Served says whether a process keeps the filter in force.
func (p Path) Served() bool { return locked(p.Pin(service), unix.LOCK_EX) }
