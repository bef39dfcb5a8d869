// Package verdict holds only tests. They run the programs in the kernel without attaching
// them (BPF_PROG_TEST_RUN), on packets and at times that the tests make, and compare each
// verdict and every counter with tables and with a model in Go.
package verdict
