//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The second judge, on the host: whatever comes from a container's bridge meets it,
 * by whatever road it left the container. It runs before connection tracking and
 * before every rule of iptables and nftables.
 */
#define PACKET_IS_DYNPTR

#include "cgroup.h"
#include "limit.h"
#include "packet.h"
#include "parse.h"
#include "rules.h"
#include "state.h"

#include <stddef.h>

#define NF_DROP 0
#define NF_ACCEPT 1
#define NFPROTO_IPV4 2
#define IFNAMSIZ 16

#define PROTO_IPIP 4
#define PROTO_IPV6 41
#define PROTO_GRE 47

#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#define ETH_P_TEB 0x6558	/* Ethernet, within GRE or GENEVE */

#define TCP_TIME_WAIT 6
#define TCP_NEW_SYN_RECV 12

/* Names that the policy adds to those of Docker's bridges. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct device_name);
	__type(value, __u32);
} device_names SEC(".maps");
const volatile bool has_device_names;

#define MAX_PLACES 8
const volatile struct place places[MAX_PLACES];

struct list_head {
	struct list_head *next;
} __attribute__((preserve_access_index));

struct net_device {
	char name[IFNAMSIZ];
	int ifindex;
	struct {
		struct list_head upper;	/* a bridge comes first */
	} adj_list;
} __attribute__((preserve_access_index));

struct netdev_adjacent {
	struct net_device *dev;
	struct list_head list;
} __attribute__((preserve_access_index));

struct nf_hook_state {
	__u8 pf;
	struct net_device *in;
} __attribute__((preserve_access_index));

struct sock_cgroup_data {
	struct cgroup *cgroup;
} __attribute__((preserve_access_index));

struct sock_common {
	volatile unsigned char skc_state;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_common __sk_common;
	struct sock_cgroup_data sk_cgrp_data;
} __attribute__((preserve_access_index));

struct sk_buff {
	unsigned int len;
	struct sock *sk;
} __attribute__((preserve_access_index));

struct bpf_nf_ctx {
	const struct nf_hook_state *state;
	struct sk_buff *skb;
};

extern int bpf_dynptr_from_skb(struct __sk_buff *skb, __u64 flags, struct bpf_dynptr *data) __ksym;

union device_key {
	char name[IFNAMSIZ];
	__u64 word[2];
};

/* Docker names the bridge of a network br- and 12 hexadecimal digits. What else
 * begins like this may well lead out of the host.
 */
static __always_inline bool docker_network(const union device_key *k)
{
	if (k->name[0] != 'b' || k->name[1] != 'r' || k->name[2] != '-' || k->name[15])
		return false;
	for (int i = 3; i < 15; i++) {
		char c = k->name[i];

		if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f')))
			return false;
	}
	return true;
}

static __always_inline bool leads_to_containers(struct net_device *in)
{
	const union device_key docker0 = { .name = "docker0" }, swarm = { .name = "docker_gwbridge" };
	union device_key k;
	struct device_name name;

	if (bpf_probe_read_kernel(k.name, sizeof(k.name), in->name))
		return false;
	if (k.word[0] == docker0.word[0] || (k.word[0] == swarm.word[0] && k.word[1] == swarm.word[1]))
		return true;
	if (docker_network(&k))
		return true;
	if (!has_device_names)
		return false;
	name.len = 8 * IFNAMSIZ;
	__builtin_memcpy(name.name, k.name, sizeof(name.name));
	return bpf_map_lookup_elem(&device_names, &name);
}

/* Whether what the device receives comes from containers. A bridge hands up frames to
 * the groups of IEEE 802.1D (01:80:c2:00:00:0x) as what its port has received,
 * whatever is in them.
 */
static __always_inline bool from_containers(struct net_device *in)
{
	struct list_head *first = in->adj_list.upper.next;
	struct netdev_adjacent *upper;

	if (leads_to_containers(in))
		return true;
	if (first == &in->adj_list.upper)
		return false;
	upper = (void *)first - bpf_core_field_offset(struct netdev_adjacent, list);
	return leads_to_containers(BPF_CORE_READ(upper, dev));
}

/* The container that a cgroup is or is within; NULL if there is none, or no room for its
 * state.
 */
