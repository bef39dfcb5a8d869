// Package cgroup finds cgroups of the unified hierarchy (cgroup v2) by path and by id, and
// tells from their names which are containers'.
package cgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

var (
	// ErrNoCgroup2 means that no cgroup2 filesystem is mounted, or none that shows the
	// whole hierarchy.
	ErrNoCgroup2 = errors.New("no cgroup2 filesystem with the whole hierarchy is mounted")
	// ErrNotBelowRoot means that a path is outside the cgroup2 mount or is not a
	// directory.
	ErrNotBelowRoot = errors.New("not a directory of the cgroup2 mount")
	// ErrNotInitialNamespace means that the process sees a part of the hierarchy as if
	// it were the whole.
	ErrNotInitialNamespace = errors.New("not in the host's cgroup namespace")
)

// initialNamespace is PROC_CGROUP_INIT_INO (include/linux/proc_ns.h).
const initialNamespace = "cgroup:[4026531835]"

// Root is a mount point of the whole cgroup2 hierarchy.
type Root string

// FindRoot returns the cgroup2 mount of this mount namespace, on the hybrid layout too. The
// error wraps ErrNoCgroup2 if there is none.
func FindRoot() (Root, error) {
	mountinfo, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for m := range mounts(string(mountinfo), "cgroup2") {
		// A later mount may hide an earlier one.
		if m.root == "/" && OnCgroup2(m.point) {
			return Root(m.point), nil
		}
	}
	return "", ErrNoCgroup2
}

// NetV1 says whether a cgroup v1 hierarchy with net_cls or net_prio is mounted. Once one of
// these is used, kernels before 5.15 count new sockets as the root cgroup's
// (cgroup_sk_alloc_disable).
func NetV1() (bool, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	return netV1(string(mounts)), err
}

func netV1(mountinfo string) bool {
	for m := range mounts(mountinfo, "cgroup") {
		if slices.Contains(m.super, "net_cls") || slices.Contains(m.super, "net_prio") {
			return true
		}
	}
	return false
}

// mount is a line of mountinfo, proc(5).
type mount struct {
	root, point string
	// options are those of the mount, super those of the filesystem.
	options, super []string
}

// mounts returns the readable lines of a mountinfo that are about a type of filesystem. The
// lines have this form:
// 36 35 98:0 ROOT MOUNTPOINT OPTIONS [TAGS]... - TYPE SOURCE SUPER.
func mounts(mountinfo, fstype string) iter.Seq[mount] {
	return func(yield func(mount) bool) {
		for line := range strings.Lines(mountinfo) {
			head, tail, _ := strings.Cut(line, " - ")
			if !strings.HasPrefix(tail, fstype+" ") {
				continue
			}
			own, of := strings.Fields(head), strings.Fields(tail)
			if len(own) < 6 || len(of) < 3 {
				continue
			}
			m := mount{root: own[3], point: unescape(own[4]), options: strings.Split(own[5], ","), super: strings.Split(of[2], ",")}
			if !yield(m) {
				return
			}
		}
	}
}

// Delegates says whether this mount keeps processes in the part of the hierarchy that
// belongs to their cgroup namespace (the option nsdelegate).
func (r Root) Delegates() (bool, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	return delegates(string(mounts), string(r)), err
}

