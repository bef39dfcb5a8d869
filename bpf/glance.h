// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What can be said of most packets before they are parsed. */
#ifndef EGRESSBPF_GLANCE_H
#define EGRESSBPF_GLANCE_H

#include "rules.h"

/* What a glance at the headers, where they lie, tells of a packet. */
enum glance {
	PLAIN,		/* passes */
	DATAGRAM,	/* UDP, not blocked; its destination port is filled in */
	MAIL,		/* TCP to a mail port, not blocked; the flow is filled in */
	UNCLEAR,	/* anything else: to be parsed */
};

static __always_inline enum glance glance_transport(__u8 proto, const struct tcp *tcp, const void *end,
						    __u32 len, struct flow *f)
{
	if (proto == IPPROTO_UDP) {
		f->dport = tcp->dport;	/* at the same place */
		return DATAGRAM;
	}
	if (proto != IPPROTO_TCP || (const void *)(tcp + 1) > end)
		return UNCLEAR;
	/* Neither to a mail port nor as from one. */
	if (!((__u8)smtp_ports[tcp->dport] | (__u8)smtp_ports[tcp->sport]))
		return PLAIN;
	if (smtp_ports[tcp->sport])
		return UNCLEAR;
	*f = (struct flow){
		.sport = tcp->sport,
		.dport = tcp->dport,
		.seq = tcp->seq,
		.ack = tcp->ack,
		.payload = payload_of(tcp, len),
		.proto = IPPROTO_TCP,
		.has_ports = true,
		.flags = tcp->flags,
	};
	return MAIL;
}

/* The first eight bytes of IP headers. */
union header4 {
	__u64 word;
	struct {
		__u8 version_ihl;
		__u8 tos;
		__be16 tot_len;
		__be16 id;
		__be16 frag_off;
	};
};

union header6 {
	__u64 word;
	struct {
		__u8 version;
		__u8 traffic_class;
		__be16 flow_label;
		__be16 payload_len;
		__u8 nexthdr;
		__u8 hop_limit;
	};
};

/* Both are of the packet of len bytes at data, of which those before end can be read.
 * They compare the first eight bytes at once: version, length and what else has
 * to be as it is in a plain header.
 */
static __always_inline enum glance glance4(const void *data, const void *end, __u32 len, struct flow *f)
{
	const struct iphdr *ip = data;
	const union header4 mask = { .version_ihl = 0xff, .tot_len = 0xffff, .frag_off = bpf_htons(IP_OFFSET | IP_MF) };
	const union header4 plain = { .version_ihl = 0x45, .tot_len = bpf_htons(len) };
	enum glance g;

	if ((const void *)(ip + 1) + UDP_HEADER > end || (*(const __u64 *)ip & mask.word) != plain.word ||
	    len > 0xffff || either_suspect4(ip->daddr, ip->saddr))
		return UNCLEAR;
	g = glance_transport(ip->protocol, (const void *)(ip + 1), end, len - sizeof(*ip), f);
	if (g == MAIL) {
		map4(&f->src, ip->saddr);
		map4(&f->dst, ip->daddr);
	}
	return g;
}

static __always_inline enum glance glance6(const void *data, const void *end, __u32 len, struct flow *f)
{
	const struct ipv6hdr *ip = data;
	const union header6 mask = { .version = 0xf0, .payload_len = 0xffff };
	const union header6 plain = { .version = 0x60, .payload_len = bpf_htons(len - sizeof(*ip)) };
	enum glance g;

	if ((const void *)(ip + 1) + UDP_HEADER > end || (*(const __u64 *)ip & mask.word) != plain.word ||
	    len > 0xffff || either_suspect6((const union address *)&ip->daddr, (const union address *)&ip->saddr))
		return UNCLEAR;
	g = glance_transport(ip->nexthdr, (const void *)(ip + 1), end, len - sizeof(*ip), f);
	if (g == MAIL) {
		__builtin_memcpy(&f->src, &ip->saddr, sizeof(f->src));
		__builtin_memcpy(&f->dst, &ip->daddr, sizeof(f->dst));
	}
	return g;
}

#endif
