package web

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// nobody is the user and the group of the process that serves.
const nobody = 65534

// renounce takes from this thread, and so from a process that it starts, what the process could
// use to regain privileges. The rest goes with the user.
func renounce() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("drop ambient capabilities: %w", err)
	}
	for capability := uintptr(0); ; capability++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0)
		if err == unix.EINVAL {
			return nil // that was the last one
		}
		if err != nil {
			return fmt.Errorf("drop capabilities: %w", err)
		}
	}
}

// Limits of the process that serves. Go needs some memory for threads and for what it has not
// cleared away yet.
const (
	// maxFiles has room for each connection, for an answer to each, and for the web config file,
	// which each request opens.
	maxFiles  = 3*maxConnections + maxConnections*maxStreams
	maxMemory = 512 << 20
	// memoryGoal is from where on Go works harder to stay below it.
	memoryGoal = 48 << 20
)

// confine is the first thing that the process that serves does: it has no privileges, and gives
// up what an unprivileged process could do.
func confine() error {
	for limit, value := range map[int]uint64{
		unix.RLIMIT_CORE: 0, unix.RLIMIT_FSIZE: 0, unix.RLIMIT_MEMLOCK: 0, unix.RLIMIT_MSGQUEUE: 0,
		unix.RLIMIT_NOFILE: maxFiles, unix.RLIMIT_DATA: maxMemory,
	} {
		if err := unix.Setrlimit(limit, &unix.Rlimit{Cur: value, Max: value}); err != nil {
			return fmt.Errorf("limit resources: %w", err)
		}
	}
	// Other processes of the same user shall not look into this one.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("hide from other processes: %w", err)
	}
	if err := leaveFiles(); err != nil {
		return err
	}
	return filterCalls()
}

// leaveFiles makes all files out of reach, except for those that are open; before Linux 5.13,
// and where Landlock is turned off, those that anybody can read stay in reach.
func leaveFiles() error {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return nil
	}
	// Everything that the version knows; no rule allows any of it.
	attr := unix.LandlockRulesetAttr{Handled_access_fs: unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1}
	for since, access := range map[uintptr]uint64{2: unix.LANDLOCK_ACCESS_FS_REFER, 3: unix.LANDLOCK_ACCESS_FS_TRUNCATE, 5: unix.LANDLOCK_ACCESS_FS_IOCTL_DEV} {
		if version >= since {
			attr.Handled_access_fs |= access
		}
	}
	size := unsafe.Sizeof(attr.Handled_access_fs)
	if version >= 6 { // before, the kernel refuses a larger structure
		attr.Scoped, size = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET|unix.LANDLOCK_SCOPE_SIGNAL, unsafe.Offsetof(attr.Quiet_access_fs)
	}
	rules, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if errno != 0 {
		return fmt.Errorf("leave the files: %w", errno)
	}
	defer unix.Close(int(rules))
	_, _, errno = syscall.AllThreadsSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, rules, 0, 0)
	if errno != 0 && errno != unix.ENOTSUP { // as in a build with cgo, whose threads Go does not know
		return fmt.Errorf("leave the files: %w", errno)
	}
	return nil
}

// forbidden are system calls by which a process starts others, looks for others, opens new
// connections, reaches or slows down others of its user, or reaches parts of the kernel that a
// web server does not need.
var forbidden = []uint32{
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_UNSHARE, unix.SYS_SETNS,
	unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_LISTEN,
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_GETFD, unix.SYS_KCMP,
	unix.SYS_TKILL, unix.SYS_RT_SIGQUEUEINFO, unix.SYS_RT_TGSIGQUEUEINFO, unix.SYS_PIDFD_SEND_SIGNAL,
	unix.SYS_SETPRIORITY, unix.SYS_IOPRIO_SET, unix.SYS_SCHED_SETAFFINITY, unix.SYS_SCHED_SETSCHEDULER, unix.SYS_SCHED_SETPARAM, unix.SYS_SCHED_SETATTR,
	unix.SYS_MIGRATE_PAGES, unix.SYS_MOVE_PAGES, unix.SYS_PROCESS_MADVISE, unix.SYS_PROCESS_MRELEASE,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_IO_URING_SETUP, unix.SYS_MEMFD_CREATE, unix.SYS_MEMFD_SECRET,
	unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL, unix.SYS_IOCTL, unix.SYS_SYSLOG,
	unix.SYS_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT, unix.SYS_FSOPEN, unix.SYS_CHROOT, unix.SYS_PIVOT_ROOT,
	unix.SYS_SHMGET, unix.SYS_SHMAT, unix.SYS_SHMCTL, unix.SYS_MSGGET, unix.SYS_MSGSND, unix.SYS_MSGRCV, unix.SYS_MSGCTL,
	unix.SYS_SEMGET, unix.SYS_SEMOP, unix.SYS_SEMTIMEDOP, unix.SYS_SEMCTL,
	unix.SYS_MQ_OPEN, unix.SYS_INOTIFY_INIT1, unix.SYS_FANOTIFY_INIT,
}

