// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* How the host side judges packets, at either of its hooks. */
#ifndef EGRESSBPF_HOST_H
#define EGRESSBPF_HOST_H

#include "limit.h"
#include "opening.h"
#include "owner.h"
#include "packet.h"
#include "parse.h"
#include "rules.h"
#include "tunnels.h"
#include "verdict.h"

const volatile struct policed_cgroup policed[MAX_POLICED];

/* The container of the sender, whose state c becomes. Returns the id of its cgroup; 0 if the
 * sender is in none.
 */
static __always_inline __u64 container_of_sender(ancestor_fn ancestor, void *sender, struct container **c)
{
	*c = NULL;
	for (int i = 0; i < MAX_POLICED && policed[i].id; i++) {
		if (ancestor(sender, policed[i].level) == policed[i].id)
			return find_container(&policed[i], ancestor, sender, c);
	}
	return 0;
}

/* Tells of a packet that is refused. Its own headers describe it, whatever is inside. */
static __always_inline int tell_of_host(__u64 container, enum reason reason, const struct flow *f, __u32 bytes, __u32 device)
{
	struct event e = {
		.container = container,
		.sport = f->sport,
		.dport = f->dport,
		.proto = f->proto,
		.bytes = bytes,
		.device = device,
		.hook = HOOK_HOST,
		.reason = reason,
	};

	__builtin_memcpy(e.src, &f->src, sizeof(e.src));
	__builtin_memcpy(e.dst, &f->dst, sizeof(e.dst));
	return tell(&e);
}

/* Whether a blocked packet is one that the egress hook let through, because its container
 * may reach the metadata service. As many packets of a flow pass as the egress hook let
 * through. For a connection that the container has closed, its kernel answers without the
 * socket of the connection: without data, and with the one sequence number that follows the
 * FIN. Nobody else knows that number.
 */
static __always_inline bool take_permit(const struct flow *f, __u32 why)
{
	struct flow_key key = { .sport = f->sport, .dport = f->dport, .proto = f->proto };
	struct permit *permit;
	__s32 *n;

	if (why != RULE_METADATA)
		return false;
	__builtin_memcpy(key.src, &f->src, sizeof(key.src));
	__builtin_memcpy(key.dst, &f->dst, sizeof(key.dst));
	permit = bpf_map_lookup_elem(&permitted, &key);
	if (!permit)
		return false;
	if (permit->closed && permit->closing == f->seq && f->proto == IPPROTO_TCP && f->has_ports && !opens(f) && !f->payload)
		return true;
	n = (__s32 *)&permit->packets;
	if (*(volatile __s32 *)n <= 0)
		return false;
	/* Additions whose result is not used: atomic operations that return a value came in
	 * 5.12. If several CPUs want the last permit at once, perhaps none gets it, but
	 * never two.
	 */
	__sync_fetch_and_add(n, -1);
	if (*(volatile __s32 *)n >= 0)
		return true;
	__sync_fetch_and_add(n, 1);
	return false;
}

static const struct device new_device;

/* Takes a token for a packet that came from this device past the egress hook. The bucket is
 * the device's: a packet can forge its address, but not its device.
 */
static __always_inline bool take_device_token(__u32 index)
{
	struct device *d = bpf_map_lookup_elem(&devices, &index);
	bool taken;
	__u64 now;

	if (!d) {
		bpf_map_update_elem(&devices, &index, &new_device, BPF_NOEXIST);
		d = bpf_map_lookup_elem(&devices, &index);
		if (!d)
			return false;
	}
	if (surely_empty(&d->bucket, &default_limit))
		return false;
	now = bpf_ktime_get_ns();
	bpf_spin_lock(&d->lock);
	taken = bucket_take(&d->bucket, &default_limit, now);
	bpf_spin_unlock(&d->lock);
	if (taken)
		count_allowed(NULL);
	return taken;
}

/* How far from the SYN a segment may be for a server to accept the connection by it: the
 * window that a server offers at first. A segment that begins before the window may reach
 * into it.
 */
#define FIRST_WINDOW (1 << 20)

/* Whether a packet belongs to a connection that was let through, and could not open
 * another.
 */
