// Command inpod is what runs in the pods of the tests. Without arguments it waits, as a sandbox's
// process does. With an address it first tries what is refused to pods, before anything else, and
// prints how that went:
//
//	connect RESULT    of a TCP connection to the address
//	packet RESULT     of a packet socket
//
// RESULT is ok or the name of an error. Then it has the name "asked", in /proc/PID/comm.
package main

import (
	"fmt"
	"net/netip"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) > 1 {
		connect := connect(os.Args[1])
		_, packet := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		fmt.Printf("connect %s\npacket %s\n", result(connect), result(packet))
		// What a sandbox prints, nobody reads.
		_ = os.WriteFile("/proc/self/comm", []byte("asked"), 0)
	}
	if len(os.Args) > 2 && os.Args[2] == "once" {
		return
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, unix.SIGTERM)
	<-end
}

func connect(to string) error {
	addr, err := netip.ParseAddrPort(to)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	patience := unix.Timeval{Sec: 10}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &patience); err != nil {
		return err
	}
	return unix.Connect(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()})
}

func result(err error) string {
	if err == nil {
		return "ok"
	}
	if errno, ok := err.(unix.Errno); ok {
		return unix.ErrnoName(errno)
	}
	return err.Error()
}
