//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Decides what containers may send. The packet hook is the boundary. The socket hooks give
 * the same verdict early, so that a program is refused at once instead of waiting for an
 * answer that never comes.
 */
#define RULES_LINKAGE __noinline
#define WALK_IS_GLOBAL
#include "caller.h"
#include "glance.h"
#include "limit.h"
#include "opening.h"
#include "owner.h"
#include "parse.h"
#include "rules.h"
#include "tunnels.h"
#include "verdict.h"

const volatile bool over_limit_reject;	/* refuse a connection without a token in connect() */
const volatile bool has_set_retval;	/* bpf_set_retval(), 5.18 */
const volatile bool has_host_side;	/* the host side has to be told what was let through */

#define LOOPBACK_IFINDEX 1
#define SOCK_STREAM 1
#define ECONNREFUSED 111

/* The cgroup that this instance polices. */
const volatile struct policed_cgroup policed;

static __always_inline __u64 above_packet(void *skb, __u32 level)
{
	return bpf_skb_ancestor_cgroup_id(skb, level);
}

/* The container that the socket belongs to, however deep below it the socket was made.
 * Returns the id of its cgroup; 0 if there is none.
 */
static __always_inline __u64 sent_by_container(struct __sk_buff *skb, struct container **c)
{
	return find_container(&policed, above_packet, skb, c);
}

/* The TCP socket that sends, which may be a listener. NULL for a socket of another kind:
 * the kernel does not answer for the packets of such a socket.
 */
static __always_inline struct bpf_sock *tcp_socket(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	/* Older kernels also return raw sockets of protocol TCP. */
	return sk && sk->type == SOCK_STREAM && sk->protocol == IPPROTO_TCP ? sk : NULL;
}

/* Ends the ticket: the next packet of the socket has to be paid for again. */
static __always_inline void end_ticket(struct __sk_buff *skb)
{
	struct bpf_sock *sk = tcp_socket(skb);

	if (sk)
		bpf_sk_storage_delete(&tickets, sk);
}

/* Precise enough for ANNOUNCED_NS. */
static __always_inline __u64 now_roughly(void)
{
	return has_coarse_clock ? bpf_ktime_get_coarse_ns() : bpf_ktime_get_ns();
}

/* Tells the host side that a packet was let through. again renews an announcement that is
 * still unused.
 */
static __always_inline void announce(const struct flow *f, bool again)
{
	struct announcement key = { .seq = f->seq, .dport = f->dport };
	__u64 now;

	if (!has_host_side)
		return;
	__builtin_memcpy(key.dst, &f->dst, sizeof(key.dst));
	if (!opens(f)) {
		__builtin_memcpy(key.src, &f->src, sizeof(key.src));
		key.sport = f->sport;
		key.ack = f->ack;
	}
	now = now_roughly();
	bpf_map_update_elem(&admitted, &key, &now, again ? BPF_EXIST : BPF_ANY);
}

/* Whether the host has seen the connection go on. The host also sees that if somebody else
 * forges packets that this socket has not sent.
 */
static __always_inline bool answered_on_host(const struct flow *f)
{
	struct mail_key key = { .sport = f->sport, .dport = f->dport };
	struct opening *known;

	if (!has_host_side)
		return false;
	__builtin_memcpy(key.src, &f->src, sizeof(key.src));
	__builtin_memcpy(key.dst, &f->dst, sizeof(key.dst));
	known = bpf_map_lookup_elem(&mails, &key);
	return known && known->answered;
}

/* Whether the packet belongs to the connection that the ticket paid for. */
static __always_inline bool same_connection(const struct ticket *t, const struct flow *f)
{
	return t->sport == f->sport && t->dport == f->dport && !__builtin_memcmp(t->dst, &f->dst, sizeof(t->dst)) &&
	       !__builtin_memcmp(t->src, &f->src, sizeof(t->src));
}

/* Whether a SYN repeats one that was paid for, according to the kernel's count of
 * retransmissions. Once the connection has gone on, the socket would send this SYN only to
 * open another one.
 */
static __always_inline bool repeats_syn(const struct ticket *t, const struct bpf_tcp_sock *tcp, const struct flow *f)
{
	return opens_no_more(&t->opening, f) && tcp->total_retrans > t->retransmits && !answered_on_host(f);
}

/* Tells the host side of the connection now and then, since the host side forgets
 * connections that have long been idle.
 */
