package lab

import (
	"net"
	"os"
	"os/exec"
	"syscall"
)

const firstArg = "lab-first"

// First runs a process in a cgroup, from its first instruction on, that does nothing
// but send a datagram to each of the addresses and try to connect to it. It returns
// when the process has ended.
func (n *Netns) First(cgroupPath string, to ...string) error {
	dir, err := os.Open(cgroupPath)
	if err != nil {
		return err
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe", append([]string{firstArg}, to...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	n.Do(func() { err = cmd.Run() })
	return err
}

// sendFirst is that process. That it is refused is for others to see.
func sendFirst(to []string) {
	for _, addr := range to {
		for _, network := range []string{"udp", "tcp"} {
			conn, err := net.DialTimeout(network, addr, patience)
			if err != nil {
				continue
			}
			_, _ = conn.Write([]byte("first"))
			conn.Close()
		}
	}
	os.Exit(0)
}
