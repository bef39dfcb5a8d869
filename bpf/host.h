// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What the host side thinks of packets, whichever hook it has them from.
 *
 * Whoever includes this says which cgroups a packet's sender is in, by
 * ancestor_of(sender, level): the id of the one at a level below the root, 0 if that
 * is too deep.
 */
#ifndef EGRESSBPF_HOST_H
#define EGRESSBPF_HOST_H

#include "limit.h"
#include "packet.h"
#include "parse.h"
#include "rules.h"
#include "state.h"

#include <stddef.h>

#define MAX_PLACES 8
const volatile struct place places[MAX_PLACES];

/* The container that the sender is in; NULL if there is none, or no room for its state. */
static __always_inline struct container *container_of_sender(void *sender)
{
	for (int i = 0; i < MAX_PLACES && places[i].id; i++) {
		__u32 top = places[i].level;
		__u64 id;

		if (ancestor_of(sender, top) != places[i].id)
			continue;
		if (!places[i].recognises) {
			id = ancestor_of(sender, top + 1);
			return id ? state_of(id) : NULL;
		}
		for (__u32 l = 1; l <= MAX_DEPTH; l++) {
			struct container *c;

			id = ancestor_of(sender, top + l);
			if (!id)
				return NULL;
			c = bpf_map_lookup_elem(&containers, &id);
			if (c)
				return c;
		}
		return NULL;
	}
	return NULL;
}

static __always_inline void count_host_side(struct container *c, __u64 bytes)
{
	struct counters *sum = total();

	if (c) {
		__sync_fetch_and_add(&c->counters.host_side.packets, 1);
		__sync_fetch_and_add(&c->counters.host_side.bytes, bytes);
	}
	if (sum) {
		__sync_fetch_and_add(&sum->host_side.packets, 1);
		__sync_fetch_and_add(&sum->host_side.bytes, bytes);
	}
}

/* Whether the packet is TCP without data that opens nothing. For a connection that it has
 * closed, a kernel makes such without the connection's socket.
 */
static __always_inline bool bare_tcp(const struct packet *p, const struct flow *f)
{
	__u8 doff;

	return f->proto == IPPROTO_TCP && f->has_ports && !f->syn &&
	       !load(p, f->transport + offsetof(struct tcp, doff), &doff, sizeof(doff)) &&
	       f->transport + (doff >> 4) * 4 == p->len;
}

/* Whether a blocked packet is one that the egress hook has let through, since its
 * container may reach the metadata service: as many of a flow pass as it has.
 */
static __always_inline bool take_permit(const struct packet *p, const struct flow *f, __u32 blocked)
{
	struct flow_key key = { .sport = f->sport, .dport = f->dport, .proto = f->proto };
	__s32 *n;

	if (blocked != RULE_METADATA)
		return false;
	__builtin_memcpy(key.src, &f->src, sizeof(key.src));
	__builtin_memcpy(key.dst, &f->dst, sizeof(key.dst));
	n = bpf_map_lookup_elem(&permitted, &key);
	if (!n)
		return false;
	if (*(volatile __s32 *)n <= 0)
		return bare_tcp(p, f);
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
	struct counters *sum;
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
	sum = total();
	if (taken && sum)
		__sync_fetch_and_add(&sum->smtp_allowed, 1);
	return taken;
}

/* Whether a packet of a mail connection may pass: a SYN that the egress hook has let
 * through, once each time it has, or one that takes a token here. Whoever has said
 * more than a SYN does not repeat it, unless to make another connection of it.
 */
static __always_inline bool admit_mail(const struct flow *f, __u32 index)
{
	struct mail_key key = { .sport = f->sport, .dport = f->dport };
	struct syn_key syn = { .seq = f->seq, .dport = f->dport };
	struct mail fresh = { .seq = f->seq };
	struct mail *known;

	if (exempt(f))
		return true;
	__builtin_memcpy(key.src, &f->src, sizeof(key.src));
	__builtin_memcpy(key.dst, &f->dst, sizeof(key.dst));
	known = bpf_map_lookup_elem(&mails, &key);
	if (!f->syn) {
		if (known && !known->answered)
			known->answered = 1;
		return true;
	}
	__builtin_memcpy(syn.dst, &f->dst, sizeof(syn.dst));
	if (bpf_map_delete_elem(&admitted, &syn) || (known && known->answered && known->seq == f->seq)) {
		if (!take_device_token(index))
			return false;
	}
	bpf_map_update_elem(&mails, &key, &fresh, BPF_ANY);
	return true;
}

/* Whether a packet that came in by a device may go where it wants to. */
static __always_inline bool may_pass(const struct packet *p, const struct flow *f, __u32 device)
{
	__u32 blocked;

	if (blocked_source(f))
		return false;
	blocked = blocked_destination(f);
	if (blocked && !take_permit(p, f, blocked))
		return false;
	return !(f->proto == IPPROTO_TCP && f->has_ports && smtp_ports[f->dport]) || admit_mail(f, device);
}

#define PROTO_IPIP 4
#define PROTO_IPV6 41
#define PROTO_GRE 47

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
};
struct inners {
	struct inner list[MAX_INNER];
	__u32 n;
	bool cut;	/* something is behind the end of the packet */
	bool deep;	/* there is more than is looked at */
};

static __always_inline void add_inner(struct inners *all, __u32 off, __be16 protocol)
{
	if (all->n >= MAX_INNER) {
		all->deep = true;
		return;
	}
	all->list[all->n & (MAX_INNER - 1)] = (struct inner){ off, protocol };
	all->n++;
}

