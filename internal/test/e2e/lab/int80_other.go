//go:build !amd64

package lab

import "golang.org/x/sys/unix"

const map32Bit = 0

func int80(_, _, _ uint32) uint32 {
	e := int32(unix.ENOSYS)
	return uint32(-e)
}
