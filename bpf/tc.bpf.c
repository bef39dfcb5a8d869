//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The host side for kernels without BPF netfilter programs. It runs at the ingress of
 * containers' bridges, before the host's IP stack, and so has to do what the stack does
 * first: skip VLAN tags and padding, and expect fragments.
 */
#define RULES_LINKAGE __noinline

#include "glance.h"
#include "host.h"

#include <bpf/bpf_helpers.h>

#define TC_ACT_UNSPEC (-1)	/* go on to other filters */
#define TC_ACT_SHOT 2

#define AF_INET 2
#define AF_INET6 10

#define ETH_P_ARP 0x0806

/* Length of the header that the device puts before the network header: 14 for Ethernet. */
const volatile __u32 link_header;

/* What is known of the packet on this CPU. It is too large for the stack. */
struct scratch {
	struct flow flow;
	struct inners inners;
	/* As open_packet() found them; len is 0 if it found no IP packet. */
	__u32 base;
	__u32 len;
	__be16 protocol;
	bool fragment;
	__u32 end;	/* of the datagram being read, if the packet holds several; or 0 */
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

/* Finds the IP header behind VLAN tags, and the end of the packet; what follows is padding.
 * False if it is no IP packet.
 */
static __always_inline bool open_packet(struct __sk_buff *skb, struct packet *p)
{
	union ip_header ip;
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
	if (!is_ip(p->protocol))
		return false;
	p->len = skb->len - p->base;
	/* Beyond 64 KiB (BIG TCP) the header states no length. */
	if (p->len > 0xffff && (p->protocol == bpf_htons(ETH_P_IP) ? !ip.tot_len : !ip.payload_len))
		return true;
	len = claimed_length(p, &ip);
	if (len > p->len)
		return false;
	p->len = len;
	return true;
}

static __always_inline __u64 above(void *skb, __u32 level)
{
	return bpf_skb_ancestor_cgroup_id(skb, level);
}

/* The following functions are global for the verifier's sake. */

/* Reads the packet at base as a flow; 0 if it cannot be judged. */
__noinline int parse_at(struct __sk_buff *skb, __u32 base, __u32 len, __u32 whole, __u32 protocol)
{
	struct packet p = { .data = skb, .base = base, .len = len, .whole = whole, .protocol = protocol };
	struct scratch *s = scratch();
	struct flow f = {};

	if (!s || !parse(&p, &f))
		return 0;
	s->flow = f;
	return 1;
}

/* Reads the packet as a flow; 0 if it cannot be judged. */
__noinline int read_flow(struct __sk_buff *skb)
{
	struct scratch *s = scratch();
	struct packet p = {};

	if (!s)
		return 0;
	s->len = 0;
	if (!open_packet(skb, &p))
		return 0;
	s->base = p.base;
	s->len = p.len;
	s->protocol = p.protocol;
	if (!parse_at(skb, p.base, p.len, 0, p.protocol))
		return 0;
	s->fragment = s->flow.fragment;
	s->end = 0;
	return 1;
}

__noinline int refuse_packet(struct __sk_buff *skb, __u32 reason)
{
	struct scratch *s = scratch();
	__u32 len = s && s->len ? s->len : skb->len;
	struct container *c;
	__u64 id;

	id = container_of_sender(above, skb, &c);
	if (refuse(c, HOOK_HOST, reason, len) && s) {
		if (!read_flow(skb))
			s->flow = (struct flow){};
		tell_of_host(id, reason, &s->flow, len, skb->ifindex);
	}
	return enforce;
}

static __always_inline int drop(struct __sk_buff *skb, enum reason reason)
{
	return refuse_packet(skb, reason) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* The packet, after read_flow(). */
static __always_inline struct packet opened(struct __sk_buff *skb, const struct scratch *s)
{
	return (struct packet){ .data = skb, .base = s->base, .len = s->len, .protocol = s->protocol };
}

__noinline int judge_flow(struct __sk_buff *skb)
{
	struct scratch *s = scratch();

	return s ? judge_forwarded(&s->flow, skb->gso_size, skb->ifindex) : REASON_MALFORMED;
}

/* Reads the packet at an offset; its flow overwrites the one in scratch. */
__noinline int look_inside(struct __sk_buff *skb, __u32 off, __u32 protocol, __u32 guessed)
{
	struct scratch *s = scratch();
	enum inside found;
	struct packet p;

	if (!s)
		return UNREADABLE;
	p = opened(skb, s);
	if (s->end && s->end < p.len)
		p.len = s->end;
	if (off > p.len)
		return s->fragment ? UNREADABLE : NOTHING;
	p.base += off;
	p.len -= off;
	p.protocol = protocol;
	found = trim(&p, s->fragment);
	if (found != A_FLOW || parse_at(skb, p.base, p.len, p.whole, p.protocol))
		return found;
	return guessed ? NOTHING : UNREADABLE;
}

/* Adds to inners what the datagram whose data is at off may contain. */
__noinline int unpack(struct __sk_buff *skb, __u32 off)
{
	struct scratch *s = scratch();
	struct packet p;

	if (!s)
		return 0;
	p = opened(skb, s);
	add_datagram(&p, off, &s->inners);
	return 0;
}

__noinline int judge_inside(__u32 guessed)
{
	struct scratch *s = scratch();

	return s ? judge_as_unpacked(&s->flow, guessed) : REASON_MALFORMED;
}

/* Why the packet may not pass because of the packet that it carries. */
__noinline int judge_carried(struct __sk_buff *skb)
{
	struct scratch *s = scratch();
	struct flow outer;
	struct inner in;
	enum reason reason = REASON_NONE;
	struct packet p;

	if (!s)
		return REASON_MALFORMED;
	if (!carries(&s->flow))
		return REASON_NONE;
	p = opened(skb, s);
	in = carried(&p, &s->flow);
	if (!in.protocol)
		return REASON_NONE;
	outer = s->flow;
	if (look_inside(skb, in.off, in.protocol, in.guessed) == A_FLOW)
		reason = judge_as_carried(&s->flow);
	s->flow = outer;
	return reason;
}

/* Whether the packet may be for the host itself, which could unpack it. */
__noinline int for_this_host(struct __sk_buff *skb)
{
	struct bpf_fib_lookup to = { .ifindex = skb->ifindex };
	struct scratch *s = scratch();

	if (!s)
		return 1;
	to.l4_protocol = s->flow.proto;
	if (mapped4(&s->flow.dst)) {
		/* The host receives broadcast and multicast, whatever its routes say. */
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

/* Makes inners the list of what the datagram at off may contain. */
static __always_inline void look_into(struct __sk_buff *skb, struct scratch *s, __u32 off)
{
	s->inners.n = 0;
	s->inners.cut = s->inners.deep = false;
	unpack(skb, off);
}

/* Why a datagram whose data is at off may not pass, because of what the host would unpack
 * from it.
 */
__noinline int judge_datagram(struct __sk_buff *skb, __u32 off)
{
	struct scratch *s = scratch();
	enum reason reason;

	if (!s)
		return REASON_MALFORMED;
	look_into(skb, s, off);
	for (__u32 i = 0; i < MAX_INNER && i < s->inners.n; i++) {
		struct inner in = s->inners.list[i];

		switch (look_inside(skb, in.off, in.protocol, in.guessed)) {
		case UNREADABLE:
			return REASON_MALFORMED;
		case A_FLOW:
			reason = judge_inside(in.guessed);
			if (reason != REASON_NONE)
				return reason;
			if (is_datagram(&s->flow))
				unpack(skb, in.off + s->flow.transport + UDP_HEADER);
		}
	}
	return s->inners.deep || (s->inners.cut && s->fragment) ? REASON_MALFORMED : REASON_NONE;
}

/* Whether a datagram that was recognised at a glance goes to no tunnel, and holds no packet
 * that a tunnel could unpack.
 */
__noinline int holds_nothing(struct __sk_buff *skb)
{
	__u32 ports = skb->protocol == bpf_htons(ETH_P_IP) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	struct scratch *s = scratch();
	struct packet p = { .data = skb, .base = link_header, .len = skb->len - link_header, .protocol = skb->protocol };
	__be16 port;

	if (!s || load(&p, ports + sizeof(port), &port, sizeof(port)) || tunnel_port(port))
		return 0;
	s->base = p.base;
	s->len = p.len;
	s->protocol = p.protocol;
	look_into(skb, s, ports + UDP_HEADER);
	return !s->inners.n && !s->inners.deep;
}

/* Why a packet to the host itself may not pass, because of what the host would unpack from
 * it.
 */
static __always_inline enum reason judge_delivered(struct __sk_buff *skb)
{
	struct scratch *s = scratch();
	enum reason reason;
	__u32 off, len;

	if (!s)
		return REASON_MALFORMED;
	if (for_tunnel(&s->flow))
		return REASON_BLOCKED;
	if (!is_datagram(&s->flow))
		return REASON_NONE;
	off = s->flow.transport + UDP_HEADER;
	len = s->len;
	for (int i = 0; i < MAX_SEGMENTS; i++) {
		s->end = skb->gso_size ? off + skb->gso_size : 0;
		reason = judge_datagram(skb, off);
		if (reason != REASON_NONE)
			return reason;
		off += skb->gso_size;
		if (!skb->gso_size || off >= len)
			return REASON_NONE;
	}
	return REASON_MALFORMED;
}

/* Whether the packet could be dropped if it is for the host itself. Finding out whether it
 * is costs more.
 */
static __always_inline bool could_smuggle(struct __sk_buff *skb)
{
	struct scratch *s = scratch();

	if (!s || for_tunnel(&s->flow))
		return true;
	if (!is_datagram(&s->flow))
		return false;
	look_into(skb, s, s->flow.transport + UDP_HEADER);
	return skb->gso_size || s->inners.n || s->inners.deep || (s->inners.cut && s->fragment);
}

/* Most packets pass at a glance. A datagram does if nothing in it could be unpacked. */
static __always_inline bool plain(struct __sk_buff *skb)
{
	const void *ip = (void *)(long)skb->data + link_header, *end = (void *)(long)skb->data_end;
	__u32 len = skb->len - link_header;
	enum glance g = UNCLEAR;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		g = glance4(ip, end, len);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		g = glance6(ip, end, len);
	return g == PLAIN || (g == DATAGRAM && !skb->gso_size && holds_nothing(skb));
}

SEC("tc")
int host_ingress(struct __sk_buff *skb)
{
	enum reason reason;

	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return TC_ACT_UNSPEC;
	if (plain(skb))
		return TC_ACT_UNSPEC;
	if (!read_flow(skb))
		return drop(skb, REASON_MALFORMED);
	reason = judge_flow(skb);
	if (reason == REASON_NONE)
		reason = judge_carried(skb);
	if (reason == REASON_NONE && could_smuggle(skb) && for_this_host(skb))
		reason = judge_delivered(skb);
	return reason == REASON_NONE ? TC_ACT_UNSPEC : drop(skb, reason);
}

char _license[] SEC("license") = "Dual BSD/GPL";
