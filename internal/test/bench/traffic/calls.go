package traffic

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls without a word to the scheduler of Go, which costs more than some of what is
// measured, and differs from call to call.

func result(r, _ uintptr, errno syscall.Errno) (int, error) {
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

func send(fd int, data []byte) error {
	_, err := result(unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&data[0])), uintptr(len(data)), unix.MSG_NOSIGNAL, 0, 0))
	return err
}

func sendTo(fd int, data []byte, to address) error {
	_, err := result(unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&data[0])), uintptr(len(data)), 0, uintptr(unsafe.Pointer(&to[0])), uintptr(len(to))))
	return err
}

// receive waits for n bytes.
func receive(fd int, data []byte, n int) error {
	for n > 0 {
		got, err := result(unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&data[0])), uintptr(min(n, len(data))), 0, 0, 0))
		if err != nil {
			return err
		}
		if got == 0 {
			return unix.ECONNRESET
		}
		n -= got
	}
	return nil
}

func socket(family, typ int) (int, error) {
	return result(unix.RawSyscall6(unix.SYS_SOCKET, uintptr(family), uintptr(typ|unix.SOCK_CLOEXEC), 0, 0, 0, 0))
}

func connect(fd int, to address) error {
	_, err := result(unix.RawSyscall6(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&to[0])), uintptr(len(to)), 0, 0, 0))
	return err
}

func accept(fd int) (int, error) {
	return result(unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), 0, 0, unix.SOCK_CLOEXEC, 0, 0))
}

func closeSocket(fd int) error {
	_, err := result(unix.RawSyscall6(unix.SYS_CLOSE, uintptr(fd), 0, 0, 0, 0, 0))
	return err
}

// nanoseconds is the time on a clock that nobody sets.
func nanoseconds() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}