static __always_inline bool known_to_go_on(struct opening *known, const struct flow *f)
{
	if (opens(f))
		return opens_no_more(known, f);
	/* A segment further off answers no server, and may be somebody else's guess. */
	if (!known->answered && bpf_ntohl(f->seq) - known->first + FIRST_WINDOW > 2 * FIRST_WINDOW)
		return true;
	return go_on(known, f) == GOES_ON;
}

/* Whether the egress hook has just let exactly this packet through, and no packet has used
 * that yet.
 */
static __always_inline bool take_announced(const struct flow *f)
{
	struct announcement key = { .seq = f->seq, .dport = f->dport };
	__u64 *at;

	__builtin_memcpy(key.dst, &f->dst, sizeof(key.dst));
	if (!opens(f)) {
		__builtin_memcpy(key.src, &f->src, sizeof(key.src));
		key.sport = f->sport;
		key.ack = f->ack;
	}
	at = bpf_map_lookup_elem(&admitted, &key);
	/* The egress hook's coarse clock may lag, and this packet may be late. */
	if (!at || (__s64)(bpf_ktime_get_ns() - *at) > (__s64)ANNOUNCED_NS)
		return false;
	return !bpf_map_delete_elem(&admitted, &key);
}

/* Whether a packet of a mail connection may pass. It passes if it continues a connection
 * that was let through; if the egress hook let it through, once for each payment; or if it
 * takes a token of the device here. The answer of a listener takes no token, or else
 * whoever connects from a mail port could empty the bucket.
 */
static __always_inline bool admit_mail(const struct flow *f, __u32 index)
{
	struct mail_key key = { .sport = f->sport, .dport = f->dport };
	struct opening *known, fresh;

	if (!default_limit.count || exempt(f) || (f->flags & TCP_RST && !(f->flags & TCP_SYN)))
		return true;
	__builtin_memcpy(key.src, &f->src, sizeof(key.src));
	__builtin_memcpy(key.dst, &f->dst, sizeof(key.dst));
	known = bpf_map_lookup_elem(&mails, &key);
	if (known && known_to_go_on(known, f))
		return true;
	if (!take_announced(f) && (accepts(f) || !take_device_token(index)))
		return false;
	/* The beginning of a connection stays noted, even if its first segment is repeated
	 * and paid for again.
	 */
	if (known && !opens(f))
		return true;
	fresh = begin_opening(f);
	bpf_map_update_elem(&mails, &key, &fresh, BPF_ANY);
	return true;
}

/* Why a packet that came in by a device may not be forwarded. segments is the size of the
 * segments that the packet will be split into; 0 if it will not be split.
 */
static __always_inline enum reason judge_forwarded(const struct flow *f, __u32 segments, __u32 device)
{
	__u32 why = blocked(f);

	if (why && !take_permit(f, why))
		return REASON_BLOCKED;
	/* No kernel asks for several connections with one packet. */
	if (f->proto == IPPROTO_TCP && opens(f) && segments)
		return REASON_MALFORMED;
	if (f->proto == IPPROTO_TCP && f->has_ports && smtp_ports[f->dport] && !admit_mail(f, device))
		return REASON_RATE_LIMITED;
	return REASON_NONE;
}

#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#define ETH_P_TEB 0x6558	/* Ethernet, within GRE or GENEVE */
#define ETH_P_WCCP 0x883e
#define MAX_TAGS 3

static __always_inline bool is_tag(__be16 protocol)
{
	return protocol == bpf_htons(ETH_P_8021Q) || protocol == bpf_htons(ETH_P_8021AD);
}

/* Packets inside the packet that are still to be judged: where they begin, and their
 * protocol.
 */
#define MAX_INNER 8
struct inner {
	__u32 off;
	__be16 protocol;
	__u16 guessed;	/* 1: only its first bits say that it is a packet */
};
struct inners {
	struct inner list[MAX_INNER];
	__u32 n;
	bool cut;	/* something lies beyond the end of the packet */
	bool deep;	/* there are more packets inside than are judged */
};

static __always_inline void add_inner(struct inners *all, __u32 off, __be16 protocol, bool guessed)
{
	if (all->n >= MAX_INNER) {
		all->deep = true;
		return;
	}
	all->list[all->n & (MAX_INNER - 1)] = (struct inner){ off, protocol, guessed };
	all->n++;
}

/* Moves off and type past VLAN tags, if there are any at off, where type says what follows.
 * False if the packet ends first.
 */
