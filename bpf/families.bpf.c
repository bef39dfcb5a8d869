//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Refuses sockets that send by a road of their own, past the egress hook: packet
 * sockets, AF_XDP and the like. Two programs for the same place, of which the
 * controller attaches one: which of them works is up to the kernel.
 */
#include "maps.h"
#include "state.h"

#include <bpf/bpf_core_read.h>

#define EPERM 1

const volatile bool enforce = true;	/* false: count, refuse nothing */
const volatile __u64 families;		/* let through: bit 1 << family */

/* The cgroup that this instance polices, and its depth below the root. */
const volatile __u64 policed_id;
const volatile __u32 policed_level;

/* If set, nothing is refused but sockets of this protocol, which does not exist:
 * so the controller finds out whether this kernel listens to the program at all.
 */
const volatile int probe_protocol;

/* For kernels where tracing programs cannot call bpf_get_current_ancestor_cgroup_id()
 * (before 5.15). The kernel keeps ancestors by pointer since 6.1, by id before.
 */
const volatile bool has_ancestor_helper;

struct kernfs_node {
	__u64 id;
} __attribute__((preserve_access_index));

struct cgroup {
	struct kernfs_node *kn;
	int level;
	__u64 ancestor_ids[];
} __attribute__((preserve_access_index));

struct css_set {
	struct cgroup *dfl_cgrp;
} __attribute__((preserve_access_index));

struct task_struct {
	struct css_set *cgroups;
} __attribute__((preserve_access_index));

/* The id of the cgroup at a level above the calling process; 0 if it is not as deep. */
static __always_inline __u64 ancestor(__u32 level, bool has_helper)
{
	struct task_struct *task;
	struct cgroup *cgrp;

	if (has_helper)
		return bpf_get_current_ancestor_cgroup_id(level);
	task = (void *)bpf_get_current_task();
	cgrp = BPF_CORE_READ(task, cgroups, dfl_cgrp);
	if (level > (__u32)BPF_CORE_READ(cgrp, level))
		return 0;
	if (bpf_core_field_exists(cgrp->ancestor_ids)) {
		__u64 id = 0;

		bpf_core_read(&id, sizeof(id), &cgrp->ancestor_ids[level]);
		return id;
	}
	return 0;
}

static __always_inline void count_denied(__u64 id)
{
	struct container *c = state_of(id);
	struct counters *sum = total();

	if (c)
		__sync_fetch_and_add(&c->counters.families_denied, 1);
	if (sum)
		__sync_fetch_and_add(&sum->families_denied, 1);
}

/* Whether the calling process may not make a socket. Those that the kernel makes for
 * itself are no way around: what makes them was judged.
 */
static __always_inline bool refused(int family, int protocol, int kern, bool has_helper)
{
	__u64 id;

	if (probe_protocol)
		return protocol == probe_protocol;
	if (kern || ((__u32)family < 64 && families >> family & 1))
		return false;
	if (ancestor(policed_level, has_helper) != policed_id)
		return false;
	id = ancestor(policed_level + 1, has_helper);
	count_denied(id ? id : policed_id);
	return enforce;
}

/* 6.0, where the BPF LSM is on. Runs for policed processes only. */
SEC("lsm_cgroup/socket_create")
int families_lsm(__u64 *ctx)
{
	return !refused(ctx[0], ctx[2], ctx[3], true);
}

/* 5.7. Runs for every process of the host. */
SEC("fmod_ret/security_socket_create")
int families_fmod(__u64 *ctx)
{
	int before = ctx[4];

	if (before)
		return before;
	return refused(ctx[0], ctx[2], ctx[3], has_ancestor_helper) ? -EPERM : 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
