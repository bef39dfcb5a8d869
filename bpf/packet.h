// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* A packet as any kind of program reads it: by helper, since a packet may be
 * nonlinear down to its IP header (what conntrack has put together from fragments
 * is).
 */
#ifndef EGRESSBPF_PACKET_H
#define EGRESSBPF_PACKET_H

#include "types.h"

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd

struct packet {
#ifdef PACKET_IS_DYNPTR	/* defined by programs that know no __sk_buff */
	const struct bpf_dynptr *data;
#else
	struct __sk_buff *data;
#endif
	__u32 base;		/* where its IP header begins */
	__u32 len;		/* of it; anything may follow behind it */
	__u32 whole;		/* if more than that is still to come: its length then */
	__be16 protocol;	/* as in an Ethernet header */
};

/* Copies n bytes from off behind the beginning of the IP header; 0 if they are
 * there.
 */
static __always_inline long load(const struct packet *p, __u32 off, void *to, __u32 n)
{
	if (off + n > p->len)
		return -1;
#ifdef PACKET_IS_DYNPTR
	return bpf_dynptr_read(to, n, p->data, p->base + off, 0);
#else
	return bpf_skb_load_bytes(p->data, p->base + off, to, n);
#endif
}

#endif
