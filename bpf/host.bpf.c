//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The host side: judges packets from a container's bridge again, by whatever way they left
 * the container. It runs before connection tracking and before every rule of iptables and
 * nftables.
 */
#define PACKET_IS_DYNPTR
#define RULES_LINKAGE __noinline

#include <linux/types.h>

#include <bpf/bpf_core_read.h>

#include "glance.h"
#include "host.h"

#define NF_DROP 0
#define NF_ACCEPT 1
#define NFPROTO_IPV4 2
#define IFNAMSIZ 16

#define TCP_TIME_WAIT 6
#define TCP_NEW_SYN_RECV 12

/* Names of devices that the policy adds to those of Docker's bridges. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct device_name);
	__type(value, __u32);
} device_names SEC(".maps");
const volatile bool has_device_names;
const volatile bool first_of_names[256];	/* by the first byte of such a name; of all, if one is empty */

struct list_head {
	struct list_head *next;
} __attribute__((preserve_access_index));

struct net_device {
	char name[IFNAMSIZ];
	int ifindex;
	struct {
		struct list_head upper;	/* a bridge comes first */
		struct list_head lower;
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

struct kernfs_node {
	__u64 id;
} __attribute__((preserve_access_index));

struct cgroup {
	struct kernfs_node *kn;
	int level;
	struct cgroup *ancestors[];
} __attribute__((preserve_access_index));

struct sock_cgroup_data {
	struct cgroup *cgroup;	/* comes first */
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
	unsigned int data_len;	/* of the part that is not linear */
	struct sock *sk;
	unsigned char *data;
	unsigned char *head;
	unsigned int end;
} __attribute__((preserve_access_index));

struct skb_shared_info {
	unsigned short gso_size;
} __attribute__((preserve_access_index));

struct bpf_nf_ctx {
	const struct nf_hook_state *state;
	struct sk_buff *skb;
};

extern void *bpf_rdonly_cast(const void *at, __u32 type) __ksym;
extern int bpf_dynptr_from_skb(struct __sk_buff *skb, __u64 flags, struct bpf_dynptr *data) __ksym;

/* A type of the kernel (uapi/linux/if_link.h) of which only this matters: it consists of
 * words of 64 bits.
 */
struct rtnl_link_stats64 {
	__u64 words[1];
};

/* Memory of the kernel as words, to be read by plain loads. Where there is no memory, these
 * load 0. Each such load costs as much as ten other instructions.
 */
static __always_inline const __u64 *words_at(const void *at)
{
	return bpf_rdonly_cast(at, bpf_core_type_id_kernel(struct rtnl_link_stats64));
}

/* One such load: without this, the compiler makes several of it. */
static __always_inline __u64 load_word(const __u64 *at)
{
	__u64 word = *at;

	asm volatile("" : "+r"(word));
	return word;
}

union device_key {
	char name[IFNAMSIZ];
	__u64 word[2];
};

static const union device_key docker0 = { .name = "docker0" }, swarm = { .name = "docker_gwbridge" };

/* Whether a device whose name begins with this word could lead to containers. */
static __always_inline bool could_lead(__u64 word)
{
	const union device_key prefix = { .name = "br-" }, first3 = { .name = "\xff\xff\xff" };

	return word == swarm.word[0] || (word & first3.word[0]) == prefix.word[0] ||
	       (has_device_names && first_of_names[(__u8)word]);
}

/* Docker names the bridge of a network br- and 12 hexadecimal digits. Other devices whose
 * names begin with br- may lead out of the host.
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

static __always_inline bool leads_to_containers(const struct net_device *in)
{
	const __u64 *words = words_at(in->name);
	const union device_key k = { .word = { words[0], words[1] } };
	struct device_name name;

	if (k.word[0] == docker0.word[0] || (k.word[0] == swarm.word[0] && k.word[1] == swarm.word[1]) || docker_network(&k))
		return true;
	if (!has_device_names)
		return false;
	name.len = 8 * IFNAMSIZ;
	__builtin_memcpy(name.name, k.name, sizeof(name.name));
	return bpf_map_lookup_elem(&device_names, &name);
}

static __always_inline bool adjacent_leads(const struct list_head *at)
{
	const void *link = (const void *)at - bpf_core_field_offset(struct netdev_adjacent, list);
	const struct netdev_adjacent *a = bpf_rdonly_cast(link, bpf_core_type_id_kernel(struct netdev_adjacent));

	return leads_to_containers(a->dev);
}

/* Whether no device is above this one or below it. */
static __always_inline bool alone(const struct net_device *in)
{
	return in->adj_list.upper.next == &in->adj_list.upper && in->adj_list.lower.next == &in->adj_list.lower;
}

/* Whether the packets of a device come from containers. A bridge passes frames for the
 * groups of IEEE 802.1D (01:80:c2:00:00:0x) up as received by its port, whatever they
 * contain. It passes to a device above it (of a VLAN, or with an address of its own) what
 * is for that device.
 *
 * This function and some below are global for the verifier's sake: it checks a global
 * function once, not again on every path that leads there.
 */
__noinline int from_containers(struct bpf_nf_ctx *ctx)
{
	struct net_device *in = ctx->state->in;
	struct list_head *upper, *lower;

	if (!in)
		return false;
	if (leads_to_containers(in))
		return true;
	upper = in->adj_list.upper.next;
	lower = in->adj_list.lower.next;
	return (upper != &in->adj_list.upper && adjacent_leads(upper)) ||
	       (lower != &in->adj_list.lower && adjacent_leads(lower));
}

/* The same, without a call for most devices: docker0, and those that have another name and
 * no device above or below them.
 */
static __always_inline bool leads_here(struct bpf_nf_ctx *ctx, const struct net_device *in)
{
	__u64 name = *words_at(in->name);

	return name == docker0.word[0] || ((could_lead(name) || !alone(in)) && from_containers(ctx));
}

/* The id of the ancestor of a cgroup at a level, or its own at its own level; 0 if it is not
 * that deep.
 */
static __always_inline __u64 above(void *cgrp, __u32 level)
{
	const __u64 *ancestor, *node;

	if (level > (__u32)*words_at(cgrp + bpf_core_field_offset(struct cgroup, level)))
		return 0;
	ancestor = words_at(cgrp + bpf_core_field_offset(struct cgroup, ancestors) + level * sizeof(*ancestor));
	node = words_at((void *)*ancestor + bpf_core_field_offset(struct cgroup, kn));
	return *words_at((void *)*node + bpf_core_field_offset(struct kernfs_node, id));
}

/* The container whose socket sent the packet, if the socket is still known. It is while a
 * bridge itself hands the packet to netfilter (br_netfilter).
 */
static __always_inline __u64 sender(struct sk_buff *skb, struct container **c)
{
	struct sock *sk = skb->sk;
	int state;

	*c = NULL;
	if (!sk)
		return 0;
	state = sk->__sk_common.skc_state;
	if (state == TCP_TIME_WAIT || state == TCP_NEW_SYN_RECV)
		return 0;
	return container_of_sender(above, (void *)*words_at(&sk->sk_cgrp_data), c);
}

static __always_inline __be16 protocol(struct bpf_nf_ctx *ctx)
{
	return ctx->state->pf == NFPROTO_IPV4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
}

static __always_inline bool open_packet(struct bpf_nf_ctx *ctx, struct bpf_dynptr *data, struct packet *p)
{
	p->data = data;
	p->len = ctx->skb->len;
	p->protocol = protocol(ctx);
	return !bpf_dynptr_from_skb((struct __sk_buff *)ctx->skb, 0, data);
}

/* The size of the segments that the packet will be split into; 0 if it
 * will not be split.
 */
static __always_inline __u32 segment_size(struct sk_buff *skb)
{
	const struct skb_shared_info *shared =
		bpf_rdonly_cast(skb->head + skb->end, bpf_core_type_id_kernel(struct skb_shared_info));

	return shared->gso_size;
}

/* Reads the packet at a place within the one of ctx as a flow; 0 if it cannot be judged. */
__noinline int parse_at(struct bpf_nf_ctx *ctx, const struct packet *at, struct flow *f)
{
	struct bpf_dynptr data;
	struct packet p;

	if (!at || !f || bpf_dynptr_from_skb((struct __sk_buff *)ctx->skb, 0, &data))
		return 0;
	p = *at;
	p.data = &data;
	return parse(&p, f);
}

/* Reads the packet as a flow; false if it cannot be judged. */
static __always_inline bool read_flow(struct bpf_nf_ctx *ctx, struct flow *f)
{
	struct packet p = { .len = ctx->skb->len, .protocol = protocol(ctx) };

	return parse_at(ctx, &p, f);
}

__noinline int refuse_packet(struct bpf_nf_ctx *ctx, __u32 reason)
{
	struct net_device *in = ctx->state->in;
	__u32 len = ctx->skb->len;
	struct container *c;
	struct flow f = {};
	__u64 id;

	id = sender(ctx->skb, &c);
	if (refuse(c, HOOK_HOST, reason, len)) {
		read_flow(ctx, &f);
		tell_of_host(id, reason, &f, len, in ? in->ifindex : 0);
	}
	return enforce;
}

static __always_inline int drop(struct bpf_nf_ctx *ctx, enum reason reason)
{
	int refused = refuse_packet(ctx, reason);

	/* The compiler knows which values the function returns; the verifier does not. */
	asm volatile("" : "+r"(refused));
	return refused ? NF_DROP : NF_ACCEPT;
}

/* Reads the packet at in->off within the one of ctx, or within the part that ends at end,
 * if end is not 0. This function and the next are global for the verifier's sake, like
 * those above.
 */
__noinline int look_inside(struct bpf_nf_ctx *ctx, const struct inner *in, __u32 end, __u32 fragment, struct flow *f)
{
	struct bpf_dynptr data;
	struct packet p = {};
	enum inside found;

	if (!in || !f || !open_packet(ctx, &data, &p))
		return NOTHING;
	if (end && end < p.len)
		p.len = end;
	if (in->off > p.len)
		return fragment ? UNREADABLE : NOTHING;
	p.base = in->off;
	p.len -= in->off;
	p.protocol = in->protocol;
	found = trim(&p, fragment);
	p.data = NULL;
	if (found != A_FLOW || parse_at(ctx, &p, f))
		return found;
	return in->guessed ? NOTHING : UNREADABLE;
}

__noinline int judge_inside(const struct flow *f, __u32 guessed)
{
	return f ? judge_as_unpacked(f, guessed) : REASON_MALFORMED;
}

/* Why a packet may not pass because of the packet that it carries. The flow of the carried
 * packet overwrites f.
 */
__noinline int judge_carried(struct bpf_nf_ctx *ctx, struct flow *f)
{
	struct bpf_dynptr data;
	struct packet p = {};
	struct inner in;

	if (!f || !open_packet(ctx, &data, &p))
		return REASON_MALFORMED;
	in = carried(&p, f);
	if (!in.protocol || look_inside(ctx, &in, 0, f->fragment, f) != A_FLOW)
		return REASON_NONE;
	return judge_as_carried(f);
}

__noinline int judge_flow(const struct flow *f, __u32 segments, __u32 device)
{
	return f ? judge_forwarded(f, segments, device) : REASON_MALFORMED;
}

/* Why a packet that came in by a device may not be forwarded. */
static __always_inline enum reason judge(struct bpf_nf_ctx *ctx, __u32 device)
{
	enum reason reason;
	struct flow f = {};

	if (!read_flow(ctx, &f))
		return REASON_MALFORMED;
	reason = judge_flow(&f, segment_size(ctx->skb), device);
	if (reason == REASON_NONE && carries(&f))
		reason = judge_carried(ctx, &f);
	return reason;
}

/* The headers of a packet, as far as a glance looks at them. */
union headers {
	__u64 words[8];
	__u8 bytes[64];
};

/* Whether the packet passes at a glance, as most do. The headers of most packets are in the
 * linear part, which begins with them at this hook.
 */
static __always_inline bool plain(struct bpf_nf_ctx *ctx)
{
	const __u32 size4 = sizeof(struct iphdr) + sizeof(struct tcp), size6 = sizeof(struct ipv6hdr) + sizeof(struct tcp);
	struct sk_buff *skb = ctx->skb;
	const __u64 *words = words_at(skb->data);
	__u32 len = skb->len, linear = len - skb->data_len;
	union headers h;

	if (ctx->state->pf == NFPROTO_IPV4) {
		if (linear < size4)
			return false;
		h.words[0] = load_word(&words[0]);
		h.words[1] = load_word(&words[1]);
		h.words[2] = load_word(&words[2]);
		return glance4(h.bytes, h.bytes + size4, len) <= DATAGRAM;
	}
	if (linear < size6)
		return false;
	h.words[0] = load_word(&words[0]);
	h.words[1] = load_word(&words[1]);
	h.words[3] = load_word(&words[3]);
	h.words[5] = load_word(&words[5]);
	return glance6(h.bytes, h.bytes + size6, len) <= DATAGRAM;
}

/* The verdict on a packet that came in by a device and does not pass at a glance. */
__noinline int judge_unclear(struct bpf_nf_ctx *ctx, __u32 device)
{
	enum reason reason = judge(ctx, device);

	return reason == REASON_NONE ? NF_ACCEPT : drop(ctx, reason);
}

/* NF_INET_PRE_ROUTING. Short, since it runs for every packet that the host receives. */
SEC("netfilter")
int host_forward(struct bpf_nf_ctx *ctx)
{
	struct net_device *in = ctx->state->in;
	int verdict;

	if (!in || !leads_here(ctx, in) || plain(ctx))
		return NF_ACCEPT;
	verdict = judge_unclear(ctx, in->ifindex);
	asm volatile("" : "+r"(verdict));
	return verdict ? NF_ACCEPT : NF_DROP;
}

/* Adds to all what the datagram whose data is at off may contain. */
__noinline int unpack(struct bpf_nf_ctx *ctx, __u32 off, struct inners *all)
{
	struct bpf_dynptr data;
	struct packet p = {};

	if (all && open_packet(ctx, &data, &p))
		add_datagram(&p, off, all);
	return 0;
}

/* Why a datagram whose data is at off and ends at end may not pass, because of what the
 * host would unpack from it. If end is 0, the datagram goes to the end of the packet.
 */
__noinline int judge_datagram(struct bpf_nf_ctx *ctx, __u32 off, __u32 end, __u32 fragment)
{
	struct inners all = {};
	enum reason reason;

	unpack(ctx, off, &all);
	for (__u32 i = 0; i < MAX_INNER && i < all.n; i++) {
		struct inner in = all.list[i];
		struct flow f = {};

		switch (look_inside(ctx, &in, end, fragment, &f)) {
		case UNREADABLE:
			return REASON_MALFORMED;
		case A_FLOW:
			reason = judge_inside(&f, in.guessed);
			if (reason != REASON_NONE)
				return reason;
			if (is_datagram(&f))
				unpack(ctx, in.off + f.transport + UDP_HEADER, &all);
		}
	}
	return all.deep || (all.cut && fragment) ? REASON_MALFORMED : REASON_NONE;
}

/* NF_INET_LOCAL_IN: packets to the host itself, which may unpack others from them. IPv6
 * fragments are not reassembled yet. If the first one is dropped here, the packet is never
 * reassembled.
 */
SEC("netfilter")
int host_deliver(struct bpf_nf_ctx *ctx)
{
	struct net_device *in = ctx->state->in;
	enum reason reason;
	struct flow f = {};
	__u32 off, size;

	if (!in || !leads_here(ctx, in))
		return NF_ACCEPT;
	if (!read_flow(ctx, &f))
		return drop(ctx, REASON_MALFORMED);
	if (for_tunnel(&f))
		return drop(ctx, REASON_BLOCKED);
	if (!is_datagram(&f))
		return NF_ACCEPT;
	size = segment_size(ctx->skb);
	off = f.transport + UDP_HEADER;
	for (int i = 0; i < MAX_SEGMENTS; i++) {
		reason = judge_datagram(ctx, off, size ? off + size : 0, f.fragment);
		if (reason != REASON_NONE)
			return drop(ctx, reason);
		off += size;
		if (!size || off >= ctx->skb->len)
			return NF_ACCEPT;
	}
	return drop(ctx, REASON_MALFORMED);
}

#define PROTO_ICMPV6 58
#define ICMPV6_INFO 128	/* types below are errors (RFC 4443) */

/* NF_INET_LOCAL_OUT, IPv6: the host may find an error before NF_INET_PRE_ROUTING, in a
 * packet whose forged source is the metadata service. The host must not report the error
 * there, since the report contains much of the packet.
 */
SEC("netfilter")
int host_answer(struct bpf_nf_ctx *ctx)
{
	struct bpf_dynptr data;
	struct packet p = {};
	struct ipv6hdr ip;
	union address to;
	__u8 type;

	if (!open_packet(ctx, &data, &p) || load(&p, 0, &ip, sizeof(ip)) || ip.nexthdr != PROTO_ICMPV6 ||
	    load(&p, sizeof(ip), &type, sizeof(type)) || type >= ICMPV6_INFO)
		return NF_ACCEPT;
	__builtin_memcpy(&to, &ip.daddr, sizeof(to));
	/* Judged like the source of the packet that had the error. */
	if (suspect(&to) && rule_flags(&to, (struct service){ .proto = PROTO_ICMPV6 }) & RULE_BLOCK_SOURCE)
		return drop(ctx, REASON_BLOCKED);
	return NF_ACCEPT;
}

char _license[] SEC("license") = "Dual BSD/GPL";
