// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Whose packet, and whose system call. */
#ifndef EGRESSBPF_OWNER_H
#define EGRESSBPF_OWNER_H

#include "state.h"

/* The cgroup that this instance polices, and its depth below the root. */
const volatile __u64 policed_id;
const volatile __u32 policed_level;

/* false: each of its children is a container.
 * true: the containers are those in the map, at any depth, which bpf/cgroups.bpf.c
 * puts there; all else is let alone.
 */
const volatile bool recognises;

/* Finds the container among the cgroups that above() returns for the levels below the
 * policed one, 0 for those that are too deep. False if it belongs to none; else c is
 * its state, NULL if it has none.
 */
static __always_inline bool find_container(__u64 (*above)(void *, __u32), void *ctx, struct container **c)
{
	__u64 id;

	if (!recognises) {
		id = above(ctx, policed_level + 1);
		*c = state_of(id ? id : policed_id);
		return true;
	}
	for (__u32 i = 1; i <= MAX_DEPTH; i++) {
		id = above(ctx, policed_level + i);
		if (!id)
			break;
		*c = bpf_map_lookup_elem(&containers, &id);
		if (*c)
			return true;
	}
	*c = NULL;
	/* A loop of its own: in the one above, the verifier would follow each step in more ways. */
	for (__u32 i = 1; i <= MAX_DEPTH; i++) {
		id = above(ctx, policed_level + i);
		if (!id)
			break;
		if (is_stateless(id))
			return true;
	}
	return false;
}

#endif