func delegates(mountinfo, point string) bool {
	for m := range mounts(mountinfo, "cgroup2") {
		if m.point == point {
			return slices.Contains(m.super, "nsdelegate")
		}
	}
	return false
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// OnCgroup2 says whether path exists and is in a cgroup2 filesystem.
func OnCgroup2(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// IsRoot says whether path is a mount point of the whole cgroup2 hierarchy.
func IsRoot(path string) bool {
	// The id of the root cgroup (kernel/cgroup/cgroup.c).
	const rootID = 1
	var st unix.Stat_t
	return OnCgroup2(path) && unix.Stat(path, &st) == nil && st.Ino == rootID
}

// CheckNamespace returns ErrNotInitialNamespace if the process is not in the host's cgroup
// namespace. In another namespace, levels below the root are not the kernel's.
func CheckNamespace() error {
	ns, err := os.Readlink("/proc/self/ns/cgroup")
	if err != nil {
		return err
	}
	if ns != initialNamespace {
		return ErrNotInitialNamespace
	}
	return nil
}

// JoinHosts moves all threads of this process to the host's cgroup namespace if they are in another
// one, and the host's first process can be seen, or a parent of this one that is in it, as the
// engine is. A container of a pod has no other way to get there: Kubernetes gives it the host's
// network and processes if asked, but not this. It needs CAP_SYS_ADMIN and CAP_SYS_PTRACE. An error
// changes nothing; CheckNamespace says what it means.
func JoinHosts() error {
	if CheckNamespace() == nil {
		return nil
	}
	for _, pid := range []int{1, os.Getppid()} {
		of := fmt.Sprintf("/proc/%d/ns/cgroup", pid)
		// Without the host's PID namespace, these are this container's, or none.
		if ns, err := os.Readlink(of); err != nil || ns != initialNamespace {
			continue
		}
		f, err := os.Open(of)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_SETNS, f.Fd(), unix.CLONE_NEWCGROUP, 0); errno != 0 {
			return fmt.Errorf("join the host's cgroup namespace: %w", errno)
		}
		return nil
	}
	return ErrNotInitialNamespace
}

// Rel returns the path of a cgroup from the root, as the kernel writes it: with a slash at
// the beginning. It resolves symbolic links in the part of path that exists. The error
// wraps ErrNotBelowRoot if path is not in the mount.
func (r Root) Rel(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	abs, err = resolveExisting(abs)
	if err != nil {
		return "", err
	}
	root, err := filepath.EvalSymlinks(string(r))
	if err != nil {
		return "", err
	}
	rel, err := filepath.Rel(root, abs)
	if err == nil && rel == "." {
		return "/", nil
	}
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		err := fmt.Errorf("%s: %w (%s)", path, ErrNotBelowRoot, r)
		// On the hybrid layout, the usual path belongs to another hierarchy.
		if name, ok := strings.CutPrefix(abs, filepath.Dir(root)+"/"); ok {
			err = fmt.Errorf("%w; %s is in it", err, filepath.Join(root, name))
		}
		return "", err
	}
	if info, err := os.Stat(abs); err == nil && !info.IsDir() {
		return "", fmt.Errorf("%s: %w (%s)", path, ErrNotBelowRoot, r)
	}
	return "/" + rel, nil
}

func resolveExisting(path string) (string, error) {
	resolved, err := filepath.EvalSymlinks(path)
	if !errors.Is(err, fs.ErrNotExist) || path == "/" {
		return resolved, err
	}
	// A dangling link is not a directory that can be made.
	if _, err := os.Lstat(path); err == nil {
		return "", fmt.Errorf("%s: dangling symbolic link: %w", path, ErrNotBelowRoot)
	}
	parent, err := resolveExisting(filepath.Dir(path))
	return filepath.Join(parent, filepath.Base(path)), err
}

// Path returns the directory of the cgroup rel, which is a path as Rel returns it.
func (r Root) Path(rel string) string { return filepath.Join(string(r), rel) }

// Level returns the depth of rel below the root, whose level is 0.
func Level(rel string) uint32 { return uint32(strings.Count(strings.TrimRight(rel, "/"), "/")) }

// Within says whether the cgroup rel is the cgroup of or is below it.
func Within(rel, of string) bool {
	return rel == of || of == "/" || strings.HasPrefix(rel, of+"/")
}

// Open opens the directory of a cgroup and returns the cgroup's id: the number by which BPF
// programs know it, unique until the next boot. The caller closes the file.
func (r Root) Open(rel string) (*os.File, uint64, error) {
	f, err := os.OpenFile(r.Path(rel), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, 0, err
	}
	// Since 5.5, the inode number of a cgroup's directory is its id.
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Ino, nil
}

// ID returns the id of the cgroup rel.
func (r Root) ID(rel string) (uint64, error) {
	var st unix.Stat_t
	path := r.Path(rel)
	if err := unix.Lstat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: unix.ENOTDIR}
	}
	return st.Ino, nil
}

