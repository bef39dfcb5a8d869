// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Recognises most packets without parsing them. */
#ifndef EGRESSBPF_GLANCE_H
#define EGRESSBPF_GLANCE_H

#include "rules.h"

/* What a glance at the headers shows. The headers are read in place. */
enum glance {
	PLAIN,		/* passes */
	DATAGRAM,	/* UDP, not blocked */
	MAIL,		/* TCP to a mail port and not from one, not blocked */
	UNCLEAR,	/* anything else; has to be parsed */
};

static __always_inline enum glance glance_transport(__u8 proto, const struct tcp *tcp, const void *end)
{
	if (proto == IPPROTO_UDP)
		return DATAGRAM;
	if (proto != IPPROTO_TCP || (const void *)(tcp + 1) > end)
		return UNCLEAR;
	if (!((__u8)sketch.mail[fold(tcp->dport)] | (__u8)sketch.mail[fold(tcp->sport)]))
		return PLAIN;
	if (!((__u8)smtp_ports[tcp->dport] | (__u8)smtp_ports[tcp->sport]))
		return PLAIN;
	return smtp_ports[tcp->sport] ? UNCLEAR : MAIL;
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

/* glance4() and glance6() look at a packet of len bytes at data, which can be read up to
 * end. They compare the first eight bytes of its header at once: the version, the length,
 * and whatever else is fixed in a plain header.
 */
static __always_inline enum glance glance4(const void *data, const void *end, __u32 len)
{
	const struct iphdr *ip = data;
	const union header4 mask = { .version_ihl = 0xff, .tot_len = 0xffff, .frag_off = bpf_htons(IP_OFFSET | IP_MF) };
	const union header4 plain = { .version_ihl = 0x45, .tot_len = bpf_htons(len) };

	if ((const void *)(ip + 1) + UDP_HEADER > end || (*(const __u64 *)ip & mask.word) != plain.word ||
	    len > 0xffff || either_suspect4(ip->daddr, ip->saddr))
		return UNCLEAR;
	return glance_transport(ip->protocol, (const void *)(ip + 1), end);
}

static __always_inline enum glance glance6(const void *data, const void *end, __u32 len)
{
	const struct ipv6hdr *ip = data;
	const union header6 mask = { .version = 0xf0, .payload_len = 0xffff };
	const union header6 plain = { .version = 0x60, .payload_len = bpf_htons(len - sizeof(*ip)) };

	if ((const void *)(ip + 1) + UDP_HEADER > end || (*(const __u64 *)ip & mask.word) != plain.word ||
	    len > 0xffff || either_suspect6((const union address *)&ip->daddr, (const union address *)&ip->saddr))
		return UNCLEAR;
	return glance_transport(ip->nexthdr, (const void *)(ip + 1), end);
}

static __always_inline bool read_whole_tcp(const struct tcp *tcp, const void *end, __u32 len, struct flow *f)
{
	if ((const void *)(tcp + 1) > end)
		return false;
	f->proto = IPPROTO_TCP;
	read_tcp(tcp, len, f);
	return true;
}

/* read_tcp4() and read_tcp6() read a packet that a glance found to be TCP; false if it is
 * cut off.
 */
static __always_inline bool read_tcp4(const void *data, const void *end, __u32 len, struct flow *f)
{
	const struct iphdr *ip = data;

	*f = (struct flow){};
	if ((const void *)(ip + 1) > end)
		return false;
	map4(&f->src, ip->saddr);
	map4(&f->dst, ip->daddr);
	return read_whole_tcp((const void *)(ip + 1), end, len - sizeof(*ip), f);
}

static __always_inline bool read_tcp6(const void *data, const void *end, __u32 len, struct flow *f)
{
	const struct ipv6hdr *ip = data;

	*f = (struct flow){};
	if ((const void *)(ip + 1) > end)
		return false;
	__builtin_memcpy(&f->src, &ip->saddr, sizeof(f->src));
	__builtin_memcpy(&f->dst, &ip->daddr, sizeof(f->dst));
	return read_whole_tcp((const void *)(ip + 1), end, len - sizeof(*ip), f);
}

#endif
