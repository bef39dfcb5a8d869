package cgroup

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Cgroup is a cgroup that was found.
type Cgroup struct {
	// Rel is its path, as [Root.Rel] returns it.
	Rel string
	ID  uint64
}

// Outermost returns the cgroups below rel for which is returns true, except those below
// another one of them. They are in order of their paths.
func (r Root) Outermost(rel string, is func(rel string) bool) ([]Cgroup, error) {
	var found []Cgroup
	err := r.walk(rel, func(c Cgroup) error {
		if c.Rel == rel || !is(c.Rel) {
			return nil
		}
		found = append(found, c)
		return fs.SkipDir
	})
	return found, err
}

// Processes calls fn for each process in the cgroup rel or below it. Processes that come
// and go meanwhile may be missed, or may have ended.
func (r Root) Processes(rel string, fn func(pid int)) error {
	return r.untilProcess(rel, func(pid int) bool { fn(pid); return false })
}

// untilProcess is Processes, but ends when fn returns true.
func (r Root) untilProcess(rel string, fn func(pid int) bool) error {
	return r.walk(rel, func(c Cgroup) error {
		// A threaded cgroup has no processes of its own (EOPNOTSUPP).
		pids, err := read(filepath.Join(r.Path(c.Rel), "cgroup.procs"))
		if err != nil {
			return nil
		}
		for field := range strings.FieldsSeq(pids) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 && fn(pid) {
				return fs.SkipAll
			}
		}
		return nil
	})
}

// populated says whether a process is in a cgroup or below it.
func (r Root) populated(rel string) bool {
	// Status asks this of each container. The kernel gives the whole file at once.
	fd, err := unix.Open(string(r)+rel+"/cgroup.events", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var events [128]byte
	n, err := unix.Read(fd, events[:])
	return err == nil && bytes.Contains(events[:n], []byte("populated 1"))
}

// walk calls fn for the cgroup rel and all cgroups below it, until fn returns an error.
// fs.SkipDir leaves out the cgroups below, and fs.SkipAll ends the walk without an error. It
// is no error if cgroups come and go meanwhile. walk leaves out cgroups that are out of reach.
//
// A host can have thousands of cgroups, and each has dozens of files. So walk asks nothing
// about the files, and does not open a directory without directories.
func (r Root) walk(rel string, fn func(Cgroup) error) error {
	id, err := r.ID(rel)
	if outOfReach(err) {
		return nil
	}
	if err == nil {
		err = r.walkFrom(Cgroup{rel, id}, fn)
	}
	if err == fs.SkipAll {
		return nil
	}
	return err
}

func (r Root) walkFrom(c Cgroup, fn func(Cgroup) error) error {
	if err := fn(c); err != nil {
		if err == fs.SkipDir {
			return nil
		}
		return err
	}
	children, err := r.Children(c.Rel)
	if err != nil && !outOfReach(err) {
		return err
	}
	for _, child := range children {
		if err := r.walkFrom(child, fn); err != nil {
			return err
		}
	}
	return nil
}

// outOfReach says whether an error means that a cgroup was removed, or that its path is longer
// than the kernel takes. A user to whom a cgroup was delegated can nest cgroups so deeply that no
// path names them, and must not stop a walk by that. No engine can start a container there.
func outOfReach(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENAMETOOLONG)
}

// Children returns the cgroups in the directory of another one, in order of their names. The
// error wraps fs.ErrNotExist if that is gone.
func (r Root) Children(rel string) (found []Cgroup, err error) {
	path := r.Path(rel)
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Nlink == 2 {
		return nil, nil // kernfs_refresh_inode() counts the directories in it
	}
	dir, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(dir)
	begin := strings.TrimRight(rel, "/") + "/"
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.Getdents(dir, buf)
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			break
		}
		// struct linux_dirent64 (include/linux/dirent.h). The inode number of a cgroup is
		// its id.
		for entries := buf[:n]; len(entries) > 0; {
			length := binary.NativeEndian.Uint16(entries[16:])
			name := unix.ByteSliceToString(entries[19:length])
			if entries[18] == unix.DT_DIR && name != "." && name != ".." {
				found = append(found, Cgroup{begin + name, binary.NativeEndian.Uint64(entries)})
			}
			entries = entries[length:]
		}
	}
	slices.SortFunc(found, func(a, b Cgroup) int { return strings.Compare(a.Rel, b.Rel) })
	return found, nil
}

// read returns what is in a file of the kernel. os.ReadFile would have the runtime watch the
// file for events, which costs as much as reading it.
func read(path string) (string, error) { return readFirst(path, math.MaxInt) }

// readFirst is read, but stops when it has read most bytes.
func readFirst(path string, most int) (string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	text := make([]byte, 0, 512)
	for {
		n, err := unix.Read(fd, text[len(text):cap(text)])
		if err != nil {
			return "", &fs.PathError{Op: "read", Path: path, Err: err}
		}
		text = text[:len(text)+n]
		if n == 0 || len(text) >= most {
			return string(text), nil
		}
		if len(text) == cap(text) {
			text = slices.Grow(text, min(len(text), most))
		}
	}
}
