// Package egressbpf stops containers from reaching cloud metadata services and
// from sending spam, with eBPF programs on their parent cgroup.
//
// The programs are C in bpf/; this file turns them into the committed objects
// and Go types beside them. Building the command needs neither.
package egressbpf

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -go-package bpf -output-dir bpf -type reason -type drops -type counters -type bucket -type container -type limit_request -type rule_flag -type prefix -type rule -type port_key -type ticket Egress bpf/egress.bpf.c -- -std=gnu17 -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
