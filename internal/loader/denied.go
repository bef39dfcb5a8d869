package loader

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/maps"
)

// MemlockHint is what the library adds to EPERM, whatever the cause is: see WhyRefused.
const MemlockHint = " (MEMLOCK may be too low, consider rlimit.RemoveMemlock)"

// Inconclusive says whether an error tells nothing about what the kernel can do: it lacked
// memory or descriptors, or something refused a system call to this process. The verifier fails
// with some of the same errors, and then says why.
func Inconclusive(err error) bool {
	if Rejected(err) != nil {
		return false
	}
	return maps.Inconclusive(err)
}

// Rejected returns the error of a program that the verifier has rejected; nil if err is another.
func Rejected(err error) *ebpf.VerifierError {
	var rejected *ebpf.VerifierError
	// The library makes one of every failure to load a program.
	if !errors.As(err, &rejected) || len(rejected.Log) == 0 && !errors.Is(err, unix.EINVAL) {
		return nil
	}
	// There may be a log, too, where the verifier accepted the program, or did not come to an end.
	for _, lack := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, lack) {
			return nil
		}
	}
	return rejected
}

// WhyRefused says what may have refused a system call to this process although it has the
// capabilities for it; "" if err is another error.
func WhyRefused(err error) string {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) || Rejected(err) != nil || errors.Is(err, ErrLockedDown) || errors.Is(err, ErrExcluded) {
		return ""
	}
	const begin = "this process has the capabilities for it, so something else refuses it: "
	if causes := suspects(); len(causes) > 0 {
		return begin + strings.Join(causes, "; or ")
	}
	return begin + "a security module of the kernel (see /sys/kernel/security/lsm, and what the kernel logs)"
}

// Confinement is what confines this process, each with where it tells what it refuses.
func Confinement() (all []string) {
	status, _ := os.ReadFile("/proc/self/status")
	if bytes.Contains(status, []byte("\nSeccomp:\t2")) {
		all = append(all, "a seccomp filter of this process (SystemCallFilter= of its unit, or the profile of its container: use the engine's own, or --security-opt=seccomp=unconfined)")
	}
	// Every security module that is on names the context of a process in the same file.
	context, _ := os.ReadFile("/proc/self/attr/current")
	label := string(bytes.Trim(context, "\x00\n"))
	if enforces, err := os.ReadFile("/sys/fs/selinux/enforce"); err == nil {
		if string(enforces) == "1" {
			all = append(all, fmt.Sprintf("SELinux, for the domain of this process, %s (`ausearch -m avc` shows what)", label))
		}
	} else if label != "" && label != "unconfined" {
		all = append(all, fmt.Sprintf("AppArmor, by the profile %s (`journalctl -k --grep apparmor` shows what)", label))
	}
	if ns, err := os.Readlink("/proc/self/ns/user"); err == nil && ns != initialUsers {
		all = append(all, "the user namespace of this process, which is not the host's (in a container, --userns=host)")
	}
	return all
}

// suspects are what may have refused something to this process.
func suspects() []string {
	all := Confinement()
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil && limit.Cur != unix.RLIM_INFINITY {
		all = append(all, fmt.Sprintf("before Linux 5.11, the limit of %d bytes of locked memory, which this process may not raise (CAP_SYS_RESOURCE)", limit.Cur))
	}
	return all
}

// initialUsers is PROC_USER_INIT_INO (include/linux/proc_ns.h).
const initialUsers = "user:[4026531837]"
