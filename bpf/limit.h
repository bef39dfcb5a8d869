// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Who may open another mail connection. */
#ifndef EGRESSBPF_LIMIT_H
#define EGRESSBPF_LIMIT_H

#include "bucket.h"
#include "parse.h"
#include "policy.h"
#include "state.h"

static __always_inline const volatile struct limit *limit_of(const struct container *c)
{
	return c->limit.burst ? &c->limit : &default_limit;
}

/* Whether a bucket is surely empty. Most of a flood is refused by
 * this, without the lock, and without the precise clock, which costs as much as
 * all the rest: the coarse one lags by a tick, and decides nothing that is less
 * than clock_slack away.
 */
static __always_inline bool surely_empty(const struct bucket *b, const volatile struct limit *l)
{
	const __u64 clock_slack = 100 * 1000 * 1000;

	if (!l->count)
		return false;
	if (b->closed)
		return true;
	if (!bucket_settled(b, l))
		return false;
	if (has_coarse_clock && !bucket_has(b, l, bpf_ktime_get_coarse_ns() + clock_slack))
		return true;
	return !bucket_has(b, l, bpf_ktime_get_ns());
}

static __always_inline bool take_token(struct container *c)
{
	bool taken;
	__u64 now;

	if (surely_empty(&c->bucket, limit_of(c)))
		return false;
	now = bpf_ktime_get_ns();
	bpf_spin_lock(&c->lock);
	/* Read again: the limit may have changed, and be no limit any more. */
	taken = bucket_take(&c->bucket, limit_of(c), now);
	bpf_spin_unlock(&c->lock);
	return taken;
}

#endif
