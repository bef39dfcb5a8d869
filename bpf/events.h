// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Tells readers of refusals as they happen, and notes what mode audit lets through. Nothing
 * depends on it: what is refused is counted elsewhere.
 */
#ifndef EGRESSBPF_EVENTS_H
#define EGRESSBPF_EVENTS_H

#include "maps.h"

const volatile bool enforce = true;	/* false: count, but refuse nothing */

/* The readers, if there are any; otherwise NULL. */
static __always_inline struct audience *waiting_readers(void)
{
	__u32 key = 0;
	struct audience *r = bpf_map_lookup_elem(&readers, &key);

	return r && *(volatile __u64 *)&r->any ? r : NULL;
}

/* Whether this event of a container may be told. It counts those that may not. If several CPUs
 * ask at once, more may be told, but never fewer.
 */
static __always_inline bool may_tell(struct audience *r, const struct event *e)
{
	__u64 key = e->container ? e->container : EVENTS_OF_DEVICE | e->device;
	struct telling *t = bpf_map_lookup_elem(&tellings, &key);
	const struct telling none = {};
	__u64 full_at;

	if (!t) {
		bpf_map_update_elem(&tellings, &key, &none, BPF_NOEXIST);
		t = bpf_map_lookup_elem(&tellings, &key);
		if (!t)
			return true;
	}
	full_at = *(volatile __u64 *)&t->full_at;
	if (full_at > e->time + (EVENTS_BURST - 1) * EVENTS_INTERVAL) {
		__sync_fetch_and_add(&t->left_out, 1);
		__sync_fetch_and_add(&r->left_out, 1);
		return false;
	}
	*(volatile __u64 *)&t->full_at = (full_at > e->time ? full_at : e->time) + EVENTS_INTERVAL;
	return true;
}

/* Notes what mode audit lets through: what a container asked for itself. */
static __always_inline void note_seen(const struct event *e)
{
	struct seen_key key = {
		.container = e->container,
		.dport = e->dport,
		.proto = e->proto,
		.family = e->family,
		.reason = e->reason,
	};
	struct sighting *s, first = { .count = 1, .in_slot = 1, .most = 1 };
	__u64 slot = e->time / SEEN_SLOT, n;

	__builtin_memcpy(key.dst, e->dst, sizeof(key.dst));
	s = bpf_map_lookup_elem(&seen, &key);
	if (!s) {
		first.first = e->time;
		first.last = e->time;
		first.slot = slot;
		if (!bpf_map_update_elem(&seen, &key, &first, BPF_NOEXIST))
			return;
		s = bpf_map_lookup_elem(&seen, &key);
		if (!s)
			return;
	}
	__sync_fetch_and_add(&s->count, 1);
	*(volatile __u64 *)&s->last = e->time;
	/* If several CPUs begin a slot at once, a few may be missing from it. */
	if (s->slot != slot) {
		s->in_slot_before = s->slot + 1 == slot ? s->in_slot : 0;
		s->in_slot = 0;
		s->slot = slot;
	}
	__sync_fetch_and_add(&s->in_slot, 1);
	n = *(volatile __u64 *)&s->in_slot + s->in_slot_before;
	if (n > s->most)
		s->most = n;
}

/* Tells of a refusal: hands the event to each reader, and in audit mode notes it. A reader that
 * has stopped without saying so is passed over from the end of its time on, until it says that it
 * is back.
 */
static __noinline int tell(struct event *e)
{
	struct audience *r = waiting_readers();

	e->time = bpf_ktime_get_ns();
	e->refused = enforce;
	if (!enforce && e->hook != HOOK_HOST)
		note_seen(e);
	if (!r || !may_tell(r, e))
		return 0;
	for (__u32 i = 0; i < MAX_READERS; i++) {
		void *buffer;
		__u32 key = i;

		if (!r->waiting[i])
			continue;
		if (r->reader[i].until < e->time) {
			r->waiting[i] = 0;
			continue;
		}
		buffer = bpf_map_lookup_elem(&buffers, &key);
		if (!buffer || bpf_ringbuf_output(buffer, e, sizeof(*e), 0)) {
			__sync_fetch_and_add(&r->reader[i].lost, 1);
			__sync_fetch_and_add(&r->lost, 1);
		}
	}
	return 0;
}

#endif
