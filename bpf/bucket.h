// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The token bucket, as a generic cell rate algorithm (ITU-T I.371): one time,
 * full_at, says it all. A token may be taken while the bucket would be full
 * again within tolerance, and moves full_at on by what a token lasts. Over
 * any window of t no more than burst + rate * t are taken, and no less are
 * if asked for often enough.
 *
 * Clock and lock are the caller's.
 */
#ifndef EGRESSBPF_BUCKET_H
#define EGRESSBPF_BUCKET_H

#include "types.h"

#include <bpf/bpf_helpers.h>

static __always_inline bool bucket_reckoned_with(const struct bucket *b, const volatile struct limit *l)
{
	return b->interval == l->interval && b->count == l->count;
}

/* full_at of b under l, where b was last used under another limit: as many
 * tokens are missing as before, rounded up, at the new pace. A changed limit
 * neither refills a bucket nor makes it pay the old limit's debt in time.
 */
static __always_inline __u64 bucket_convert(const struct bucket *b, const volatile struct limit *l,
					    __u64 now)
{
	__u64 debt, whole, part;

	if (!b->count || !b->interval || b->full_at <= now)
		return now;
	debt = b->full_at - now;
	whole = debt / b->interval;
	/* An interval is below 2^47 ns (a day), so neither shift nor product
	 * overflows.
	 */
	part = ((debt % b->interval) << 16) / b->interval + 1;
	if (whole >= l->burst) {
		whole = l->burst;
		part = 0;
	}
	return now + whole * l->interval + (part * l->interval >> 16) + 1;
}

/* Whether a token is there. Takes no lock: full_at only ever moves forward, so
 * a refusal is right at the moment it was read; an admission has to be taken.
 */
static __always_inline bool bucket_has(const struct bucket *b, const volatile struct limit *l, __u64 now)
{
	__u64 full_at = *(const volatile __u64 *)&b->full_at;

	if (!l->count)
		return true;
	if (!bucket_reckoned_with(b, l))
		full_at = bucket_convert(b, l, now);
	return full_at <= now + l->tolerance;
}

/* Takes a token if there is one. The caller holds the lock. */
static __always_inline bool bucket_take(struct bucket *b, const volatile struct limit *l, __u64 now)
{
	__u64 full_at = b->full_at;
	__u32 rest = b->rest;

	if (!l->count)
		return true;
	if (!bucket_reckoned_with(b, l)) {
		full_at = bucket_convert(b, l, now);
		rest = 0;
	}
	if (full_at < now) {
		full_at = now;
		rest = 0;
	}
	if (full_at > now + l->tolerance)
		return false;
	full_at += l->interval;
	rest += l->rest;
	if (rest >= l->count) {
		rest -= l->count;
		full_at++;
	}
	b->full_at = full_at;
	b->interval = l->interval;
	b->count = l->count;
	b->rest = rest;
	return true;
}

#endif
