// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What is kept about each container. */
#ifndef EGRESSBPF_STATE_H
#define EGRESSBPF_STATE_H

#include "maps.h"

/* The format of the maps that the program was given. The verifier removes code for fields
 * that these maps do not have.
 */
const volatile __u32 format = FORMAT;

/* With room for the entries of later versions, which may be longer: the kernel reads as much as
 * the map's values have.
 */
static const union {
	struct container c;
	__u8 room[2048];
} new_container;

static __always_inline bool is_stateless(__u64 id)
{
	return bpf_map_lookup_elem(&stateless, &id);
}

/* NULL if the map is full, or the container is one without state. */
static __always_inline struct container *state_of(__u64 id)
{
	struct container *c = bpf_map_lookup_elem(&containers, &id);

	if (c || is_stateless(id))
		return c;
	/* If another CPU does the same at once, the second one finds the entry of the
	 * first.
	 */
	bpf_map_update_elem(&containers, &id, &new_container, BPF_NOEXIST);
	return bpf_map_lookup_elem(&containers, &id);
}

static __always_inline struct counters *total(void)
{
	__u32 key = 0;
	struct sums *sums = bpf_map_lookup_elem(&totals, &key);

	return sums ? &sums->counters : NULL;
}

static __always_inline void count_allowed(struct container *c)
{
	struct counters *sum = total();

	if (sum)
		__sync_fetch_and_add(&sum->smtp_allowed, 1);
	if (c)
		__sync_fetch_and_add(&c->counters.smtp_allowed, 1);
}

#endif
