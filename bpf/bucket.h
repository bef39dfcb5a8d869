// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The token bucket, as a generic cell rate algorithm (ITU-T I.371). The bucket is one time,
 * full_at: the moment at which it is full again. A token may be taken if the bucket would
 * be full again within tolerance; taking it moves full_at on by the time that a token
 * lasts. Over any window of t, a container takes at most burst + rate * t tokens, and no
 * fewer if it asks often enough.
 *
 * The caller supplies the clock and holds the lock.
 */
#ifndef EGRESSBPF_BUCKET_H
#define EGRESSBPF_BUCKET_H

#include "types.h"

#include <bpf/bpf_helpers.h>

/* Whether b was last used under the limit l. False once the limit has changed. */
static __always_inline bool bucket_settled(const struct bucket *b, const volatile struct limit *l)
{
	return b->interval == l->interval && b->count == l->count && b->burst == l->burst;
}

/* Brings b to the limit l if b was last used under another limit. As many tokens are
 * missing as before, rounded up, at the new pace: a changed limit neither refills a bucket
 * nor makes it pay the old limit's debt in time. The caller holds the lock.
 */
static __always_inline void bucket_adopt(struct bucket *b, const volatile struct limit *l, __u64 now)
{
	__u64 debt, whole, part;

	if (!l->count || bucket_settled(b, l))
		return;
	debt = b->count && b->full_at > now ? b->full_at - now : 0;
	b->full_at = now;
	if (debt) {
		/* A validated interval is below 2^47 ns (a day), so neither shift
		 * nor product overflows.
		 */
		whole = debt / b->interval;
		part = ((debt % b->interval) << 16) / b->interval + 1;
		if (whole >= l->burst) {
			whole = l->burst;
			part = 0;
		}
		b->full_at += whole * l->interval + (part * l->interval >> 16) + 1;
	}
	b->rest = 0;
	b->interval = l->interval;
	b->count = l->count;
	b->burst = l->burst;
}

/* Whether a settled bucket has a token. Takes no lock: full_at only moves forward, so "no"
 * is right at the moment of reading, while a token still has to be taken under the lock.
 */
static __always_inline bool bucket_has(const struct bucket *b, const volatile struct limit *l, __u64 now)
{
	__u64 full_at = *(const volatile __u64 *)&b->full_at, latest = now + l->tolerance;

	/* Within the last nanosecond, the fractions decide. */
	return full_at < latest ||
	       (full_at == latest && b->rest <= (__u64)(l->burst - 1) * l->rest % l->count);
}

/* Takes a token if there is one. The caller holds the lock. */
static __always_inline bool bucket_take(struct bucket *b, const volatile struct limit *l, __u64 now)
{
	if (!l->count)
		return true;
	if (b->closed)
		return false;
	bucket_adopt(b, l, now);
	if (b->full_at < now) {
		b->full_at = now;
		b->rest = 0;
	}
	if (!bucket_has(b, l, now))
		return false;
	b->full_at += l->interval;
	b->rest += l->rest;
	if (b->rest >= l->count) {
		b->rest -= l->count;
		b->full_at++;
	}
	return true;
}

#endif
