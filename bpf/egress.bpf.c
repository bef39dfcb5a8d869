//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Decides what containers may send. The packet hook is the boundary; the socket
 * hooks give its verdict early, so that a program is refused at once instead of
 * waiting for an answer that will not come.
 */
#include "glance.h"
#include "limit.h"
#include "owner.h"
#include "parse.h"
#include "rules.h"

const volatile bool over_limit_reject;	/* refuse in connect() what has no token */
const volatile bool has_set_retval;	/* bpf_set_retval(), 5.18 */
const volatile bool has_host_side;	/* which wants to know what was let through */

#define LOOPBACK_IFINDEX 1
#define SOCK_STREAM 1
#define SOCK_RAW 3
#define ECONNREFUSED 111

static __noinline void count_connect(struct container *c, enum reason reason)
{
	struct counters *sum = total();

	if (c)
		__sync_fetch_and_add(&c->counters.dropped[reason].connects, 1);
	if (sum)
		__sync_fetch_and_add(&sum->dropped[reason].connects, 1);
}

static __always_inline __u64 above_packet(void *skb, __u32 level)
{
	return bpf_skb_ancestor_cgroup_id(skb, level);
}

/* The container whose socket it is, however deep below it the socket was made. */
static __always_inline bool sent_by_container(struct __sk_buff *skb, struct container **c)
{
	return find_container(above_packet, skb, c);
}

/* Takes a token for a SYN, unless a TCP socket repeats one that it has paid for:
 * same connection, same sequence number, and the kernel says that it is a
 * retransmission. A raw socket has no such proof and pays for every SYN.
 */