static __always_inline void remind(struct ticket *t, const struct flow *f)
{
	__u64 now;

	/* A leftover announcement must not let anybody send the opening a second time. */
	if (!has_host_side || (bpf_ntohl(f->seq) == t->opening.first && !t->opening.moved))
		return;
	now = now_roughly();
	if (now - t->announced > ANNOUNCED_NS) {
		t->announced = now;
		announce(f, false);
	}
}

/* Notes that the socket has paid for the connection that begins with this packet. */
static __always_inline void begin_ticket(struct __sk_buff *skb, const struct flow *f)
{
	struct bpf_sock *sk = tcp_socket(skb);
	struct bpf_tcp_sock *tcp;
	struct ticket *t;

	if (!sk)
		return;
	tcp = bpf_tcp_sock(sk);
	t = bpf_sk_storage_get(&tickets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!t || !tcp)
		return;
	__builtin_memcpy(t->src, &f->src, sizeof(t->src));
	__builtin_memcpy(t->dst, &f->dst, sizeof(t->dst));
	t->sport = f->sport;
	t->dport = f->dport;
	t->opening = begin_opening(f);
	t->retransmits = tcp->total_retrans;
	t->announced = 0;
}

/* Whether this container may reach what is blocked for the reason why. */
static __always_inline bool permits(const struct container *c, __u32 why)
{
	return c && c->flags & CONTAINER_METADATA && why == RULE_METADATA;
}

/* Tells the host side that one more packet of the flow may pass. */
static __always_inline void announce_permitted(const struct flow *f)
{
	struct flow_key key = { .sport = f->sport, .dport = f->dport, .proto = f->proto };
	const struct permit none = {};
	struct permit *p;

	if (!has_host_side)
		return;
	__builtin_memcpy(key.src, &f->src, sizeof(key.src));
	__builtin_memcpy(key.dst, &f->dst, sizeof(key.dst));
	p = bpf_map_lookup_elem(&permitted, &key);
	if (!p) {
		bpf_map_update_elem(&permitted, &key, &none, BPF_NOEXIST);
		p = bpf_map_lookup_elem(&permitted, &key);
	}
	if (!p)
		return;
	if (f->proto == IPPROTO_TCP && f->flags & TCP_FIN) {
		p->closing = bpf_htonl(bpf_ntohl(f->seq) + f->payload + 1);
		p->closed = 1;
	}
	__sync_fetch_and_add(&p->packets, 1);
}

/* Reads the addresses of a packet, whether or not it can be judged. */
static __always_inline void read_addresses(struct __sk_buff *skb, struct event *e)
{
	struct {
		__be32 src;
		__be32 dst;
	} v4;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, 12, &v4, sizeof(v4)))
			return;
		map4((union address *)e->src, v4.src);
		map4((union address *)e->dst, v4.dst);
	} else {
		bpf_skb_load_bytes(skb, 8, e->src, sizeof(e->src));
		bpf_skb_load_bytes(skb, 24, e->dst, sizeof(e->dst));
	}
}

/* This function and others below are global for the verifier's sake: it checks a global function
 * once, not again on every path that leads there, and goes on from there on one path.
 */
__noinline __u64 id_of_sender(struct __sk_buff *skb)
{
	struct container *c;

	return sent_by_container(skb, &c);
}

/* Tells of a packet that is refused. */
__noinline int tell_of_packet(struct __sk_buff *skb, __u32 reason, __u32 proto, __u32 sport, __u32 dport)
{
	struct event e = {
		.proto = proto,
		.sport = sport,
		.dport = dport,
		.bytes = skb->len,
		.hook = HOOK_EGRESS,
		.reason = reason,
	};
	struct bpf_sock *sk = tcp_socket(skb);
	struct process *p = NULL;

	e.container = id_of_sender(skb);
	read_addresses(skb, &e);
	if (sk)
		p = bpf_sk_storage_get(&callers, sk, NULL, 0);
	if (p)
		e.process = *p;
	return tell(&e);
}

/* Refuses a packet. Returns whether it passes nevertheless, in audit mode. */
static __always_inline bool drop(struct __sk_buff *skb, struct container *c, const struct flow *f, enum reason reason)
{
	if (refuse(c, HOOK_EGRESS, reason, skb->len))
		tell_of_packet(skb, reason, f->proto, f->sport, f->dport);
	return !enforce;
}

#define TCP_LISTENS 10

/* How a mail packet relates to the socket that sends it. A bit each, since a packet can
 * both pay and begin.
 */
