package lab

import (
	"net"
	"os"
	"os/exec"
	"syscall"
)

const firstArg = "lab-first"

// First runs a process that is in a cgroup from its first instruction. The process only
// sends a datagram to each of the addresses and tries to connect to it. First returns when
// the process has ended.
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

// sendFirst is that process. It ignores errors: the test checks elsewhere that it is refused.
func sendFirst(to []string) {
	for _, addr := range to {
		for _, network := range []string{"udp", "tcp"} {
			conn, err := net.DialTimeout(network, addr, answerPatience)
			if err != nil {
				continue
			}
			_, _ = conn.Write([]byte("first"))
			conn.Close()
		}
	}
	os.Exit(0)
}