static __always_inline bool skip_tags(const struct packet *p, __u32 *off, __be16 *type)
{
	for (int i = 0; i < MAX_TAGS && is_tag(*type); i++) {
		if (load(p, *off + 2, type, sizeof(*type)))
			return false;
		*off += 4;
	}
	return true;
}

static __always_inline bool is_ip(__be16 protocol)
{
	return protocol == bpf_htons(ETH_P_IP) || protocol == bpf_htons(ETH_P_IPV6);
}

static __always_inline void add_by_type(const struct packet *p, struct inners *all, __u32 off, __be16 type)
{
	if (!skip_tags(p, &off, &type))
		all->cut = true;
	else if (is_tag(type))
		all->deep = true;
	else if (is_ip(type))
		add_inner(all, off, type, false);
}

/* Adds what an Ethernet frame at off carries. */
static __always_inline void add_frame(const struct packet *p, struct inners *all, __u32 off)
{
	__be16 type;

	if (load(p, off + 12, &type, sizeof(type)))
		all->cut = true;
	else
		add_by_type(p, all, off + 14, type);
}

/* Adds what is at off in a tunnel that can carry any type. */
static __always_inline void add_payload(const struct packet *p, struct inners *all, __u32 off, __be16 type)
{
	if (type == bpf_htons(ETH_P_TEB))
		add_frame(p, all, off);
	else
		add_by_type(p, all, off, type);
}

/* Adds what GRE at off carries, or bytes that read like GRE. */
static __always_inline void add_gre(const struct packet *p, struct inners *all, __u32 off)
{
	struct {
		__u8 flags;
		__u8 version;
		__be16 type;
	} h;

	if (load(p, off, &h, sizeof(h))) {
		all->cut = true;
		return;
	}
	if (h.version & 7)
		return;
	/* Optional fields of four bytes each: checksum, routing, key, sequence. */
	off += 4 + ((h.flags >> 5 & 4) + (h.flags >> 4 & 4) + (h.flags >> 3 & 4) + (h.flags >> 2 & 4));
	if (h.type == bpf_htons(ETH_P_WCCP)) {	/* with or without a header of its own */
		add_inner(all, off, bpf_htons(ETH_P_IP), true);
		add_inner(all, off + 4, bpf_htons(ETH_P_IP), true);
		add_inner(all, off, bpf_htons(ETH_P_IPV6), true);
		add_inner(all, off + 4, bpf_htons(ETH_P_IPV6), true);
	} else {
		add_payload(p, all, off, h.type);
	}
}

/* Adds every packet that a tunnel of this host could find in a UDP datagram whose data is
 * at off. The tunnel may be one that the map tunnels does not have yet, so the data is read
 * as each kind of tunnel would read it.
 */
static __always_inline void add_datagram(const struct packet *p, __u32 off, struct inners *all)
{
	struct {
		__u8 first;
		__u8 second;
		__be16 type;
		__be32 rest;
	} h;

	if (load(p, off, &h, sizeof(h))) {
		all->cut = true;
		return;
	}
	if (h.first & 0x08)	/* VXLAN */
		add_frame(p, all, off + 8);
	if ((h.first & 0x0c) == 0x0c) {	/* VXLAN-GPE, which names the next protocol */
		if ((bpf_ntohs(h.type) & 0xff) == 1)
			add_inner(all, off + 8, bpf_htons(ETH_P_IP), true);
		if ((bpf_ntohs(h.type) & 0xff) == 2)
			add_inner(all, off + 8, bpf_htons(ETH_P_IPV6), true);
	}
	if (!(h.first & 0xc0))	/* GENEVE */
		add_payload(p, all, off + 8 + (h.first & 0x3f) * 4, h.type);
	if (!(h.first & 0xe0)) {	/* GUE */
		__u32 at = off + 4 + (h.first & 0x1f) * 4;

		if (h.second == PROTO_IPIP)
			add_inner(all, at, bpf_htons(ETH_P_IP), true);
		if (h.second == PROTO_IPV6)
			add_inner(all, at, bpf_htons(ETH_P_IPV6), true);
		if (h.second == PROTO_GRE)
			add_gre(p, all, at);
	}
	if (h.first >> 4 == 4)	/* FOU */
		add_inner(all, off, bpf_htons(ETH_P_IP), true);
	if (h.first >> 4 == 6)
		add_inner(all, off, bpf_htons(ETH_P_IPV6), true);
	add_gre(p, all, off);
}

