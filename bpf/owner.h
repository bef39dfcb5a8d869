// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Whose packet, and whose system call. */
#ifndef EGRESSBPF_OWNER_H
#define EGRESSBPF_OWNER_H

#include "state.h"

/* Returns the id of the cgroup at a level below the root that something is in, whatever
 * ctx is; 0 if it is not in one so deep.
 */
typedef __u64 (*ancestor_fn)(void *ctx, __u32 level);

/* Finds the outermost cgroup below a level that is known for a container's. False if there
 * is none; else c is its state, NULL if it has none.
 */
static __always_inline bool find_known(__u32 top, ancestor_fn ancestor, void *ctx, struct container **c)
{
	__u64 id;

	for (__u32 i = 1; i <= MAX_DEPTH; i++) {
		id = ancestor(ctx, top + i);
		if (!id)
			break;
		*c = bpf_map_lookup_elem(&containers, &id);
		if (*c)
			return true;
	}
	*c = NULL;
	/* A loop of its own: in the one above, the verifier would follow each step in more ways. */
	for (__u32 i = 1; i <= MAX_DEPTH; i++) {
		id = ancestor(ctx, top + i);
		if (!id)
			break;
		if (is_stateless(id))
			return true;
	}
	return false;
}

/* Finds the container below a policed cgroup, in which ctx is. False if it belongs to
 * none; else c is its state, NULL if it has none.
 */
static __always_inline bool find_container(const volatile struct policed_cgroup *p, ancestor_fn ancestor, void *ctx, struct container **c)
{
	__u64 id;

	if (p->recognises)
		return find_known(p->level, ancestor, ctx, c);
	id = ancestor(ctx, p->level + 1);
	*c = state_of(id ? id : p->id);
	return true;
}

#endif
