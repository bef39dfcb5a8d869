package hardened

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// call is a system call of a supervised command that has not happened yet.
type call struct {
	nr   int
	args [6]uint64
	// what says what it is for: for bpf(2), its command and the name or the pin of the object.
	what string
}

// bpf says whether the call is one of these commands of bpf(2), or any of them.
func (c call) bpf(commands ...int) bool {
	if c.nr != unix.SYS_BPF {
		return false
	}
	for _, command := range commands {
		if int(c.args[0]) == command {
			return true
		}
	}
	return len(commands) == 0
}

var bpfCommands = map[int]string{
	unix.BPF_MAP_CREATE: "MAP_CREATE", unix.BPF_MAP_LOOKUP_ELEM: "MAP_LOOKUP_ELEM", unix.BPF_MAP_UPDATE_ELEM: "MAP_UPDATE_ELEM",
	unix.BPF_MAP_DELETE_ELEM: "MAP_DELETE_ELEM", unix.BPF_MAP_GET_NEXT_KEY: "MAP_GET_NEXT_KEY", unix.BPF_PROG_LOAD: "PROG_LOAD",
	unix.BPF_OBJ_PIN: "OBJ_PIN", unix.BPF_OBJ_GET: "OBJ_GET", unix.BPF_PROG_TEST_RUN: "PROG_TEST_RUN",
	unix.BPF_PROG_GET_NEXT_ID: "PROG_GET_NEXT_ID", unix.BPF_MAP_GET_NEXT_ID: "MAP_GET_NEXT_ID",
	unix.BPF_PROG_GET_FD_BY_ID: "PROG_GET_FD_BY_ID", unix.BPF_MAP_GET_FD_BY_ID: "MAP_GET_FD_BY_ID",
	unix.BPF_OBJ_GET_INFO_BY_FD: "OBJ_GET_INFO_BY_FD", unix.BPF_PROG_QUERY: "PROG_QUERY",
	unix.BPF_RAW_TRACEPOINT_OPEN: "RAW_TRACEPOINT_OPEN", unix.BPF_BTF_LOAD: "BTF_LOAD", unix.BPF_BTF_GET_FD_BY_ID: "BTF_GET_FD_BY_ID",
	unix.BPF_BTF_GET_NEXT_ID: "BTF_GET_NEXT_ID", unix.BPF_MAP_LOOKUP_BATCH: "MAP_LOOKUP_BATCH", unix.BPF_MAP_UPDATE_BATCH: "MAP_UPDATE_BATCH",
	unix.BPF_MAP_FREEZE: "MAP_FREEZE", unix.BPF_LINK_CREATE: "LINK_CREATE", unix.BPF_LINK_UPDATE: "LINK_UPDATE",
	unix.BPF_LINK_GET_FD_BY_ID: "LINK_GET_FD_BY_ID", unix.BPF_LINK_GET_NEXT_ID: "LINK_GET_NEXT_ID", unix.BPF_ITER_CREATE: "ITER_CREATE",
	unix.BPF_LINK_DETACH: "LINK_DETACH", unix.BPF_PROG_BIND_MAP: "PROG_BIND_MAP",
}

// watched are the system calls that the supervisor is asked about: those by which the command
// changes what is in the kernel and in the bpf filesystem.
var watched = map[int]string{
	unix.SYS_BPF: "bpf", unix.SYS_MKDIRAT: "mkdirat", unix.SYS_UNLINKAT: "unlinkat", unix.SYS_RENAMEAT: "renameat",
	unix.SYS_RENAMEAT2: "renameat2", unix.SYS_MOUNT: "mount",
}

// outcome is what a command ended with.
type outcome struct {
	code           int
	stdout, stderr string
	calls          []call
}

func (o outcome) String() string {
	return fmt.Sprintf("exit code %d, stdout %q, stderr %q", o.code, o.stdout, o.stderr)
}

// supervisedVar in the environment makes this program a command under a supervisor.
const supervisedVar = "HARDENED_TEST_SUPERVISED"