static __always_inline bool admit_syn(struct __sk_buff *skb, const struct flow *f, struct container *c)
{
	struct bpf_sock *sk = skb->sk;
	struct bpf_tcp_sock *tcp = NULL;
	struct ticket *ticket = NULL;

	if (sk)
		tcp = bpf_tcp_sock(sk);
	if (tcp) {
		sk = bpf_sk_fullsock(sk);
		/* Older kernels take raw sockets of protocol TCP for one. */
		if (!sk || sk->type != SOCK_STREAM)
			tcp = NULL;
		else
			ticket = bpf_sk_storage_get(&tickets, sk, NULL, 0);
	}
	if (ticket && ticket->seq == f->seq && ticket->sport == f->sport && ticket->dport == f->dport &&
	    !__builtin_memcmp(ticket->dst, &f->dst, sizeof(ticket->dst)) &&
	    tcp->total_retrans > ticket->retransmits) {
		ticket->retransmits = tcp->total_retrans;
		return true;
	}
	if (!take_token(c)) {
		/* What follows on this socket repeats a SYN that was refused. */
		if (ticket)
			bpf_sk_storage_delete(&tickets, sk);
		return false;
	}
	count_allowed(c);
	if (tcp)
		ticket = bpf_sk_storage_get(&tickets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (tcp && ticket) {
		__builtin_memcpy(ticket->dst, &f->dst, sizeof(ticket->dst));
		ticket->seq = f->seq;
		ticket->sport = f->sport;
		ticket->dport = f->dport;
		ticket->retransmits = tcp->total_retrans;
	}
	return true;
}

/* Tells the host side that the packet has been judged. */
static __always_inline void announce(const struct flow *f)
{
	struct syn_key key = { .seq = f->seq, .dport = f->dport };
	const __u32 one = 1;

	if (!has_host_side)
		return;
	__builtin_memcpy(key.dst, &f->dst, sizeof(key.dst));
	bpf_map_update_elem(&admitted, &key, &one, BPF_ANY);
}

/* Whether a blocked destination is open to this container. */
static __always_inline bool permits(const struct container *c, __u32 blocked)
{
	return c && c->flags & CONTAINER_METADATA && blocked == RULE_METADATA;
}

/* Tells the host side that one more packet of the flow may pass. */
static __always_inline void announce_permitted(const struct flow *f)
{
	struct flow_key key = { .sport = f->sport, .dport = f->dport, .proto = f->proto };
	const __u32 none = 0;
	__u32 *n;

	if (!has_host_side)
		return;
	__builtin_memcpy(key.src, &f->src, sizeof(key.src));
	__builtin_memcpy(key.dst, &f->dst, sizeof(key.dst));
	n = bpf_map_lookup_elem(&permitted, &key);
	if (!n) {
		bpf_map_update_elem(&permitted, &key, &none, BPF_NOEXIST);
		n = bpf_map_lookup_elem(&permitted, &key);
	}
	if (n)
		__sync_fetch_and_add(n, 1);
}

static __always_inline int drop(struct __sk_buff *skb, struct container *c, enum reason reason)
{
	count_drop(c, reason, skb->len);
	return !enforce;
}

/* The verdict on a SYN to a mail port, whose destination is not blocked. */
static __always_inline int judge_mail_syn(struct __sk_buff *skb, const struct flow *f)
{
	struct container *c;

	if (skb->ifindex == LOOPBACK_IFINDEX || exempt(f) || !sent_by_container(skb, &c))
		return 1;
	if (!c || !admit_syn(skb, f, c)) {
		if (!enforce)
			announce(f);
		return drop(skb, c, c ? REASON_RATE_LIMITED : REASON_NO_BUCKET);
	}
	announce(f);
	return 1;
}

/* TCP to a mail port that opens no connection belongs to one that was let through,
 * unless a raw socket sends it. That could answer for a connection whose SYN a
 * deaf TCP socket repeats for free, and so make many of one token.
 */
static __always_inline int judge_mail_data(struct __sk_buff *skb, const struct flow *f)
{
	struct bpf_sock *sk = skb->sk;
	struct container *c;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (!sk || sk->type != SOCK_RAW || skb->ifindex == LOOPBACK_IFINDEX || exempt(f) ||
	    !sent_by_container(skb, &c))
		return 1;
	return drop(skb, c, REASON_RATE_LIMITED);
}

static __always_inline int judge_mail(struct __sk_buff *skb, const struct flow *f)
{
	return f->syn ? judge_mail_syn(skb, f) : judge_mail_data(skb, f);
}

/* Out of line: the verdict on any packet. */
static __noinline int judge(struct __sk_buff *skb)
{
	struct container *c;
	__u32 blocked;
	bool forged;
	struct flow f = {};
	struct packet p = { .data = skb, .len = skb->len, .protocol = skb->protocol };

	if (!parse(&p, &f))
		return sent_by_container(skb, &c) ? drop(skb, c, REASON_MALFORMED) : 1;
	blocked = blocked_destination(&f);
	forged = blocked_source(&f);
	if (blocked || forged) {
		if (!sent_by_container(skb, &c))
			return 1;
		if (forged || !permits(c, blocked))
			return drop(skb, c, REASON_BLOCKED);
	}
	if (f.proto == IPPROTO_TCP && f.has_ports && smtp_ports[f.dport] && !judge_mail(skb, &f))
		return 0;
	if (blocked)
		announce_permitted(&f);
	return 1;
}

/* Most packets pass at a glance, which touches no map and calls no helper. */
SEC("cgroup_skb/egress")
int egress(struct __sk_buff *skb)
{
	const void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	enum glance g = UNCLEAR;
	struct flow f;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		g = glance4(data, end, skb->len, &f);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		g = glance6(data, end, skb->len, &f);
	if (g == PLAIN)
		return 1;
	if (g == MAIL)
		return judge_mail(skb, &f);
	return judge(skb);
}

/* It may have been handed a socket from elsewhere; then there is no container below
 * the policed cgroup to charge.
 */
static __always_inline __u64 above_caller(void *ctx, __u32 level)
{
	(void)ctx;
	if (bpf_get_current_ancestor_cgroup_id(policed_level) != policed_id)
		return 0;
	return bpf_get_current_ancestor_cgroup_id(level);
}

/* The container of the process that asks. */
static __always_inline bool asked_by_container(struct container **c)
{
	return find_container(above_caller, NULL, c);
}

/* Where connect() leads to the loopback device whatever the routes say. */
static __always_inline bool loopback(const union address *a)
{
	if (mapped4(a))
		return !a->be32[3] || a->bytes[12] == 127;
	return !a->be32[0] && !a->be32[1] && !a->be32[2] && (!a->be32[3] || a->be32[3] == bpf_htonl(1));
}

/* Whether the container itself may be the one that listens there. Nothing tells
 * whether an address is its own, so a socket that listens on every address makes
 * this true of all: then the packet decides.
 */
static __always_inline bool own_listener(struct bpf_sock_addr *ctx, const struct flow *f)
{
	struct bpf_sock_tuple to = {};
	struct bpf_sock *sk;

	if (mapped4(&f->dst)) {
		to.ipv4.daddr = f->dst.be32[3];
		to.ipv4.dport = f->dport;
		sk = bpf_sk_lookup_tcp(ctx, &to, sizeof(to.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		__builtin_memcpy(to.ipv6.daddr, &f->dst, sizeof(to.ipv6.daddr));
		to.ipv6.dport = f->dport;
		sk = bpf_sk_lookup_tcp(ctx, &to, sizeof(to.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* The verdict on an attempt to send to f->dst, before there is a packet. */
static __always_inline enum reason judge_attempt(struct bpf_sock_addr *ctx, const struct flow *f,
						 struct container **c)
{
	__u32 blocked = blocked_destination(f);

	if (blocked && asked_by_container(c) && !permits(*c, blocked))
		return REASON_BLOCKED;
	/* Only looks: the token is the packet's to take, and to count if nothing is
	 * refused.
	 */
	if (enforce && over_limit_reject && f->proto == IPPROTO_TCP && smtp_ports[f->dport] &&
	    !loopback(&f->dst) && !exempt(f) && asked_by_container(c) && *c &&
	    surely_empty(&(*c)->bucket, limit_of(*c)) && !own_listener(ctx, f))
		return REASON_RATE_LIMITED;
	return REASON_NONE;
}

static __always_inline int attempt(struct bpf_sock_addr *ctx, struct flow *f)
{
	struct container *c = NULL;
	enum reason reason;

	f->dport = ctx->user_port;
	f->proto = ctx->protocol == PROTO_MPTCP ? IPPROTO_TCP : ctx->protocol;
	f->has_ports = carries_ports(f->proto);
	reason = judge_attempt(ctx, f, &c);
	if (reason == REASON_NONE)
		return 1;
	count_connect(c, reason);
	if (!enforce)
		return 1;
	/* Without it the kernel says EPERM. */
	if (has_set_retval)
		bpf_set_retval(-ECONNREFUSED);
	return 0;
}

static __always_inline int attempt4(struct bpf_sock_addr *ctx)
{
	struct flow f = {};

	map4(&f.dst, ctx->user_ip4);
	return attempt(ctx, &f);
}

static __always_inline int attempt6(struct bpf_sock_addr *ctx)
{
	struct flow f = {};

	f.dst.be32[0] = ctx->user_ip6[0];
	f.dst.be32[1] = ctx->user_ip6[1];
	f.dst.be32[2] = ctx->user_ip6[2];
	f.dst.be32[3] = ctx->user_ip6[3];
	return attempt(ctx, &f);
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return attempt4(ctx);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return attempt6(ctx);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return attempt4(ctx);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return attempt6(ctx);
}

static __noinline int apply(const struct request *r)
{
	struct container *c = state_of(r->id);
	__u64 now = bpf_ktime_get_ns();

	if (!c)
		return 0;
	bpf_spin_lock(&c->lock);
	c->flags = (c->flags & ~r->mask) | (r->flags & r->mask);
	if (!r->keep_limit) {
		c->limit = r->limit;
		bucket_adopt(&c->bucket, &c->limit, now);
	}
	bpf_spin_unlock(&c->lock);
	return 1;
}

/* Never attached: the controller runs it to change what holds for a container, which
 * only a program can do without losing what is counted meanwhile. Returns 1 if it did.
 */
SEC("cgroup_skb/egress")
int configure(struct __sk_buff *skb)
{
	struct request r;

	if (bpf_skb_load_bytes(skb, 0, &r, sizeof(r)))
		return 0;
	return apply(&r);
}

char _license[] SEC("license") = "Dual BSD/GPL";
