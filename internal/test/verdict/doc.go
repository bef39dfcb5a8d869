// Package verdict has no code of its own, only tests: they run the programs in
// the kernel on packets and moments of their own making (BPF_PROG_TEST_RUN),
// attached to nothing, and hold each verdict and every counter against tables
// and against a model in Go.
package verdict