// supervise runs a command and asks decide before each watched system call of any of its
// threads: the call fails with what decide returns, or happens if that is 0.
func supervise(t testing.TB, decide func(n int, c call) unix.Errno, name string, args ...string) outcome {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	ours, theirs := pair[0], os.NewFile(uintptr(pair[1]), "listener")
	defer unix.Close(ours)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", append([]string{name}, args...)...)
	cmd.Env = append(os.Environ(), supervisedVar+"=1")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Start()
	theirs.Close()
	check(t, err)
	listener, err := receiveFile(ours)
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		t.Fatalf("supervise %s: %v: %s", name, err, &stderr)
	}
	defer unix.Close(listener)
	var o outcome
	done := make(chan error, 1)
	go func() {
		done <- answerCalls(listener, func(c call) unix.Errno {
			o.calls = append(o.calls, c)
			return decide(len(o.calls), c)
		})
	}()
	_ = cmd.Wait()
	check(t, <-done)
	o.code, o.stdout, o.stderr = cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
	return o
}

func receiveFile(socket int) (int, error) {
	buf, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(socket, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	if n == 0 {
		return -1, errors.New("it ended early")
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return -1, fmt.Errorf("got %d messages, %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

// notification and response are struct seccomp_notif and seccomp_notif_resp
// (include/uapi/linux/seccomp.h).
type notification struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

type response struct {
	id           uint64
	val          int64
	error, flags int32
}

// answerCalls answers the calls of all processes under a listener until they have ended.
func answerCalls(listener int, decide func(call) unix.Errno) error {
	for {
		poll := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, -1); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return err
		}
		if poll[0].Revents&unix.POLLIN == 0 {
			return nil // all have ended
		}
		var n notification
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
		if errno == unix.ENOENT || errno == unix.EINTR {
			continue // who called has been interrupted
		}
		if errno != 0 {
			return fmt.Errorf("receive a call: %w", errno)
		}
		r := response{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		if errno := decide(call{int(n.nr), n.args, describe(n)}); errno != 0 {
			r.error, r.flags = -int32(errno), 0
		}
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r)))
		if errno != 0 && errno != unix.ENOENT {
			return fmt.Errorf("answer a call: %w", errno)
		}
	}
}

// describe says what a call is for. It reads the memory of the process, which waits.
func describe(n notification) string {
	text := func(address uint64, size int) string {
		buf := make([]byte, size)
		local := []unix.Iovec{{Base: &buf[0], Len: uint64(size)}}
		got, _ := unix.ProcessVMReadv(int(n.pid), local, []unix.RemoteIovec{{Base: uintptr(address), Len: size}}, 0)
		return unix.ByteSliceToString(buf[:max(got, 0)])
	}
	word := func(address uint64) (value uint64) {
		local := []unix.Iovec{{Base: (*byte)(unsafe.Pointer(&value)), Len: 8}}
		_, _ = unix.ProcessVMReadv(int(n.pid), local, []unix.RemoteIovec{{Base: uintptr(address), Len: 8}}, 0)
		return value
	}
	if n.nr != unix.SYS_BPF {
		path := n.args[1]
		if n.nr == unix.SYS_RENAMEAT || n.nr == unix.SYS_RENAMEAT2 {
			path = n.args[3]
		}
		// Paths are short, and their memory may end soon after them.
		return watched[int(n.nr)] + " " + text(path, 64)
	}
	// Offsets in union bpf_attr (include/uapi/linux/bpf.h).
	command, name := bpfCommands[int(n.args[0])], ""
	switch int(n.args[0]) {
	case unix.BPF_MAP_CREATE:
		name = text(n.args[1]+28, 16)
	case unix.BPF_PROG_LOAD:
		name = text(n.args[1]+48, 16)
	case unix.BPF_OBJ_PIN, unix.BPF_OBJ_GET:
		name = text(word(n.args[1]), 64)
	}
	return strings.TrimSpace(command + " " + name)
}

// supervised becomes the command under a supervisor, to which it sends the listener.
func supervised(args []string) error {
	runtime.LockOSThread()
	var program []unix.SockFilter
	program = append(program, unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}) // the number of the call
	for nr := range watched {
		program = append(program,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(nr), Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	listener, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&filter)))
	if errno != 0 {
		return fmt.Errorf("filter system calls: %w", errno)
	}
	const socket = 3
	if err := unix.Sendmsg(socket, []byte{0}, unix.UnixRights(int(listener)), nil, 0); err != nil {
		return err
	}
	unix.CloseOnExec(socket)
	unix.CloseOnExec(int(listener))
	var env []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, supervisedVar+"=") {
			env = append(env, v)
		}
	}
	return syscall.Exec(args[0], args, env)
}
