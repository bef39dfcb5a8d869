// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Whether a container may open another mail connection. */
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

/* Whether a bucket is certainly empty. This refuses most of a flood without the lock and
 * without the precise clock, which costs as much as all the rest. The coarse clock lags by
 * up to a tick, so it does not decide what is closer than clock_slack.
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
	/* limit_of() again: the limit may have changed, even to unlimited. */
	taken = bucket_take(&c->bucket, limit_of(c), now);
	bpf_spin_unlock(&c->lock);
	return taken;
}

#endif
