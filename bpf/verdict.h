// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* How every hook refuses, and how refusals are counted. */
#ifndef EGRESSBPF_VERDICT_H
#define EGRESSBPF_VERDICT_H

#include "events.h"
#include "state.h"

static __always_inline void count_traffic(struct traffic *t, __u64 bytes)
{
	__sync_fetch_and_add(&t->packets, 1);
	__sync_fetch_and_add(&t->bytes, bytes);
}

/* NULL if the map has no room for the reason. */
static __always_inline struct drops *drops_of(struct counters *n, enum reason reason)
{
	if (reason < FIRST_REASONS)
		return &n->dropped[reason];
	if (format < 2 || reason >= MAX_REASONS)
		return NULL;
	return &n->more_dropped[reason - FIRST_REASONS];
}

static __always_inline void count_refusal(struct counters *n, enum hook hook, enum reason reason, __u64 bytes)
{
	struct drops *d;

	switch (hook) {
	case HOOK_EGRESS:
		d = drops_of(n, reason);
		if (d) {
			__sync_fetch_and_add(&d->packets, 1);
			__sync_fetch_and_add(&d->bytes, bytes);
		}
		break;
	case HOOK_CONNECT:
	case HOOK_SENDMSG:
		d = drops_of(n, reason);
		if (d)
			__sync_fetch_and_add(&d->connects, 1);
		break;
	case HOOK_SOCKET:
		__sync_fetch_and_add(&n->families_denied, 1);
		break;
	case HOOK_HOST:
		count_traffic(&n->host_side, bytes);
		if (format >= 2 && reason < MAX_REASONS)
			count_traffic(&n->host_dropped[reason], bytes);
	}
}

/* Counts a refusal at a hook: of a packet of so many bytes, or of a system call. c is the
 * container's state, or NULL if it has none. Returns whether somebody wants to be told of it:
 * call tell(). Then it is refused, except in audit mode.
 *
 * The total needs atomic additions although it is per CPU: other programs can interrupt
 * this one. The total is counted first, so that a reader who reads it last never finds less
 * in it than in a container.
 */
static __always_inline bool refuse(struct container *c, enum hook hook, enum reason reason, __u64 bytes)
{
	struct counters *sum = total();

	if (sum)
		count_refusal(sum, hook, reason, bytes);
	if (c)
		count_refusal(&c->counters, hook, reason, bytes);
	return !enforce || waiting_readers();
}

#endif
