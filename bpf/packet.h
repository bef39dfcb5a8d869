// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* A packet, as a program of any type reads it. Reads go through a helper, since even the IP
 * header of a packet may be nonlinear, as it is after conntrack has put fragments together.
 */
#ifndef EGRESSBPF_PACKET_H
#define EGRESSBPF_PACKET_H

#include "types.h"

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd

struct packet {
#ifdef PACKET_IS_DYNPTR	/* in programs that do not get an __sk_buff */
	const struct bpf_dynptr *data;
#else
	struct __sk_buff *data;
#endif
	__u32 base;		/* where the IP header begins */
	__u32 len;		/* of the packet; anything may follow */
	__u32 whole;		/* full length, if part of the packet is still to come; or 0 */
	__be16 protocol;	/* as in an Ethernet header */
};

/* Copies n bytes at offset off from the beginning of the IP header. Returns 0 if all of
 * them are there.
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