// Find returns the cgroup with an id, as Rel does. The error wraps fs.ErrNotExist if the
// cgroup's directory is gone.
func (r Root) Find(id uint64) (string, error) {
	// Not an os.File, since the runtime would watch it for events.
	mount, err := unix.Open(string(r), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: string(r), Err: err}
	}
	defer unix.Close(mount)

	// FILEID_KERNFS (include/linux/exportfs.h).
	const kernfs = 0xfe
	handle := unix.NewFileHandle(kernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(mount, handle, unix.O_PATH|unix.O_CLOEXEC)
	if errors.Is(err, unix.ESTALE) || errors.Is(err, unix.ENOENT) {
		return "", fmt.Errorf("cgroup with id %d: %w", id, fs.ErrNotExist)
	}
	if err != nil {
		return "", fmt.Errorf("cgroup with id %d: %w", id, err)
	}
	defer unix.Close(fd)
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", err
	}
	if former, ok := strings.CutSuffix(path, " (deleted)"); ok && unix.Access(path, unix.F_OK) != nil {
		return "", fmt.Errorf("cgroup with id %d, %s: %w", id, former, fs.ErrNotExist)
	}
	if rel, ok := r.below(path); ok {
		return rel, nil
	}
	return r.Rel(path) // r goes through a symbolic link
}

// below returns the path of a cgroup from the root if its directory has the path of the mount
// at the beginning.
func (r Root) below(path string) (rel string, ok bool) {
	rel, ok = strings.CutPrefix(path, strings.TrimRight(string(r), "/"))
	if rel == "" {
		return "/", ok
	}
	return rel, ok && rel[0] == '/'
}

// OfProcess returns the cgroup of a process, as [Root.Rel] does. The error wraps
// fs.ErrNotExist if there is no such process.
func OfProcess(pid int) (string, error) {
	cgroups, err := ofProcess(pid)
	if err != nil {
		return "", err
	}
	return unified(cgroups)
}

// ofProcess returns the cgroups of a process in all hierarchies, each in a line.
func ofProcess(pid int) (string, error) {
	text, err := read(fmt.Sprintf("/proc/%d/cgroup", pid))
	if errors.Is(err, unix.ESRCH) {
		return "", fs.ErrNotExist
	}
	return text, err
}

// unified returns the path in the unified hierarchy.
func unified(cgroups string) (string, error) {
	for line := range strings.Lines(cgroups) {
		if rel, ok := strings.CutPrefix(line, "0::"); ok {
			// The kernel adds this to the path of a removed cgroup.
			return strings.TrimSuffix(strings.TrimSuffix(rel, "\n"), " (deleted)"), nil
		}
	}
	return "", ErrNoCgroup2
}

// Exposure is what a container can see or write of the host's hierarchy beyond its own
// cgroup.
type Exposure struct {
	// Namespace is whether the container has the host's cgroup namespace: it sees and
	// names other cgroups, and can start containers beside itself.
	Namespace bool `json:"host_namespace"`
	// Writable is whether the whole tree is mounted for writing.
	Writable bool `json:"writable"`
}

// mountsRead is how much of a container's mountinfo is read. With a user namespace, a container can make that
// as long as it likes.
const mountsRead = 1 << 20

// Exposure looks at one process of the cgroup rel. It finds nothing if the cgroup has no
// process, or none that this process may look at.
func (r Root) Exposure(rel string) (e Exposure, err error) {
	pid := 0
	err = r.untilProcess(rel, func(found int) bool { pid = found; return true })
	if err != nil || pid == 0 {
		return e, err
	}
	if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/cgroup", pid)); err == nil {
		e.Namespace = ns == initialNamespace
	}
	if mounts, err := readFirst(fmt.Sprintf("/proc/%d/mountinfo", pid), mountsRead); err == nil {
		e.Writable = wholeTreeWritable(mounts)
	}
	return e, nil
}

// wholeTreeWritable says whether a mountinfo, as the host reads it, mounts the root of the
// hierarchy writable.
func wholeTreeWritable(mountinfo string) bool {
	for m := range mounts(mountinfo, "cgroup2") {
		if m.root == "/" && slices.Contains(m.options, "rw") && slices.Contains(m.super, "rw") {
			return true
		}
	}
	return false
}
