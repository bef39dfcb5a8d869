//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Programs that are attached nowhere. The controller runs them to change what is kept about
 * a container: the system call for that writes a whole value, and would undo what was
 * counted meanwhile.
 */
#include "bucket.h"
#include "state.h"

#include <linux/bpf.h>

static __noinline int apply(const struct request *r)
{
	struct container *c = state_of(r->id);
	__u64 now = bpf_ktime_get_ns();

	if (!c)
		return 0;
	bpf_spin_lock(&c->lock);
	if (!r->keep_limit && !(c->flags & r->unless)) {
		c->limit = r->limit;
		bucket_adopt(&c->bucket, &c->limit, now);
	}
	c->flags = (c->flags & ~r->mask) | (r->flags & r->mask);
	bpf_spin_unlock(&c->lock);
	return 1;
}

/* Changes the flags and the limit of a container. Returns 1 if it did. */
SEC("cgroup_skb/egress")
int configure(struct __sk_buff *skb)
{
	struct request r;

	if (bpf_skb_load_bytes(skb, 0, &r, sizeof(r)))
		return 0;
	return apply(&r);
}

/* The maps that containers and totals replace. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct container);
} containers_from SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sums);
} totals_from SEC(".maps");

#define MAX_COUNTERS (sizeof(struct counters) / sizeof(__u64))

/* How many counters the values have in both maps. */
const volatile __u32 counters = MAX_COUNTERS;

/* Moves counts from one map to the other, so that the sum of both is right at any time. The
 * totals move for all CPUs at once: only the sum over the CPUs counts, and the count of a
 * single CPU may be below 0.
 */
static __always_inline void move(struct __sk_buff *skb, __u64 *from, __u64 *to)
{
	for (__u32 i = 0; i < MAX_COUNTERS && i < counters; i++) {
		__u64 n;

		if (bpf_skb_load_bytes(skb, sizeof(struct cargo) + i * sizeof(n), &n, sizeof(n)))
			return;
		__sync_fetch_and_add(&to[i], n);
		__sync_fetch_and_add(&from[i], -n);
	}
}

/* Takes from a bucket the tokens that were taken from its copy. They last debt, at the pace of
 * the copy.
 */
static __always_inline void pay(struct bucket *b, const struct bucket *copy, __u64 debt, __u64 now)
{
	bool same = b->interval == copy->interval && b->count == copy->count && b->burst == copy->burst;

	if (!b->count || (!debt && same && copy->full_at > b->full_at)) {
		*b = *copy;
		return;
	}
	if (!debt)
		return;
	if (!same) {
		/* As many tokens, rounded up, at the new pace: see bucket_adopt(). */
		debt = copy->interval ? debt / copy->interval + 1 : 0;
		if (debt > b->burst)
			debt = b->burst;
		debt *= b->interval;
	}
	if (b->full_at < now)
		b->full_at = now;
	b->full_at += debt;
}

/* A program of the new maps may have made the entry to move to. What holds for the container
 * alone is then still in the old entry.
 */
static __noinline int carry_container(struct __sk_buff *skb, const struct cargo *c)
{
	struct container *from, *to;
	__u64 now;

	from = bpf_map_lookup_elem(&containers_from, &c->id);
	if (!from)
		return 0;
	to = state_of(c->id);
	if (!to)
		return 0;
	now = bpf_ktime_get_ns();
	bpf_spin_lock(&to->lock);
	pay(&to->bucket, &c->bucket, c->debt, now);
	if (!to->flags && !to->limit.burst) {
		to->flags = from->flags;
		to->limit = from->limit;
	}
	bpf_spin_unlock(&to->lock);
	move(skb, (__u64 *)&from->counters, (__u64 *)&to->counters);
	return 1;
}

/* Moves a container's counts and the tokens that it has taken, or moves the totals. Returns
 * 1 if it did. A process can be killed half-way; a program cannot.
 */
SEC("cgroup_skb/egress")
int carry(struct __sk_buff *skb)
{
	struct sums *from, *to;
	struct cargo c;
	__u32 key = 0;

	if (bpf_skb_load_bytes(skb, 0, &c, sizeof(c)))
		return 0;
	if (c.id)
		return carry_container(skb, &c);
	from = bpf_map_lookup_elem(&totals_from, &key);
	to = bpf_map_lookup_elem(&totals, &key);
	if (!from || !to)
		return 0;
	move(skb, (__u64 *)from, (__u64 *)to);
	return 1;
}

/* The map containers in format 1. The controller creates it for versions that know no other
 * format.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct container_1);
} containers_1 SEC(".maps");

char _license[] SEC("license") = "Dual BSD/GPL";
