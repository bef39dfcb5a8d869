// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Reads any IP packet into a flow, or finds that the packet cannot be judged. */
#ifndef EGRESSBPF_PARSE_H
#define EGRESSBPF_PARSE_H

#include "packet.h"

#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#define IP_OFFSET 0x1fff
#define IP_MF 0x2000

#define IP_MAX_OPTIONS 40

#define UDP_HEADER 8

/* IPv6 extension headers that may stand before the transport header. */
#define EXT_HOPOPTS 0
#define EXT_ROUTING 43
#define EXT_FRAGMENT 44
#define EXT_AUTH 51
#define EXT_DSTOPTS 60
#define EXT_MOBILITY 135
#define EXT_HIP 139
#define EXT_SHIM6 140
#define MAX_EXTENSIONS 8

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* Protocols whose header begins with source and destination port. */
#define PROTO_DCCP 33
#define PROTO_SCTP 132
#define PROTO_UDPLITE 136
#define PROTO_MPTCP 262		/* as a socket has it; on the wire it is TCP */

/* tcphdr without bit fields. */
struct tcp {
	__be16 sport;
	__be16 dport;
	__be32 seq;
	__be32 ack;
	__u8 doff;
	__u8 flags;
	__be16 window;
	__be16 check;
	__be16 urgent;
};
_Static_assert(sizeof(struct tcp) == 20, "a TCP header without options");

union address {
	__u8 bytes[16];		/* network byte order; IPv4 is v4-mapped */
	__be16 be16[8];
	__be32 be32[4];
	__be64 be64[2];
};

struct flow {
	union address src;
	union address dst;
	__be16 sport;		/* 0 without has_ports */
	__be16 dport;
	__be32 seq;		/* sequence number; like ack and payload, of TCP alone */
	__be32 ack;
	__u32 transport;	/* offset of the transport header; 0 without one */
	__u32 payload;		/* bytes behind the TCP header */
	__u8 proto;
	__u8 flags;
	bool has_ports;		/* false for later fragments too */
	bool fragment;		/* other fragments may follow */
};

static __always_inline void map4(union address *a, __be32 ip)
{
	a->be32[0] = 0;
	a->be32[1] = 0;
	a->be32[2] = bpf_htonl(0xffff);
	a->be32[3] = ip;
}

static __always_inline bool mapped4(const union address *a)
{
	return !a->be32[0] && !a->be32[1] && a->be32[2] == bpf_htonl(0xffff);
}

static __always_inline bool carries_ports(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == PROTO_SCTP ||
	       proto == PROTO_DCCP || proto == PROTO_UDPLITE;
}