enum mail {
	FREE = 1,	/* passes */
	PAYS = 2,	/* needs a token to pass */
	BEGINS = 4,	/* once paid, the socket may continue the connection */
	FORGED = 8,	/* passes only without a limit */
};

/* A TCP socket pays for a connection with its first packet, whichever that is: a server
 * that answers with SYN cookies needs no SYN to accept a connection. From then on the
 * socket may send packets of that connection. Any other sender of TCP pays for each SYN and
 * sends nothing else. Otherwise it could answer for a connection whose SYN a deaf TCP
 * socket repeats for free, and so make many connections with one token.
 */
static __always_inline enum mail judge_socket(struct __sk_buff *skb, const struct flow *f)
{
	bool loopback = skb->ifindex == LOOPBACK_IFINDEX, same = false;
	struct bpf_sock *sk = tcp_socket(skb);
	struct bpf_tcp_sock *tcp;
	struct ticket *t;

	if (!sk)
		return loopback ? FREE : opens(f) ? PAYS : FORGED;
	tcp = bpf_tcp_sock(sk);
	t = bpf_sk_storage_get(&tickets, sk, NULL, 0);
	if (t && tcp && !loopback)
		same = same_connection(t, f);
	if (same && opens(f) && repeats_syn(t, tcp, f)) {
		t->retransmits = tcp->total_retrans;
		announce(f, true);
		return FREE;
	}
	if (same && !opens(f) && !(f->flags & TCP_RST)) {
		switch (go_on(&t->opening, f)) {
		case GOES_ON:
			remind(t, f);
			return FREE;
		case REPEATS:
			announce(f, false);
			return FREE;
		case OPENS_AGAIN:
			return PAYS;
		case TOO_MUCH:
			return FORGED;
		}
	}
	/* The ticket was bought for another connection, or has ended, wherever this packet
	 * goes.
	 */
	if (t)
		bpf_sk_storage_delete(&tickets, sk);
	if (loopback || f->flags & TCP_RST)
		return FREE;
	/* An answer opens nothing at a server and takes no token, or else whoever connects
	 * from a mail port could empty the bucket.
	 */
	if (!opens(f) && (accepts(f) || sk->state == TCP_LISTENS))
		return FORGED;
	return PAYS | BEGINS;
}

/* Whether a TCP packet to a mail port whose destination is not blocked may pass. */
static __always_inline bool judge_mail(struct __sk_buff *skb, const struct flow *f)
{
	/* In memory rather than in a register, so that the verifier does not know the value
	 * and walks through the rest once.
	 */
	struct {
		__u8 unused;
		volatile __u8 is;
	} __attribute__((aligned(8))) mail;
	struct container *c;
	__u8 is;

	mail.is = judge_socket(skb, f);
	is = mail.is;
	if (is == FREE || exempt(f) || !sent_by_container(skb, &c))
		return true;
	if (!c)
		return drop(skb, c, f, REASON_NO_BUCKET);
	if (is & PAYS && take_token(c))
		count_allowed(c);
	else if (limit_of(c)->count && !drop(skb, c, f, REASON_RATE_LIMITED))
		return false;
	/* In audit mode a connection that was not paid for goes on, and is counted once. */
	announce(f, false);
	if (is & BEGINS)
		begin_ticket(skb, f);
	return true;
}

/* Why a packet that is not blocked may still not be sent. Over the loopback device, a
 * container in the host's network could reach the host's own tunnels. Without a TCP socket,
 * a container could make a TCP socket, its own or a neighbour's, believe that a mail server
 * has answered.
 */
static __always_inline enum reason judge_sender(struct __sk_buff *skb, const struct flow *f)
{
	if (skb->ifindex == LOOPBACK_IFINDEX && tunnel_of_host(f))
		return REASON_BLOCKED;
	if (f->proto == IPPROTO_TCP && f->has_ports && smtp_ports[f->sport] && default_limit.count && !tcp_socket(skb))
		return REASON_RATE_LIMITED;
	return REASON_NONE;
}

/* What happens to a packet that judge() has read. */
enum finding {
	DROPPED,
	PASSES,
	IS_MAIL,	/* judge_mail() decides */
};

