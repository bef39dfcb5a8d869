package lab

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// Cgroups are the cgroups of a host.
type Cgroups struct {
	// Policed takes the place of the root: it is policed, and containers in it are
	// recognised by their names.
	Policed string
	// Service is in Policed and no container; Container is a container of Docker.
	Service, Container string
	// Aside is empty and outside Policed.
	Aside string
}

// The names of all cgroups of a run begin with this and the number of a process.
const cgroupPrefix = "egressbpf-bench-"

var serial atomic.Int64

// NewCgroups makes cgroups, with so many containers. The caller closes them.
func NewCgroups(root cgroup.Root, containers int) (_ *Cgroups, err error) {
	name := fmt.Sprintf("%s%d-%d", cgroupPrefix, os.Getppid(), serial.Add(1))
	c := &Cgroups{Policed: root.Path("/" + name + ".slice"), Aside: root.Path("/" + name + "-aside.slice")}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	c.Service = filepath.Join(c.Policed, "ssh.service")
	dirs := []string{c.Policed, c.Aside, c.Service}
	for range max(containers, 1) {
		id := make([]byte, 32)
		rand.Read(id)
		c.Container = filepath.Join(c.Policed, "docker-"+hex.EncodeToString(id)+".scope")
		dirs = append(dirs, c.Container)
	}
	for _, dir := range dirs {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// Close removes the cgroups.
func (c *Cgroups) Close() error {
	return errors.Join(removeCgroup(c.Policed), removeCgroup(c.Aside))
}

// removeCgroup removes a cgroup with those in it, whose processes have ended or are
// about to end.
func removeCgroup(path string) error {
	inner, err := os.ReadDir(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, d := range inner {
		if d.IsDir() {
			if err := removeCgroup(filepath.Join(path, d.Name())); err != nil {
				return err
			}
		}
	}
	// A process that was killed may still be leaving.
	for range 200 {
		if err = os.Remove(path); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

// RemoveCgroups removes the cgroups of all runs that have ended, and those of this process.
func RemoveCgroups() error {
	root, err := cgroup.FindRoot()
	if err != nil {
		return err
	}
	all, err := filepath.Glob(filepath.Join(string(root), cgroupPrefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range all {
		text, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), cgroupPrefix), "-")
		pid, err := strconv.Atoi(text)
		if err != nil || (pid != os.Getpid() && unix.Kill(pid, 0) == nil) {
			continue
		}
		errs = append(errs, removeCgroup(path))
	}
	return errors.Join(errs...)
}
