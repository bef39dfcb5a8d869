//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The host side for kernels without BPF netfilter programs: at the ingress of containers'
 * bridges, before the host's IP stack. What that does with a packet first, it has to do
 * by itself: take off VLAN tags and padding, and expect packets in fragments.
 */
#include "types.h"

#include <bpf/bpf_helpers.h>

static __always_inline __u64 ancestor_of(void *skb, __u32 level)
{
	return bpf_skb_ancestor_cgroup_id(skb, level);
}

#include "host.h"

#define TC_ACT_UNSPEC (-1)	/* on to filters of others */
#define TC_ACT_SHOT 2

#define AF_INET 2
#define AF_INET6 10

#define ETH_P_ARP 0x0806

/* What the device has before the network header: 14 bytes if it is an Ethernet. */
const volatile __u32 link_header;

/* Of the packet that this CPU is at: too much for the stack. */
struct scratch {
	struct flow flow;
	struct inners inners;
	/* As open_packet() has found it. */
	__u32 base;
	__u32 len;
	__be16 protocol;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratches SEC(".maps");

static __always_inline struct scratch *scratch(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&scratches, &key);
}

/* Finds the IP header behind VLAN tags, and where the packet ends; what follows is
 * padding. False if it is no IP packet.
 */
static __always_inline bool open_packet(struct __sk_buff *skb, struct packet *p)
{
	struct {
		__u8 version;
		__u8 tos;
		__be16 tot_len;
		__be16 payload_len;
		__be16 rest;
	} ip;
	__u32 len;

	p->data = skb;
	p->base = link_header;
	p->len = skb->len;
	p->protocol = skb->protocol;
	for (int i = 0; i < MAX_TAGS && is_tag(p->protocol); i++) {
		if (load(p, 2, &p->protocol, sizeof(p->protocol)))
			return false;
		p->base += 4;
	}
	if (skb->len < p->base || load(p, 0, &ip, sizeof(ip)))
		return false;
	p->len = skb->len - p->base;
	if (p->protocol == bpf_htons(ETH_P_IP))
		len = bpf_ntohs(ip.tot_len);
	else if (p->protocol == bpf_htons(ETH_P_IPV6))
		len = bpf_ntohs(ip.payload_len) + sizeof(struct ipv6hdr);
	else
		return false;
	/* Beyond 64 KiB (BIG TCP) there is no length. */
	if (p->len > 0xffff && (p->protocol == bpf_htons(ETH_P_IP) ? !ip.tot_len : !ip.payload_len))
		return true;
	if (len > p->len)
		return false;
	p->len = len;
	return true;
}

/* The next are functions of their own for the verifier's sake. */

__noinline int count(struct __sk_buff *skb)
{
	struct packet p = {};

	count_host_side(container_of_sender(skb), open_packet(skb, &p) ? p.len : skb->len);
	return 0;
}