/* Whether the packet asks for a connection, whatever other flags it has. */
static __always_inline bool opens(const struct flow *f)
{
	return (f->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Whether the packet answers a request for a connection. */
static __always_inline bool accepts(const struct flow *f)
{
	return (f->flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK);
}

/* The number of bytes behind the header, in a segment of len bytes. */
static __always_inline __u32 payload_of(const struct tcp *tcp, __u32 len)
{
	__u32 header = (tcp->doff >> 4) * 4;

	return header < len ? len - header : 0;
}

/* Reads the header of a TCP segment of len bytes. */
static __always_inline void read_tcp(const struct tcp *tcp, __u32 len, struct flow *f)
{
	f->sport = tcp->sport;
	f->dport = tcp->dport;
	f->has_ports = true;
	f->flags = tcp->flags;
	f->seq = tcp->seq;
	f->ack = tcp->ack;
	f->payload = payload_of(tcp, len);
}

/* Reads the transport header, at offset off, of a whole packet or a first fragment. */
static __always_inline bool parse_transport(const struct packet *p, __u32 off, struct flow *f)
{
	/* An earlier header may have claimed to be longer than the packet. */
	if (off > p->len)
		return false;
	f->transport = off;
	if (f->proto == IPPROTO_TCP) {
		struct tcp tcp;

		if (load(p, off, &tcp, sizeof(tcp)))
			return false;
		read_tcp(&tcp, p->len - off, f);
	} else if (carries_ports(f->proto)) {
		/* Eight bytes, so that a whole UDP header has to be there. */
		__be16 ports[4];

		if (load(p, off, ports, sizeof(ports)))
			return false;
		f->sport = ports[0];
		f->dport = ports[1];
		f->has_ports = true;
	}
	return true;
}

/* Whether a later fragment at this offset could overwrite the ports and flags by which the
 * first fragment of a TCP packet was judged.
 */
static __always_inline bool rewrites_tcp(__u8 proto, __u32 offset)
{
	return proto == IPPROTO_TCP && offset < sizeof(struct tcp);
}

/* Checks the n bytes of options behind an IPv4 header. False if they cannot be read, or
 * contain a source route, which would send the packet elsewhere than its header says.
 */
static __always_inline bool parse_options4(const struct packet *p, __u32 n)
{
	__u8 opt[IP_MAX_OPTIONS + 1] = {};	/* past n, IPOPT_END */
	__u8 skip = 0;

	if (n == 0 || n > IP_MAX_OPTIONS || load(p, sizeof(struct iphdr), opt, n))
		return false;
	/* One step for each byte: so the verifier sees only constant offsets, and soon
	 * finds that the steps are alike.
	 */
	for (__u32 i = 0; i < IP_MAX_OPTIONS; i++) {
		if (skip) {
			skip--;
			continue;
		}
		switch (opt[i]) {
		case IPOPT_END:
			return true;
		case IPOPT_NOOP:
			continue;
		case IPOPT_LSRR:
		case IPOPT_SSRR:
			return false;
		}
		if (opt[i + 1] < 2 || i + opt[i + 1] > n)
			return false;
		skip = opt[i + 1] - 1;
	}
	return true;
}

static __always_inline bool is_extension(__u8 proto, bool v6)
{
	switch (proto) {
	case EXT_AUTH:
		return true;
	case EXT_HOPOPTS:
	case EXT_ROUTING:
	case EXT_FRAGMENT:
	case EXT_DSTOPTS:
	case EXT_MOBILITY:
	case EXT_HIP:
	case EXT_SHIM6:
		return v6;
	}
	return false;
}

/* A fragment other than the first is judged by its addresses alone. It cannot be judged if
 * its next header is an extension header, which hides how far it is from the ports, or if
 * it could overwrite the ports.
 */
static __always_inline bool hides_ports(__u8 proto, __u32 offset, bool v6)
{
	return is_extension(proto, v6) || rewrites_tcp(proto, offset);
}

/* What the extension headers lead to. In one number, since a global function returns no more. */
union walked {
	__u64 word;
	struct {
		__u32 transport;	/* offset of the transport header */
		__u8 proto;
		bool fragment;		/* other fragments may follow */
		bool later;		/* a later fragment, which has no transport header */
		bool valid;
	};
};

/* Reads the headers from off, the end of the IP header, whose protocol is proto. */
static __always_inline union walked walk(const struct packet *p, __u32 off, __u8 proto, bool v6)
{
	union walked w = { .proto = proto };

	/* Unrolled: 5.10 and 6.1 reject the loop that clang would make of it. */
	_Pragma("unroll")
	for (int i = 0; i <= MAX_EXTENSIONS; i++) {
		/* Every extension header has at least eight bytes. */
		struct {
			__u8 next;
			__u8 len;
			__be16 fragment;	/* offset in units of 8, 2 reserved bits, more */
			__be32 rest;
		} ext;

		if (!is_extension(w.proto, v6)) {
			w.transport = off;
			w.valid = true;
			return w;
		}
		if (i == MAX_EXTENSIONS || load(p, off, &ext, sizeof(ext)))
			return w;
		switch (w.proto) {
		case EXT_FRAGMENT:
			w.proto = ext.next;
			w.fragment = ext.fragment & bpf_htons(0xfff9);
			if (ext.fragment & bpf_htons(0xfff8)) {
				w.later = true;
				w.valid = !hides_ports(w.proto, bpf_ntohs(ext.fragment) & 0xfff8, v6);
				return w;
			}
			off += sizeof(ext);
			continue;
		case EXT_ROUTING:
			/* With segments left, the destination is only the next hop. */
			if (ext.fragment & bpf_htons(0x00ff))
				return w;
			break;
		case EXT_AUTH:
			w.proto = ext.next;
			off += (ext.len + 2) * 4;
			continue;
		}
		w.proto = ext.next;
		off += (ext.len + 1) * 8;
	}
	return w;
}

#ifdef WALK_IS_GLOBAL
/* Global for the verifier's sake: it checks a global function once, and goes on from there on
 * one path, not on each that leads out of it. Global functions take only numbers before 5.12.
 */
__noinline __u64 walk_on(struct __sk_buff *skb, __u32 len, __u32 off, __u8 proto, __u8 v6)
{
	const struct packet p = { .data = skb, .len = len };

	return walk(&p, off, proto, v6).word;
}

/* For packets whose base is 0. */
static __always_inline union walked walk_once(const struct packet *p, __u32 off, __u8 proto, bool v6)
{
	return (union walked){ .word = walk_on(p->data, p->len, off, proto, v6) };
}
#else
#define walk_once walk
#endif

/* Reads the headers from the end of the IP header, whose protocol is proto, to the ports. */
static __always_inline bool parse_headers(const struct packet *p, __u32 off, __u8 proto, struct flow *f, bool v6)
{
	union walked w = walk_once(p, off, proto, v6);

	f->proto = w.proto;
	f->fragment |= w.fragment;
	if (!w.valid || w.later)
		return w.valid;
	return parse_transport(p, w.transport, f);
}

/* The kernel writes the length of what it sends; beyond 64 KiB (BIG TCP) it writes 0. */
static __always_inline bool true_length(__u32 length, __u32 actual)
{
	return length == (actual > 0xffff ? 0 : actual);
}

static __always_inline bool parse4(const struct packet *p, struct flow *f)
{
	__u32 len = p->whole ? p->whole : p->len, header;
	struct iphdr ip;

	if (load(p, 0, &ip, sizeof(ip)))
		return false;
	header = ip.ihl * 4;
	if (ip.version != 4 || header < sizeof(ip) || header > len)
		return false;
	if (!true_length(bpf_ntohs(ip.tot_len), len))
		return false;
	if (header > sizeof(ip) && !parse_options4(p, header - sizeof(ip)))
		return false;
	map4(&f->src, ip.saddr);
	map4(&f->dst, ip.daddr);
	f->fragment = ip.frag_off & bpf_htons(IP_MF);
	if (ip.frag_off & bpf_htons(IP_OFFSET)) {
		f->proto = ip.protocol;
		return !hides_ports(ip.protocol, (bpf_ntohs(ip.frag_off) & IP_OFFSET) * 8, false);
	}
	return parse_headers(p, header, ip.protocol, f, false);
}

static __always_inline bool parse6(const struct packet *p, struct flow *f)
{
	__u32 payload = (p->whole ? p->whole : p->len) - sizeof(struct ipv6hdr);
	struct ipv6hdr ip;

	if (load(p, 0, &ip, sizeof(ip)))
		return false;
	if (ip.version != 6 || !true_length(bpf_ntohs(ip.payload_len), payload))
		return false;
	__builtin_memcpy(&f->src, &ip.saddr, sizeof(f->src));
	__builtin_memcpy(&f->dst, &ip.daddr, sizeof(f->dst));
	return parse_headers(p, sizeof(ip), ip.nexthdr, f, true);
}

/* Reads the packet into a flow; false if it cannot be judged. */
static __always_inline bool parse(const struct packet *p, struct flow *f)
{
	switch (p->protocol) {
	case bpf_htons(ETH_P_IP):
		return parse4(p, f);
	case bpf_htons(ETH_P_IPV6):
		return parse6(p, f);
	}
	return false;
}

#endif