/* Judges a packet, except as mail. why becomes what blocks the packet, or stays 0. */
static __always_inline enum finding judge(struct __sk_buff *skb, struct flow *f, __u32 *why)
{
	struct packet p = { .data = skb, .len = skb->len, .protocol = skb->protocol };
	enum reason reason = REASON_NONE;
	struct container *c;

	if (!parse(&p, f)) {
		reason = REASON_MALFORMED;
	} else {
		*why = blocked(f);
		reason = *why ? REASON_BLOCKED : judge_sender(skb, f);
	}
	if (reason != REASON_NONE) {
		if (!sent_by_container(skb, &c))
			return PASSES;
		if (!permits(c, *why)) {
			/* The socket may repeat the packet in a valid form, which nobody
			 * has paid for.
			 */
			end_ticket(skb);
			return drop(skb, c, f, reason) ? PASSES : DROPPED;
		}
	}
	if (f->proto == IPPROTO_TCP && f->has_ports && smtp_ports[f->dport])
		return IS_MAIL;
	if (*why)
		announce_permitted(f);
	return PASSES;
}

/* Most packets pass at a glance, which touches no map and calls no helper. */
static __always_inline enum glance glance(struct __sk_buff *skb)
{
	const void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 len = skb->len;

	/* Loaded once, before the compiler needs the register of skb. */
	asm volatile("" : "+r"(len));
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return glance4(data, end, len);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return glance6(data, end, len);
	return UNCLEAR;
}

/* Reads the flow of a packet that is MAIL at a glance. The glance has checked that all of
 * it is there. The packet's pointers are loaded again: if they were kept from the glance,
 * the compiler would spill registers there.
 */
static __always_inline bool read_mail(struct __sk_buff *skb, struct flow *f)
{
	const void *data = (void *)(long)*(volatile __u32 *)&skb->data;
	const void *end = (void *)(long)*(volatile __u32 *)&skb->data_end;

	return skb->protocol == bpf_htons(ETH_P_IP) ? read_tcp4(data, end, skb->len, f) : read_tcp6(data, end, skb->len, f);
}

/* Whether a plain datagram goes over the loopback device to a port at which the host may
 * have a tunnel.
 */
static __always_inline bool near_tunnel(struct __sk_buff *skb)
{
	__u32 header = skb->protocol == bpf_htons(ETH_P_IP) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	__be16 ports[2];

	return skb->ifindex == LOOPBACK_IFINDEX &&
	       (bpf_skb_load_bytes(skb, header, ports, sizeof(ports)) || tunnel_port(ports[1]));
}

SEC("cgroup_skb/egress")
int egress(struct __sk_buff *skb)
{
	enum glance g = glance(skb);
	__u32 why = 0;
	struct flow f;

	if (g == PLAIN || (g == DATAGRAM && !near_tunnel(skb)))
		return 1;
	if (g == MAIL) {
		if (!read_mail(skb, &f))
			return 0;
	} else {
		enum finding found;

		f = (struct flow){};
		found = judge(skb, &f, &why);
		if (found != IS_MAIL)
			return found == PASSES;
	}
	if (!judge_mail(skb, &f))
		return 0;
	if (why)
		announce_permitted(&f);
	return 1;
}

/* The calling process may be outside the policed cgroup and have got the socket from
 * inside. Then no container below the policed cgroup can be charged.
 */
static __always_inline __u64 above_caller(void *ctx, __u32 level)
{
	(void)ctx;
	if (bpf_get_current_ancestor_cgroup_id(policed.level) != policed.id)
		return 0;
	return bpf_get_current_ancestor_cgroup_id(level);
}

/* The container of the calling process. Returns the id of its cgroup; 0 if there is none. */
static __always_inline __u64 asked_by_container(struct container **c)
{
	return find_container(&policed, above_caller, NULL, c);
}

/* Whether connect() to this address leads to the loopback device, whatever the routes say. */
static __always_inline bool loopback(const union address *a)
{
	if (mapped4(a))
		return !a->be32[3] || a->bytes[12] == 127;
	return !a->be32[0] && !a->be32[1] && !a->be32[2] && (!a->be32[3] || a->be32[3] == bpf_htonl(1));
}

/* Whether the container itself may be listening there. Nothing shows whether an address is
 * the container's own, so a socket that listens on every address makes this true for all
 * addresses. Then the packet is judged instead.
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
	/* The source is not known yet. */
	__u32 why = near_suspect(&f->dst) && suspect(&f->dst) ? blocked(f) : 0;

	if (why && asked_by_container(c) && !permits(*c, why))
		return REASON_BLOCKED;
	/* Only looks at the bucket: the packet takes the token, or is counted as over the
	 * limit in audit mode.
	 */
	if (enforce && over_limit_reject && f->proto == IPPROTO_TCP && smtp_ports[f->dport] &&
	    !loopback(&f->dst) && !exempt(f) && asked_by_container(c) && *c &&
	    surely_empty(&(*c)->bucket, limit_of(*c)) && !own_listener(ctx, f))
		return REASON_RATE_LIMITED;
	return REASON_NONE;
}