/* What is called type, at off: behind VLAN tags, if that is what follows. */
static __always_inline void add_by_type(const struct packet *p, struct inners *all, __u32 off, __be16 type)
{
	for (int i = 0; i < MAX_TAGS && is_tag(type); i++) {
		if (load(p, off + 2, &type, sizeof(type))) {
			all->cut = true;
			return;
		}
		off += 4;
	}
	if (is_tag(type))
		all->deep = true;
	else if (type == bpf_htons(ETH_P_IP) || type == bpf_htons(ETH_P_IPV6))
		add_inner(all, off, type);
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
		add_inner(all, off, bpf_htons(ETH_P_IP));
		add_inner(all, off + 4, bpf_htons(ETH_P_IP));
		add_inner(all, off, bpf_htons(ETH_P_IPV6));
		add_inner(all, off + 4, bpf_htons(ETH_P_IPV6));
	} else {
		add_payload(p, all, off, h.type);
	}
}

/* What this host may find in the packet if one of its tunnels unpacks it. Which port
 * is which tunnel's is not known here; what reads as a tunnel's header counts.
 */
static __always_inline void add_tunnelled(const struct packet *p, __u8 proto, __u32 off, struct inners *all)
{
	struct {
		__u8 first;
		__u8 second;
		__be16 type;
		__be32 rest;
	} h;

	switch (proto) {
	case PROTO_IPIP:
		add_inner(all, off, bpf_htons(ETH_P_IP));
		return;
	case PROTO_IPV6:
		add_inner(all, off, bpf_htons(ETH_P_IPV6));
		return;
	case PROTO_GRE:
		add_gre(p, all, off);
		return;
	case IPPROTO_UDP:
		off += 8;
		if (load(p, off, &h, sizeof(h))) {
			all->cut = true;
			return;
		}
		if (h.first & 0x08)	/* VXLAN */
			add_frame(p, all, off + 8);
		if (!(h.first & 0xc0))	/* GENEVE */
			add_payload(p, all, off + 8 + (h.first & 0x3f) * 4, h.type);
		if (!(h.first & 0xe0)) {	/* GUE */
			__u32 at = off + 4 + (h.first & 0x1f) * 4;

			if (h.second == PROTO_IPIP)
				add_inner(all, at, bpf_htons(ETH_P_IP));
			if (h.second == PROTO_IPV6)
				add_inner(all, at, bpf_htons(ETH_P_IPV6));
			if (h.second == PROTO_GRE)
				add_gre(p, all, at);
		}
		if (h.first >> 4 == 4)	/* FOU */
			add_inner(all, off, bpf_htons(ETH_P_IP));
		if (h.first >> 4 == 6)
			add_inner(all, off, bpf_htons(ETH_P_IPV6));
		add_gre(p, all, off);
		return;
	}
}

static __always_inline bool address4(const struct packet *p, struct flow *f)
{
	struct iphdr ip;

	if (load(p, 0, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5 ||
	    bpf_ntohs(ip.tot_len) < ip.ihl * 4 || (!f->fragment && bpf_ntohs(ip.tot_len) > p->len))
		return false;
	map4(&f->src, ip.saddr);
	map4(&f->dst, ip.daddr);
	f->proto = ip.protocol;
	f->transport = ip.frag_off & bpf_htons(IP_OFFSET) ? 0 : ip.ihl * 4;
	return true;
}

static __always_inline bool address6(const struct packet *p, struct flow *f)
{
	struct ipv6hdr ip;

	if (load(p, 0, &ip, sizeof(ip)) || ip.version != 6 || (!f->fragment && bpf_ntohs(ip.payload_len) + sizeof(ip) > p->len))
		return false;
	__builtin_memcpy(&f->src, &ip.saddr, sizeof(f->src));
	__builtin_memcpy(&f->dst, &ip.daddr, sizeof(f->dst));
	f->proto = ip.nexthdr;
	f->transport = sizeof(ip);
	/* As a tunnel of this host's kernel puts it there (RFC 2473). */
	if (f->proto == EXT_DSTOPTS || f->proto == EXT_HOPOPTS) {
		__u8 ext[2];

		if (load(p, sizeof(ip), ext, sizeof(ext)))
			return false;
		f->proto = ext[0];
		f->transport += (ext[1] + 1) * 8;
	}
	return true;
}

/* The packet p as a flow; false if it is none. That of a fragment may be longer than what
 * is there. Read less closely than packets that are judged for themselves: only what a
 * tunnel of this host takes for a packet matters.
 */
static __always_inline bool read_inside(const struct packet *p, struct flow *f)
{
	__be16 ports[2];
	__u8 flags = 0;

	if (p->protocol == bpf_htons(ETH_P_IP) ? !address4(p, f) : p->protocol != bpf_htons(ETH_P_IPV6) || !address6(p, f))
		return false;
	if (!f->transport || !carries_ports(f->proto) || load(p, f->transport, ports, sizeof(ports)))
		return true;
	f->sport = ports[0];
	f->dport = ports[1];
	f->has_ports = true;
	/* Without its flags, it may be one. */
	f->syn = f->proto == IPPROTO_TCP &&
		 (load(p, f->transport + offsetof(struct tcp, flags), &flags, 1) || syn_without_ack(flags));
	return true;
}

/* Whether what a tunnel of this host would unpack may go where it wants to. */
static __always_inline bool may_pass_inside(const struct flow *f, __u32 device)
{
	if (blocked_destination(f) || blocked_source(f))
		return false;
	return !f->syn || !smtp_ports[f->dport] || exempt(f) || take_device_token(device);
}

#endif