static __always_inline struct container *container_of_cgroup(struct cgroup *cgrp)
{
	for (int i = 0; i < MAX_PLACES && places[i].id; i++) {
		__u32 top = places[i].level;
		__u64 id;

		if (ancestor_id(cgrp, top) != places[i].id)
			continue;
		if (!places[i].recognises) {
			id = ancestor_id(cgrp, top + 1);
			return id ? state_of(id) : NULL;
		}
		for (__u32 l = 1; l <= MAX_DEPTH; l++) {
			struct container *c;

			id = ancestor_id(cgrp, top + l);
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

/* The container whose socket sent the packet, if that is still known: it is while a
 * bridge hands the packet to netfilter itself (br_netfilter). NULL if not.
 */
static __always_inline struct container *sender(struct sk_buff *skb)
{
	struct sock *sk = skb->sk;
	int state;

	if (!sk)
		return NULL;
	state = sk->__sk_common.skc_state;
	if (state == TCP_TIME_WAIT || state == TCP_NEW_SYN_RECV)
		return NULL;
	return container_of_cgroup(sk->sk_cgrp_data.cgroup);
}

static __always_inline int drop(struct sk_buff *skb, __u64 bytes)
{
	struct counters *sum = total();
	struct container *c = sender(skb);

	if (c) {
		__sync_fetch_and_add(&c->counters.host_side.packets, 1);
		__sync_fetch_and_add(&c->counters.host_side.bytes, bytes);
	}
	if (sum) {
		__sync_fetch_and_add(&sum->host_side.packets, 1);
		__sync_fetch_and_add(&sum->host_side.bytes, bytes);
	}
	return enforce ? NF_DROP : NF_ACCEPT;
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
	if (*n <= 0)
		return bare_tcp(p, f);
	if (__sync_fetch_and_sub(n, 1) > 0)
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

static __always_inline bool open_packet(struct bpf_nf_ctx *ctx, struct bpf_dynptr *data, struct packet *p)
{
	p->data = data;
	p->len = ctx->skb->len;
	p->protocol = ctx->state->pf == NFPROTO_IPV4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	return !bpf_dynptr_from_skb((struct __sk_buff *)ctx->skb, 0, data);
}

static __noinline int judge_forwarded(struct bpf_nf_ctx *ctx)
{
	struct bpf_dynptr data;
	struct packet p = {};
	struct flow f = {};
	__u32 len = ctx->skb->len, blocked;

	if (!open_packet(ctx, &data, &p) || !parse(&p, &f) || blocked_source(&f))
		return drop(ctx->skb, len);
	blocked = blocked_destination(&f);
	if (blocked && !take_permit(&p, &f, blocked))
		return drop(ctx->skb, len);
	if (f.proto == IPPROTO_TCP && f.has_ports && smtp_ports[f.dport] && !admit_mail(&f, ctx->state->in->ifindex))
		return drop(ctx->skb, len);
	return NF_ACCEPT;
}

/* NF_INET_PRE_ROUTING */
SEC("netfilter")
int host_forward(struct bpf_nf_ctx *ctx)
{
	struct net_device *in = ctx->state->in;

	if (!in || !from_containers(in))
		return NF_ACCEPT;
	return judge_forwarded(ctx);
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
};

static __always_inline void add_inner(struct inners *all, __u32 off, __be16 protocol)
{
	if (all->n >= MAX_INNER)
		return;
	all->list[all->n & (MAX_INNER - 1)] = (struct inner){ off, protocol };
	all->n++;
}

/* An Ethernet frame at off. */
static __always_inline void add_frame(const struct packet *p, struct inners *all, __u32 off)
{
	__be16 type = 0;

	off += 12;
	for (int i = 0; i < 3; i++) {
		if (load(p, off, &type, sizeof(type)))
			return;
		if (type != bpf_htons(ETH_P_8021Q) && type != bpf_htons(ETH_P_8021AD))
			break;
		off += 4;
	}
	add_inner(all, off + 2, type);
}

static __always_inline void add_by_type(const struct packet *p, struct inners *all, __u32 off, __be16 type)
{
	if (type == bpf_htons(ETH_P_TEB))
		add_frame(p, all, off);
	else
		add_inner(all, off, type);
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
		if (load(p, off, &h, 4) || h.second & 7)
			return;
		off += 4;
		for (int bit = 0x80; bit >= 0x10; bit >>= 1)	/* checksum, (routing), key, sequence */
			if (h.first & bit)
				off += 4;
		add_by_type(p, all, off, h.type);
		return;
	case IPPROTO_UDP:
		off += 8;
		if (load(p, off, &h, sizeof(h)))
			return;
		if (h.first & 0x08)	/* VXLAN */
			add_frame(p, all, off + 8);
		if (!(h.first & 0xc0))	/* GENEVE */
			add_by_type(p, all, off + 8 + (h.first & 0x3f) * 4, h.type);
		if (!(h.first & 0xe0) && h.second == PROTO_IPIP)	/* GUE */
			add_inner(all, off + 4 + (h.first & 0x1f) * 4, bpf_htons(ETH_P_IP));
		if (!(h.first & 0xe0) && h.second == PROTO_IPV6)
			add_inner(all, off + 4 + (h.first & 0x1f) * 4, bpf_htons(ETH_P_IPV6));
		if (h.first >> 4 == 4)	/* FOU */
			add_inner(all, off, bpf_htons(ETH_P_IP));
		if (h.first >> 4 == 6)
			add_inner(all, off, bpf_htons(ETH_P_IPV6));
		return;
	}
}

static __always_inline bool address4(const struct packet *p, struct flow *f)
{
	struct iphdr ip;

	if (load(p, 0, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5 || bpf_ntohs(ip.tot_len) > p->len)
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

	if (load(p, 0, &ip, sizeof(ip)) || ip.version != 6 || bpf_ntohs(ip.payload_len) + sizeof(ip) > p->len)
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

#define INSIDE_BLOCKED 1
#define INSIDE_MAIL 2

/* The packet at off within that of ctx: INSIDE_BLOCKED, if it goes where containers
 * may not, INSIDE_MAIL, if it opens a mail connection, else where its transport header
 * is, behind its protocol; 0 if it has none.
 * Read less closely than packets that are judged for themselves: only what a tunnel
 * of this host takes for a packet matters. This and the next are functions of their
 * own for the verifier's sake, which would else follow each path of the one with each
 * of the other.
 */
__noinline __u64 look_inside(struct bpf_nf_ctx *ctx, __u32 off, __u32 protocol)
{
	struct bpf_dynptr data;
	struct packet p = {};
	struct flow f = {};
	__be16 ports[2];
	__u8 flags = 0;

	if (!open_packet(ctx, &data, &p))
		return INSIDE_BLOCKED;
	if (off) {
		if (off > p.len)
			return 0;
		p.base = off;
		p.len -= off;
		p.protocol = protocol;
	}
	if (p.protocol == bpf_htons(ETH_P_IP) ? !address4(&p, &f) : p.protocol != bpf_htons(ETH_P_IPV6) || !address6(&p, &f))
		return 0;
	if (f.transport && carries_ports(f.proto) && !load(&p, f.transport, ports, sizeof(ports))) {
		f.sport = ports[0];
		f.dport = ports[1];
		f.has_ports = true;
	}
	if (off && (blocked_destination(&f) || blocked_source(&f)))
		return INSIDE_BLOCKED;
	if (off && f.proto == IPPROTO_TCP && f.has_ports && smtp_ports[f.dport] && !exempt(&f) &&
	    !load(&p, f.transport + offsetof(struct tcp, flags), &flags, 1) && syn_without_ack(flags))
		return INSIDE_MAIL;
	return f.transport ? (__u64)(off + f.transport) << 8 | f.proto : 0;
}

/* Notes what is behind a transport header that look_inside has found. */
__noinline int unpack(struct bpf_nf_ctx *ctx, __u64 transport, struct inners *all)
{
	struct bpf_dynptr data;
	struct packet p = {};

	if (!all || !open_packet(ctx, &data, &p))
		return 0;
	add_tunnelled(&p, transport, transport >> 8, all);
	return 0;
}

/* NF_INET_LOCAL_IN: for packets to the host itself, which may unpack others from them. */
SEC("netfilter")
int host_deliver(struct bpf_nf_ctx *ctx)
{
	struct inners all = { .n = 1 };
	struct net_device *in = ctx->state->in;

	if (!in || !from_containers(in))
		return NF_ACCEPT;
	/* The packet itself is the first: it has been judged where it came in. */
	for (__u32 i = 0; i < MAX_INNER && i < all.n; i++) {
		__u64 transport = look_inside(ctx, all.list[i].off, all.list[i].protocol);

		if (transport == INSIDE_BLOCKED ||
		    (transport == INSIDE_MAIL && !take_device_token(in->ifindex)))
			return drop(ctx->skb, ctx->skb->len);
		if (transport > INSIDE_MAIL)
			unpack(ctx, transport, &all);
	}
	return NF_ACCEPT;
}

char _license[] SEC("license") = "Dual BSD/GPL";
