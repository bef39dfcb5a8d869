// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The kernel's cgroups, for programs that get one as an argument. */
#ifndef EGRESSBPF_CGROUP_H
#define EGRESSBPF_CGROUP_H

#include <linux/types.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

struct kernfs_node {
	__u64 id;
	const char *name;
} __attribute__((preserve_access_index));

struct cgroup_root {
	int hierarchy_id;	/* 0: cgroup v2 */
} __attribute__((preserve_access_index));

struct cgroup {
	struct kernfs_node *kn;
	struct cgroup_root *root;
	int level;
	struct cgroup *ancestors[];
} __attribute__((preserve_access_index));

/* Before 6.1. */
struct cgroup___ids {
	__u64 ancestor_ids[];
} __attribute__((preserve_access_index));

/* Two functions of their own, so that the compiler does not relocate a field where the
 * kernel has none.
 */
static __noinline __u64 ancestor_id_since_6_1(struct cgroup *cgrp, __u32 level)
{
	struct cgroup *above;

	bpf_core_read(&above, sizeof(above), &cgrp->ancestors[level]);
	return BPF_CORE_READ(above, kn, id);
}

static __noinline __u64 ancestor_id_before_6_1(struct cgroup___ids *cgrp, __u32 level)
{
	__u64 id = 0;

	bpf_core_read(&id, sizeof(id), &cgrp->ancestor_ids[level]);
	return id;
}

/* The id of the ancestor of cgrp at a level, or of cgrp itself at its own level; 0 if cgrp
 * is not that deep.
 */
static __always_inline __u64 ancestor_id(struct cgroup *cgrp, __u32 level)
{
	struct cgroup___ids *old = (void *)cgrp;

	if (level > (__u32)BPF_CORE_READ(cgrp, level))
		return 0;
	if (bpf_core_field_exists(old->ancestor_ids))
		return ancestor_id_before_6_1(old, level);
	return ancestor_id_since_6_1(cgrp, level);
}

#endif
