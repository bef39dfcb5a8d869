// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Which container a packet or a system call belongs to. */
#ifndef EGRESSBPF_OWNER_H
#define EGRESSBPF_OWNER_H

#include "state.h"

/* Returns the id of an ancestor cgroup, at a level below the root, of what ctx stands for:
 * a socket, a process or a cgroup. 0 if ctx is not in a cgroup that deep.
 */
typedef __u64 (*ancestor_fn)(void *ctx, __u32 level);

/* Finds the container that ctx is in: the outermost cgroup below the level top that is
 * known as a container. Returns the id of its cgroup; 0 if there is none. c is the container's
 * state, or NULL if it has none.
 */
static __always_inline __u64 find_known(__u32 top, ancestor_fn ancestor, void *ctx, struct container **c)
{
	__u64 id;

	for (__u32 i = 1; i <= MAX_DEPTH; i++) {
		id = ancestor(ctx, top + i);
		if (!id)
			break;
		*c = bpf_map_lookup_elem(&containers, &id);
		if (*c)
			return id;
	}
	*c = NULL;
	/* A loop of its own: in the loop above, the verifier would follow more paths
	 * through each step.
	 */
	for (__u32 i = 1; i <= MAX_DEPTH; i++) {
		id = ancestor(ctx, top + i);
		if (!id)
			break;
		if (is_stateless(id))
			return id;
	}
	return 0;
}

/* Finds the container that ctx, which is in the policed cgroup p, belongs to. Returns the id of
 * its cgroup; 0 if it belongs to none. c is the container's state, or NULL if it has none.
 */
static __always_inline __u64 find_container(const volatile struct policed_cgroup *p, ancestor_fn ancestor, void *ctx, struct container **c)
{
	__u64 id;

	if (p->recognises)
		return find_known(p->level, ancestor, ctx, c);
	id = ancestor(ctx, p->level + 1);
	if (!id)
		id = p->id;
	*c = state_of(id);
	return id;
}

#endif
