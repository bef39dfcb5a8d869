// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What the host side thinks of packets, whichever hook it has them from. */
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

#define MAX_POLICED 8
const volatile struct policed_cgroup policed[MAX_POLICED];

/* The container that the sender is in; NULL if there is none, or it has no state. */
static __always_inline struct container *container_of_sender(ancestor_fn ancestor, void *sender)
{
	struct container *c = NULL;

	for (int i = 0; i < MAX_POLICED && policed[i].id; i++) {
		if (ancestor(sender, policed[i].level) == policed[i].id) {
			find_container(&policed[i], ancestor, sender, &c);
			break;
		}
	}
	return c;
}

/* Whether a blocked packet is one that the egress hook has let through, since its
 * container may reach the metadata service: as many of a flow pass as it has. For a
 * connection that it has closed, a kernel answers without the connection's socket: with
 * no data, and the one number that follows the last. Nobody else knows that.
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
	/* Additions that return nothing: others came in 5.12. Of several CPUs that want
	 * the last one, none may get it, never two.
	 */
	__sync_fetch_and_add(n, -1);
	if (*(volatile __s32 *)n >= 0)
		return true;
	__sync_fetch_and_add(n, 1);
	return false;
}

static const struct device new_device;

/* A token of all that comes from this device past the egress hook: an address can be
 * forged, a device cannot.
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

/* How far from its SYN a server may take a connection up: in the window that it has offered,
 * and a segment that begins before may reach into that.
 */
#define FIRST_WINDOW (1 << 20)

/* Whether a packet is of a connection that has been let through, and could open no other. */
static __always_inline bool known_to_go_on(struct opening *known, const struct flow *f)
{
	if (opens(f))
		return opens_no_more(known, f);
	/* What is further off answers nobody, and may be somebody else's guess. */
	if (!known->answered && bpf_ntohl(f->seq) - known->first + FIRST_WINDOW > 2 * FIRST_WINDOW)
		return true;
	return go_on(known, f) == GOES_ON;
}

/* Whether the egress hook has just let this very packet through, and nothing has used
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
	/* The clock of the egress hook may be behind, and this one's packet late. */
	if (!at || (__s64)(bpf_ktime_get_ns() - *at) > (__s64)ANNOUNCED_NS)
		return false;
	return !bpf_map_delete_elem(&admitted, &key);
}

/* Whether a packet of a mail connection may pass: one that goes on with what has been let
 * through; or that the egress hook has let through, once each time it was paid for; or
 * that takes a token here. The answer of a listener takes none: else whoever asks from a
 * mail port could empty the bucket.
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
	/* What it has begun with stays known, also when that is repeated and paid for. */
	if (known && !opens(f))
		return true;
	fresh = begin_opening(f);
	bpf_map_update_elem(&mails, &key, &fresh, BPF_ANY);
	return true;
}

/* Why a packet that came in by a device may not go where it wants to. segments is how long
 * those are that it is to be split into; 0 if it is not.
 */
static __always_inline enum reason judge_forwarded(const struct flow *f, __u32 segments, __u32 device)
{
	__u32 why = blocked(f);

	if (why && !take_permit(f, why))
		return REASON_BLOCKED;
	/* No kernel asks for several connections at once. */
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

/* Packets within packets that are still to be looked at: where, and what of. */
#define MAX_INNER 8
struct inner {
	__u32 off;
	__be16 protocol;
	__u16 guessed;	/* 1: nothing but its first bits say that it is a packet */
};
struct inners {
	struct inner list[MAX_INNER];
	__u32 n;
	bool cut;	/* something is behind the end of the packet */
	bool deep;	/* there is more than is looked at */
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

/* Goes from off, at which there is what is called type, to behind VLAN tags, if that is
 * what follows. False if the packet ends before.
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

/* An Ethernet frame at off. */
static __always_inline void add_frame(const struct packet *p, struct inners *all, __u32 off)
{
	__be16 type;

	if (load(p, off + 12, &type, sizeof(type)))
		all->cut = true;
	else
		add_by_type(p, all, off + 14, type);
}

/* What a tunnel that carries any type has at off. */
static __always_inline void add_payload(const struct packet *p, struct inners *all, __u32 off, __be16 type)
{
	if (type == bpf_htons(ETH_P_TEB))
		add_frame(p, all, off);
	else
		add_by_type(p, all, off, type);
}

/* Of GRE, or of what reads like it. */
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
	/* Of four bytes each: flags, checksum, (routing), key, sequence. */
	off += 4 + ((h.flags >> 5 & 4) + (h.flags >> 4 & 4) + (h.flags >> 3 & 4) + (h.flags >> 2 & 4));
	if (h.type == bpf_htons(ETH_P_WCCP)) {	/* with a header of its own, or without */
		add_inner(all, off, bpf_htons(ETH_P_IP), true);
		add_inner(all, off + 4, bpf_htons(ETH_P_IP), true);
		add_inner(all, off, bpf_htons(ETH_P_IPV6), true);
		add_inner(all, off + 4, bpf_htons(ETH_P_IPV6), true);
	} else {
		add_payload(p, all, off, h.type);
	}
}

/* What a tunnel of this host may find in a UDP datagram whose data is at off, if there is
 * one that is not known here yet. What reads as a tunnel's header counts.
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
	if ((h.first & 0x0c) == 0x0c) {	/* VXLAN-GPE, with the protocol that is next */
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

/* How many datagrams a socket hands over as one (UDP_SEGMENT) at most; the kernel splits
 * them before it unpacks.
 */
#define MAX_SEGMENTS 128

/* The packet that is behind the transport header of one of IPv6, wherever that goes: a route
 * can have the host unpack it (seg6local). Its protocol is 0 if there is none.
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

/* Why such a packet may not pass, for all that is known of where it is unpacked. */
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

/* What an IP header says of how long the packet is. */
static __always_inline __u32 claimed_length(const struct packet *p, const union ip_header *ip)
{
	if (p->protocol == bpf_htons(ETH_P_IP))
		return bpf_ntohs(ip->tot_len);
	return bpf_ntohs(ip->payload_len) + sizeof(struct ipv6hdr);
}

/* How much of a packet within a fragment has to be there for it to be judged: its headers,
 * as far as they are read.
 */
#define MIN_INSIDE 80

/* What is found inside of a packet. */
enum inside {
	NOTHING,	/* nothing that a tunnel would take for a packet */
	A_FLOW,
	UNREADABLE,	/* a packet that cannot be judged */
};

/* Finds the end of the packet p, which is within another one, so that it can be read as
 * those that are not. What follows is padding; of a fragment, its end may be still to come.
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

/* Why what a tunnel of this host would unpack may not go where it wants to. None of it is
 * mail, or for another tunnel, of which any data may remind.
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