// argument is what an argument of a system call has to be: equal to a value or not, or with one
// of some bits set or with none.
type argument struct {
	call  uint32
	index uint32 // from 0
	is    bool
	how   uint16 // BPF_JEQ or BPF_JSET
	value uint32
}

// arguments are those of system calls that a web server needs. pid is of this process.
func arguments(pid int) []argument {
	own := uint32(pid)
	return []argument{
		// Threads may come to be, processes not.
		{unix.SYS_CLONE, 0, true, unix.BPF_JSET, unix.CLONE_THREAD},
		// Go's scheduler interrupts threads by signals. Others have the same user.
		{unix.SYS_KILL, 0, true, unix.BPF_JEQ, own},
		{unix.SYS_TGKILL, 0, true, unix.BPF_JEQ, own},
		{unix.SYS_PRLIMIT64, 0, true, unix.BPF_JEQ, 0},
		// The kernel sends signals for a file too.
		{unix.SYS_FCNTL, 1, false, unix.BPF_JEQ, unix.F_SETOWN},
		{unix.SYS_FCNTL, 1, false, unix.BPF_JEQ, unix.F_SETOWN_EX},
		{unix.SYS_FCNTL, 1, false, unix.BPF_JEQ, unix.F_SETSIG},
		// This connects like connect(2): a listening socket can, after shutdown(2).
		{unix.SYS_SENDTO, 3, false, unix.BPF_JSET, unix.MSG_FASTOPEN},
		{unix.SYS_SENDMSG, 2, false, unix.BPF_JSET, unix.MSG_FASTOPEN},
		{unix.SYS_SENDMMSG, 3, false, unix.BPF_JSET, unix.MSG_FASTOPEN},
	}
}

// architectures are those that egressbpf runs on: the number by which seccomp knows one, and
// system calls that it alone has: fork and vfork.
var architectures = map[string]struct {
	number    uint32
	forbidden []uint32
}{
	"amd64": {unix.AUDIT_ARCH_X86_64, []uint32{57, 58}},
	"arm64": {unix.AUDIT_ARCH_AARCH64, nil},
}

// filterCalls has forbidden system calls fail, in all threads.
func filterCalls() error {
	const (
		// Offsets in struct seccomp_data (include/uapi/linux/seccomp.h).
		number, architecture, first = 0, 4, 16 // the last is the first argument, of 8 bytes
		// Calls of the x32 ABI have numbers from here on.
		x32 = 0x40000000
	)
	own, ok := architectures[runtime.GOARCH]
	if !ok {
		return nil
	}
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	// when skips some instructions unless the comparison holds.
	when := func(how uint16, k uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | how | unix.BPF_K, K: k, Jf: skip}
	}
	answer := func(what uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: what}
	}
	const fail = unix.SECCOMP_RET_ERRNO
	program := []unix.SockFilter{
		load(architecture),
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: own.number, Jt: 1},
		answer(fail | uint32(unix.EPERM)),
		load(number),
		when(unix.BPF_JGE, x32, 1), answer(fail | uint32(unix.EPERM)),
		// Its arguments are out of reach. C libraries fall back on clone.
		when(unix.BPF_JEQ, unix.SYS_CLONE3, 1), answer(fail | uint32(unix.ENOSYS)),
	}
	for _, a := range arguments(os.Getpid()) {
		// The lower half, which is all that these arguments have.
		compare := unix.SockFilter{Code: unix.BPF_JMP | a.how | unix.BPF_K, K: a.value, Jf: 1}
		if a.is {
			compare.Jt, compare.Jf = 1, 0
		}
		program = append(program, when(unix.BPF_JEQ, a.call, 4), load(first+8*a.index), compare, answer(fail|uint32(unix.EPERM)), load(number))
	}
	for _, call := range slices.Concat(forbidden, own.forbidden) {
		program = append(program, when(unix.BPF_JEQ, call, 1), answer(fail|uint32(unix.EPERM)))
	}
	program = append(program, answer(unix.SECCOMP_RET_ALLOW))
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&filter)))
	if errno != 0 && errno != unix.EINVAL && errno != unix.ENOSYS { // of a kernel without seccomp
		return fmt.Errorf("filter system calls: %w", errno)
	}
	return nil
}