/* The largest number of datagrams that a socket can send as one (UDP_SEGMENT). The kernel
 * splits them before a tunnel unpacks them.
 */
#define MAX_SEGMENTS 128

/* The packet behind the transport header of an IPv6 packet. It is judged wherever the IPv6
 * packet goes, since a route can make the host unpack it (seg6local). The protocol is 0 if
 * there is no such packet.
 */
static __always_inline struct inner carried(const struct packet *p, const struct flow *f)
{
	struct inner in = { .off = f->transport };

	if (!in.off)
		return in;
	if (f->proto == PROTO_IPIP)
		in.protocol = bpf_htons(ETH_P_IP);
	if (f->proto == PROTO_IPV6)
		in.protocol = bpf_htons(ETH_P_IPV6);
	if (f->proto == PROTO_ETHERNET) {
		__be16 type;

		if (load(p, in.off + 12, &type, sizeof(type)))
			return in;
		in.off += 14;
		if (skip_tags(p, &in.off, &type) && is_ip(type))
			in.protocol = type;
	}
	return in;
}

static __always_inline bool carries(const struct flow *f)
{
	return !mapped4(&f->dst) && (f->proto == PROTO_IPIP || f->proto == PROTO_IPV6 || f->proto == PROTO_ETHERNET);
}

/* Why a packet inside an IPv6 packet may not pass. Nothing is known of where it will be
 * unpacked.
 */
static __always_inline enum reason judge_as_carried(const struct flow *f)
{
	if (blocked(f))
		return REASON_BLOCKED;
	if (f->proto == IPPROTO_TCP && opens(f) && smtp_ports[f->dport] && !exempt(f) && default_limit.count)
		return REASON_RATE_LIMITED;
	return REASON_NONE;
}

/* The first bytes of IP headers. */
union ip_header {
	struct {
		__u8 version;
		__u8 tos;
		__be16 tot_len;
	};
	struct {
		__be32 flow;
		__be16 payload_len;
		__be16 rest;
	};
};

/* How long the packet is according to its IP header. */
static __always_inline __u32 claimed_length(const struct packet *p, const union ip_header *ip)
{
	if (p->protocol == bpf_htons(ETH_P_IP))
		return bpf_ntohs(ip->tot_len);
	return bpf_ntohs(ip->payload_len) + sizeof(struct ipv6hdr);
}

/* How much of a packet inside a fragment has to be there to be judged: its headers, as far
 * as they are read.
 */
#define MIN_INSIDE 80

/* What look_inside() finds. */
enum inside {
	NOTHING,	/* no packet, to any tunnel */
	A_FLOW,
	UNREADABLE,	/* a packet that cannot be judged */
};

/* Finds the end of p, a packet inside another one, so that p can be parsed like any packet.
 * What follows its end is padding. In a fragment, the end may be still to come.
 */
static __always_inline enum inside trim(struct packet *p, bool fragment)
{
	union ip_header ip;
	__u32 len;
	__u8 last;

	if (fragment && load(p, MIN_INSIDE - 1, &last, sizeof(last)))
		return UNREADABLE;
	if (load(p, 0, &ip, sizeof(ip)) || ip.version >> 4 != (p->protocol == bpf_htons(ETH_P_IP) ? 4 : 6))
		return NOTHING;
	len = claimed_length(p, &ip);
	if (len > p->len) {
		p->whole = len;
		return fragment ? A_FLOW : NOTHING;
	}
	p->len = len;
	return A_FLOW;
}

/* Why a packet that a tunnel of this host would unpack may not pass. It may be neither mail
 * nor for another tunnel. A guessed packet may be for a tunnel port, since any data may
 * look like that.
 */
static __always_inline enum reason judge_as_unpacked(const struct flow *f, bool guessed)
{
	if (blocked(f) || (!guessed && for_tunnel(f)))
		return REASON_BLOCKED;
	if (f->proto == IPPROTO_TCP && f->has_ports && smtp_ports[f->dport] && !exempt(f) && default_limit.count)
		return REASON_RATE_LIMITED;
	return REASON_NONE;
}

#endif
