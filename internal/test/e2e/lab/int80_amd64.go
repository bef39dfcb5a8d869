package lab

import "golang.org/x/sys/unix"

const map32Bit = unix.MAP_32BIT

// int80 does a system call of 32-bit programs.
func int80(nr, a, b uint32) uint32
