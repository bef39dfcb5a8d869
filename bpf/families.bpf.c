//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Refuses sockets that send by a road of their own, past the egress hook: packet
 * sockets, AF_XDP and the like. Two programs for the same place, of which the
 * controller attaches one: which of them works is up to the kernel.
 */
#include "cgroup.h"
#include "owner.h"
#include "verdict.h"

#define EPERM 1

/* The cgroup that this instance polices. */
const volatile struct policed_cgroup policed;

const volatile __u64 families;		/* let through: bit 1 << family */

/* The flags that a container must have to be let through with a family all the same. */
const volatile __u32 family_flags[64];

/* If set, nothing is refused but sockets of this protocol, which does not exist:
 * so the controller finds out whether this kernel listens to the program at all.
 */
const volatile int probe_protocol;

/* For kernels where tracing programs cannot call bpf_get_current_ancestor_cgroup_id()
 * (before 5.15).
 */
const volatile bool has_ancestor_helper;

struct css_set {
	struct cgroup *dfl_cgrp;
} __attribute__((preserve_access_index));

struct task_struct {
	struct css_set *cgroups;
} __attribute__((preserve_access_index));

static __always_inline __u64 above_caller(void *ctx, __u32 level)
{
	(void)ctx;
	return bpf_get_current_ancestor_cgroup_id(level);
}

static __always_inline __u64 above_task(void *ctx, __u32 level)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	(void)ctx;
	return ancestor_id(BPF_CORE_READ(task, cgroups, dfl_cgrp), level);
}

static __always_inline bool may_use(const struct container *c, __u32 family)
{
	__u32 need = family < 64 ? family_flags[family] : CONTAINER_FAMILIES;

	return (c->flags & need) == need;
}

/* Whether the calling process may not make a socket. Those that the kernel makes for
 * itself are no way around: what makes them was judged.
 */
static __always_inline bool refused(int family, int protocol, int kern, ancestor_fn ancestor)
{
	struct container *c;

	if (probe_protocol)
		return protocol == probe_protocol;
	if (kern || ((__u32)family < 64 && families >> family & 1))
		return false;
	if (ancestor(NULL, policed.level) != policed.id || !find_container(&policed, ancestor, NULL, &c))
		return false;
	if (c && may_use(c, family))
		return false;
	return refuse(c, HOOK_SOCKET, REASON_FAMILY, 0);
}

/* 6.0, where the BPF LSM is on. Runs for policed processes only. */
SEC("lsm_cgroup/socket_create")
int families_lsm(__u64 *ctx)
{
	return !refused(ctx[0], ctx[2], ctx[3], above_caller);
}

/* 5.7. Runs for every process of the host. */
SEC("fmod_ret/security_socket_create")
int families_fmod(__u64 *ctx)
{
	int before = ctx[4];

	if (before)
		return before;
	if (has_ancestor_helper)
		return refused(ctx[0], ctx[2], ctx[3], above_caller) ? -EPERM : 0;
	return refused(ctx[0], ctx[2], ctx[3], above_task) ? -EPERM : 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
