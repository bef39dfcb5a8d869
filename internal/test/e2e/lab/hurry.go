package lab

import (
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// HurrySYNs makes TCP sockets of a cgroup and of those below it repeat an unanswered SYN
// after a few milliseconds instead of a second, until the test ends.
func HurrySYNs(t testing.TB, cgroupPath string) {
	t.Helper()
	const (
		op, reply   = 0, 4 // struct bpf_sock_ops
		timeoutInit = 1    // BPF_SOCK_OPS_TIMEOUT_INIT
		jiffies     = 10
	)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SockOps, AttachType: ebpf.AttachCGroupSockOps, License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, op, asm.Word),
			asm.JNE.Imm(asm.R2, timeoutInit, "other"),
			asm.Mov.Imm(asm.R2, jiffies),
			asm.StoreMem(asm.R1, reply, asm.R2, asm.Word),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("other"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatalf("load the program that hurries SYNs: %v", err)
	}
	defer prog.Close()
	dir, err := os.Open(cgroupPath)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupSockOps})
	if err != nil {
		t.Fatalf("hurry SYNs: %v", err)
	}
	t.Cleanup(func() { l.Close() })
}
