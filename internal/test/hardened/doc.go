// Package hardened tests the real command where the kernel, a security module, a seccomp filter
// or a limit refuses it something: what still works, what it says, and that what was in force
// stays in force.
package hardened
