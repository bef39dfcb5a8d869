package maps

import (
	"errors"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Inconclusive says whether an error tells nothing about what the kernel can do: it lacked memory
// or descriptors, or something refused a system call to this process.
func Inconclusive(err error) bool {
	if TooManyFiles(err) {
		return true
	}
	for _, cause := range []error{unix.ENOMEM, unix.ENFILE, unix.ENOSPC, unix.EPERM, unix.EACCES} {
		if errors.Is(err, cause) {
			return true
		}
	}
	return false
}

// TooManyFiles says whether an error is that this process may open no more files. Where the library
// duplicates a descriptor, it keeps only the text of that.
func TooManyFiles(err error) bool {
	return err != nil && (errors.Is(err, unix.EMFILE) || strings.HasSuffix(err.Error(), "can't dup fd: "+unix.EMFILE.Error()))
}

// Cause returns why a map could not be created, or a collection not be loaded. If the kernel
// refuses a map, the library tries another one with the same flags, and says that kernels as old as
// 4.6 do not support them if it cannot have that either. So where not even the plainest map can be
// made, the reason is what the kernel says to that.
func Cause(err error) error {
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return err
	}
	// The library had some descriptors open that are closed by now.
	for range 4 {
		plain, cause := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		if cause != nil && Inconclusive(cause) {
			return cause
		}
		if plain != nil {
			defer plain.Close()
		}
	}
	return err
}
