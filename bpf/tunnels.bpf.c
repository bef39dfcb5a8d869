//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Lists the UDP ports at which the kernel unpacks packets from datagrams. Its pin is a file
 * with a line for each such socket in the network namespace of the process that reads it.
 */
#include <linux/types.h>
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

struct seq_file;

struct sock_common {
	__u16 skc_num;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_common __sk_common;
} __attribute__((preserve_access_index));

struct inet_sock {
	struct sock sk;
} __attribute__((preserve_access_index));

struct udp_sock {
	struct inet_sock inet;
	void *encap_rcv;	/* unpacks its datagrams */
} __attribute__((preserve_access_index));

struct bpf_iter_meta {
	struct seq_file *seq;
} __attribute__((preserve_access_index));

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
} __attribute__((preserve_access_index));

SEC("iter/udp")
int udp_tunnels(struct bpf_iter__udp *ctx)
{
	struct seq_file *seq = ctx->meta->seq;
	struct udp_sock *sk = ctx->udp_sk;

	if (sk && sk->encap_rcv)
		BPF_SEQ_PRINTF(seq, "%u\n", sk->inet.sk.__sk_common.skc_num);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