static __always_inline void destination6(struct bpf_sock_addr *ctx, union address *dst)
{
	dst->be32[0] = ctx->user_ip6[0];
	dst->be32[1] = ctx->user_ip6[1];
	dst->be32[2] = ctx->user_ip6[2];
	dst->be32[3] = ctx->user_ip6[3];
}

/* Notes who connects a socket to a mail port, for when a packet of the connection is refused. */
static __always_inline void note_caller(struct bpf_sock_addr *ctx, const struct flow *f)
{
	struct process *p;

	if (f->proto != IPPROTO_TCP || !smtp_ports[f->dport] || !ctx->sk)
		return;
	if (!waiting_readers()) {
		/* Who has connected the socket before did not connect it now. */
		if (bpf_sk_storage_get(&callers, ctx->sk, NULL, 0))
			bpf_sk_storage_delete(&callers, ctx->sk);
		return;
	}
	p = bpf_sk_storage_get(&callers, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (p)
		describe_caller(p);
}

__noinline __u64 id_of_caller(struct bpf_sock_addr *ctx)
{
	struct container *c;

	return ctx ? asked_by_container(&c) : 0;
}

static __always_inline int tell_of_attempt(struct bpf_sock_addr *ctx, struct event *e, enum hook hook, enum reason reason, __u32 proto)
{
	e->container = id_of_caller(ctx);
	e->hook = hook;
	e->reason = reason;
	e->proto = proto;
	describe_caller(&e->process);
	return tell(e);
}

__noinline int tell_of_attempt4(struct bpf_sock_addr *ctx, __u32 hook, __u32 reason, __u32 proto)
{
	struct event e = { .dport = ctx->user_port };

	map4((union address *)e.dst, ctx->user_ip4);
	return tell_of_attempt(ctx, &e, hook, reason, proto);
}

__noinline int tell_of_attempt6(struct bpf_sock_addr *ctx, __u32 hook, __u32 reason, __u32 proto)
{
	struct event e = { .dport = ctx->user_port };

	destination6(ctx, (union address *)e.dst);
	return tell_of_attempt(ctx, &e, hook, reason, proto);
}

typedef int (*tell_fn)(struct bpf_sock_addr *ctx, __u32 hook, __u32 reason, __u32 proto);

static __always_inline int attempt(struct bpf_sock_addr *ctx, enum hook hook, struct flow *f, tell_fn tell_of)
{
	struct container *c = NULL;
	enum reason reason;

	/* What the socket has paid for was another connection. Most have paid for none, and to
	 * look costs less than to delete.
	 */
	if (ctx->protocol == IPPROTO_TCP && ctx->sk && bpf_sk_storage_get(&tickets, ctx->sk, NULL, 0))
		bpf_sk_storage_delete(&tickets, ctx->sk);
	f->dport = ctx->user_port;
	f->proto = ctx->protocol == PROTO_MPTCP ? IPPROTO_TCP : ctx->protocol;
	f->has_ports = carries_ports(f->proto);
	reason = judge_attempt(ctx, f, &c);
	if (reason == REASON_NONE || !enforce)
		note_caller(ctx, f);
	if (reason == REASON_NONE)
		return 1;
	/* Without bpf_set_retval() the call fails with EPERM. */
	if (enforce && has_set_retval)
		bpf_set_retval(-ECONNREFUSED);
	if (refuse(c, hook, reason, 0))
		tell_of(ctx, hook, reason, f->proto);
	return !enforce;
}

static __always_inline int attempt4(struct bpf_sock_addr *ctx, enum hook hook)
{
	struct flow f = {};

	map4(&f.dst, ctx->user_ip4);
	return attempt(ctx, hook, &f, tell_of_attempt4);
}

static __always_inline int attempt6(struct bpf_sock_addr *ctx, enum hook hook)
{
	struct flow f = {};

	destination6(ctx, &f.dst);
	return attempt(ctx, hook, &f, tell_of_attempt6);
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return attempt4(ctx, HOOK_CONNECT);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return attempt6(ctx, HOOK_CONNECT);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return attempt4(ctx, HOOK_SENDMSG);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return attempt6(ctx, HOOK_SENDMSG);
}

char _license[] SEC("license") = "Dual BSD/GPL";