static __always_inline int drop(struct __sk_buff *skb)
{
	count(skb);
	return enforce ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* Reads the packet as a flow; 0 if it cannot be judged. */
__noinline int read_flow(struct __sk_buff *skb)
{
	struct scratch *s = scratch();
	struct packet p = {};
	struct flow f = {};

	if (!s || !open_packet(skb, &p) || !parse(&p, &f))
		return 0;
	s->flow = f;
	s->base = p.base;
	s->len = p.len;
	s->protocol = p.protocol;
	return 1;
}

/* The packet, once its flow has been read. */
static __always_inline struct packet opened(struct __sk_buff *skb, const struct scratch *s)
{
	return (struct packet){ .data = skb, .base = s->base, .len = s->len, .protocol = s->protocol };
}

__noinline int judge_flow(struct __sk_buff *skb)
{
	struct scratch *s = scratch();
	struct packet p;
	struct flow f;

	if (!s)
		return 0;
	p = opened(skb, s);
	f = s->flow;
	return may_pass(&p, &f, skb->ifindex);
}

/* How much of a packet within a fragment has to be there for it to be judged: its headers,
 * as far as they are read.
 */
#define MIN_INSIDE 80

/* Reads the packet at an offset; 0 if it is none. */
__noinline int look_inside(struct __sk_buff *skb, __u32 off, __u32 protocol)
{
	struct scratch *s = scratch();
	struct flow f = {};
	struct packet p;
	__u8 last;

	if (!s)
		return 0;
	p = opened(skb, s);
	if (off > p.len) {
		s->inners.cut = true;
		return 0;
	}
	p.base += off;
	p.len -= off;
	p.protocol = protocol;
	f.fragment = s->flow.fragment;
	if (f.fragment && load(&p, MIN_INSIDE - 1, &last, sizeof(last))) {
		s->inners.cut = true;
		return 0;
	}
	if (!read_inside(&p, &f))
		return 0;
	s->flow = f;
	return 1;
}

/* Notes what is behind the transport header at an offset. */
__noinline int unpack(struct __sk_buff *skb, __u32 off, __u32 proto)
{
	struct scratch *s = scratch();
	struct packet p;

	if (!s)
		return 0;
	p = opened(skb, s);
	add_tunnelled(&p, proto, off, &s->inners);
	return 0;
}

__noinline int judge_inside(struct __sk_buff *skb)
{
	struct scratch *s = scratch();
	struct flow f;

	if (!s)
		return 0;
	f = s->flow;
	return may_pass_inside(&f, skb->ifindex);
}

/* Whether the host is to have the packet itself, and may unpack it. */
__noinline int for_this_host(struct __sk_buff *skb)
{
	struct bpf_fib_lookup to = { .ifindex = skb->ifindex };
	struct scratch *s = scratch();

	if (!s)
		return 1;
	to.l4_protocol = s->flow.proto;
	if (mapped4(&s->flow.dst)) {
		/* Broadcasts and groups, which the host receives whatever its routes say. */
		if (!s->flow.dst.bytes[12] || s->flow.dst.bytes[12] >= 224)
			return 1;
		to.family = AF_INET;
		to.ipv4_src = s->flow.src.be32[3];
		to.ipv4_dst = s->flow.dst.be32[3];
	} else {
		to.family = AF_INET6;
		__builtin_memcpy(to.ipv6_src, &s->flow.src, sizeof(to.ipv6_src));
		__builtin_memcpy(to.ipv6_dst, &s->flow.dst, sizeof(to.ipv6_dst));
	}
	switch (bpf_fib_lookup(skb, &to, sizeof(to), 0)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return 0;
	}
	return 1;
}

/* Whether the packet, whose flow has been read, may have others in it. */
static __always_inline bool packed(struct __sk_buff *skb)
{
	struct scratch *s = scratch();

	if (!s)
		return true;
	s->inners.n = 0;
	s->inners.cut = s->inners.deep = false;
	if (s->flow.transport)
		unpack(skb, s->flow.transport, s->flow.proto);
	return s->inners.n || s->inners.deep || (s->inners.cut && s->flow.fragment);
}

/* Whether there is something in it that may not pass if the host unpacks it. */
static __always_inline bool smuggles(struct __sk_buff *skb)
{
	struct scratch *s = scratch();
	bool fragment;

	if (!s)
		return true;
	fragment = s->flow.fragment;
	for (__u32 i = 0; i < MAX_INNER && i < s->inners.n; i++) {
		__u32 off = s->inners.list[i].off;

		if (!look_inside(skb, off, s->inners.list[i].protocol))
			continue;
		if (!judge_inside(skb))
			return true;
		if (s->flow.transport)
			unpack(skb, off + s->flow.transport, s->flow.proto);
	}
	return s->inners.deep || (s->inners.cut && fragment);
}

SEC("tc")
int host_ingress(struct __sk_buff *skb)
{
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return TC_ACT_UNSPEC;
	if (!read_flow(skb) || !judge_flow(skb))
		return drop(skb);
	/* Most packets have nothing in them, and others are mostly not for the host. */
	if (packed(skb) && for_this_host(skb) && smuggles(skb))
		return drop(skb);
	return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "Dual BSD/GPL";
