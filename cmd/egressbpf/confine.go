package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/notify"
)

// needed are the capabilities that the commands use, in this order: to load, attach and read
// BPF objects (the first four); to find a cgroup by its id; to make a cgroup below the root,
// whose mode lets nobody write; to raise the limit of locked memory before 5.11; and to see
// in which network namespace a process is.
const needed = 1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_SYS_ADMIN |
	1<<unix.CAP_DAC_READ_SEARCH | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_SYS_RESOURCE | 1<<unix.CAP_SYS_PTRACE

// capabilities returns those of this thread, as capset(2) wants them.
func capabilities() (header unix.CapUserHeader, caps [2]unix.CapUserData, err error) {
	header.Version = unix.LINUX_CAPABILITY_VERSION_3
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return header, caps, fmt.Errorf("read capabilities: %w", err)
	}
	return header, caps, nil
}

type capability struct {
	bit  int
	name string
}

// webCapabilities are those that run needs besides with --web-listen: to start a process without
// privileges that serves, and to end it, also when run ends.
var webCapabilities = []capability{
	{unix.CAP_SETUID, "CAP_SETUID"}, {unix.CAP_SETGID, "CAP_SETGID"}, {unix.CAP_SETPCAP, "CAP_SETPCAP"}, {unix.CAP_KILL, "CAP_KILL"},
}

// required are the capabilities without which no command can say what is in force.
var required = []capability{
	{unix.CAP_BPF, "CAP_BPF"}, {unix.CAP_PERFMON, "CAP_PERFMON"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, {unix.CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH"},
}

// errCapabilities means that this process lacks required capabilities.
var errCapabilities = errors.New("not permitted to this process")

// checkCapabilities names the capabilities that are missing, before anything is touched.
func checkCapabilities(more ...capability) error {
	_, caps, err := capabilities()
	if err != nil {
		return err
	}
	var missing []string
	has := func(bit int) bool { return caps[bit/32].Effective&(1<<(bit%32)) != 0 }
	for _, c := range slices.Concat(required, more) {
		// The kernel takes CAP_SYS_ADMIN for these too, and Docker 20.10 cannot grant them.
		implied := (c.bit == unix.CAP_BPF || c.bit == unix.CAP_PERFMON) && has(unix.CAP_SYS_ADMIN)
		if !has(c.bit) && !implied {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: it lacks %s", errCapabilities, strings.Join(missing, ", "))
	}
	return nil
}

// errKept means that this process keeps capabilities that it does not need.
var errKept = errors.New("built with cgo, so egressbpf keeps capabilities that it does not need: build with CGO_ENABLED=0")

// confine drops all other capabilities, for good and in every thread, before anything is
// read that somebody else has written. import starts iptables-legacy-save, which opens a raw
// socket, run may start a process of another user, and the process that sends notifications needs
// none.
func confine(args []string) error {
	needed := uint64(needed)
	if slices.Contains(args, "import") {
		needed |= 1 << unix.CAP_NET_RAW
	}
	if slices.Equal(args, []string{notify.SendArg}) {
		needed = 0
	}
	if slices.Contains(args, "run") && slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "--web-listen") }) {
		for _, c := range webCapabilities {
			needed |= 1 << c.bit
		}
	}
	header, caps, err := capabilities()
	if err != nil {
		return err
	}
	for i := range caps {
		keep := uint32(needed >> (32 * i))
		caps[i].Permitted &= keep
		caps[i].Effective &= keep
		caps[i].Inheritable = 0
	}
	for _, call := range [][4]uintptr{
		{unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0},
		{unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0},
		{unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&caps[0])), 0},
	} {
		// In a build with cgo there may be threads that Go does not know about, and this
		// fails with ENOTSUP.
		_, _, errno := syscall.AllThreadsSyscall6(call[0], call[1], call[2], call[3], 0, 0, 0)
		if errors.Is(errno, unix.ENOTSUP) {
			return errKept
		}
		if errno != 0 {
			return fmt.Errorf("drop capabilities: %w", errno)
		}
	}
	return nil
}
