package preflight

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
)

// The self-test starts a process that sends to both addresses, in a network namespace of its
// own where both addresses are local.
const (
	blockedAddress = "169.254.169.254"
	openAddress    = "192.0.2.1"
	selfTestPort   = 1080
)

// SelfTestArg, as the first argument of this program, makes it the process that sends.
const SelfTestArg = "preflight-self-test"

// selfTest attaches the programs to a cgroup of its own, starts a process in it, and lets the
// process send to a blocked destination and to another one.
func (h Host) selfTest(ctx context.Context, r *Report) {
	if !h.Config.Blocks(netip.MustParseAddr(blockedAddress), 6, selfTestPort) {
		r.add("self-test", Warn, "skipped: this policy does not block %s", blockedAddress)
		return
	}
	if h.Config.Blocks(netip.MustParseAddr(openAddress), 6, selfTestPort) {
		r.add("self-test", Warn, "skipped: this policy also blocks %s", openAddress)
		return
	}
	if h.Config.Mode != "enforce" {
		r.add("self-test", Warn, "skipped: in mode %s nothing is dropped", h.Config.Mode)
		return
	}
	out, err := h.ask(ctx)
	switch {
	case err != nil:
		r.add("self-test", Fail, "%s", explained(err))
	case out != "":
		r.add("self-test", Fail, "%s", out)
	default:
		r.add("self-test", OK, "%s was refused, %s was not", blockedAddress, openAddress)
	}
}

// ask makes the self-test and returns what was wrong; empty if nothing.
func (h Host) ask(ctx context.Context) (wrong string, err error) {
	path, err := os.MkdirTemp(string(h.Root), "egressbpf-check-")
	if err != nil {
		return "", err
	}
	// The process in it has ended when Run returns.
	defer func() { err = errors.Join(err, os.Remove(path)) }()
	rel, err := h.Root.Rel(path)
	if err != nil {
		return "", err
	}
	dir, id, err := h.Root.Open(rel)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	state, err := maps.CreateState()
	if err != nil {
		return "", err
	}
	defer state.Close()
	progs, err := loader.Load(h.Config.Policy, state, rel, id)
	if err != nil {
		return "", err
	}
	defer progs.Close()
	detach, err := progs.AttachFor(dir, loader.AttachTypes()[:1])
	if err != nil {
		return "", fmt.Errorf("attach to a cgroup: %w", err)
	}
	defer detach()
	// A datagram of a connected socket passes only the packet hook.
	if wrong, err := selfTestIn(ctx, dir, "udp"); wrong != "" || err != nil {
		return wrong, err
	}
	detachRest, err := progs.AttachFor(dir, loader.AttachTypes()[1:])
	if err != nil {
		return "", fmt.Errorf("attach to a cgroup: %w", err)
	}
	defer detachRest()
	return selfTestIn(ctx, dir, "tcp")
}

// selfTestIn runs the sending process in a cgroup.
func selfTestIn(ctx context.Context, dir *os.File, network string) (wrong string, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", SelfTestArg, network)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(dir.Fd()), Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL,
	}
	// What the process warns of is not what it has found.
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), nil
}

// SelfTest is the sending process. It prints each destination that it could reach and should
// not have reached, and the other way round.
func SelfTest(network string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, a := range []string{blockedAddress, openAddress} {
		addr, err := netlink.ParseAddr(a + "/32")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(lo, addr); err != nil {
			return fmt.Errorf("add %s: %w", a, err)
		}
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for address, open := range map[string]bool{blockedAddress: false, openAddress: true} {
		to := net.JoinHostPort(address, fmt.Sprint(selfTestPort))
		l, err := net.Listen("tcp", to)
		if err != nil {
			return err
		}
		err = send(network, to)
		l.Close()
		if (err == nil) != open {
			fmt.Printf("%s to %s: got %v\n", network, to, err)
		}
	}
	return nil
}

// send connects and sends something.
func send(network, to string) error {
	conn, err := net.DialTimeout(network, to, 5*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte("egressbpf"))
	return err
}
