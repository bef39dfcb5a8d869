package lab

import "golang.org/x/sys/unix"

const map32Bit = unix.MAP_32BIT

// int80 makes a system call as a 32-bit program does.
func int80(nr, a, b uint32) uint32
