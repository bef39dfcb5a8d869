package loader

import (
	"bytes"
	"errors"
	"os"
)

// ErrLockedDown means that the kernel does not let any program read its memory, whoever
// loads it.
var ErrLockedDown = errors.New("the kernel is locked down (lockdown=confidentiality)")

// LockedDown says whether the kernel does not let any program read its memory.
func LockedDown() bool {
	text, err := os.ReadFile("/sys/kernel/security/lockdown")
	return err == nil && bytes.Contains(text, []byte("[confidentiality]"))
}
