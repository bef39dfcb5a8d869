//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Refuses sockets that send past the egress hook: packet sockets, AF_XDP and the like.
 * There are two programs for this, of which the controller attaches one; the kernel decides
 * which of them works.
 */
#include "caller.h"
#include "cgroup.h"
#include "owner.h"
#include "verdict.h"

#include <linux/in.h>

#define EPERM 1
#define AF_INET 2
#define AF_PACKET 17
#define SOCK_RAW 3

/* The cgroup that this instance polices. */
const volatile struct policed_cgroup policed;

const volatile __u64 families;		/* allowed: bit 1 << family */

/* The flags that allow a container to use a family that families does not have. */
const volatile __u32 family_flags[64];

/* If set, the program refuses only sockets of this protocol, which does not exist. So the
 * controller finds out whether the kernel heeds the program at all.
 */
const volatile int probe_protocol;

/* False where tracing programs cannot call bpf_get_current_ancestor_cgroup_id(): before
 * 5.15.
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

static __noinline int refuse_socket(struct container *c, __u64 id, __u32 family)
{
	struct event e = { .container = id, .family = family, .hook = HOOK_SOCKET, .reason = REASON_FAMILY };

	if (refuse(c, HOOK_SOCKET, REASON_FAMILY, 0)) {
		describe_caller(&e.process);
		tell(&e);
	}
	return enforce;
}

/* Whether to refuse a socket to the calling process. Sockets that the kernel makes for
 * itself (kern) are not a way around: the request that led to them was judged.
 */
static __always_inline bool refused(int family, int type, int protocol, int kern, ancestor_fn ancestor)
{
	struct container *c;
	__u64 id;

	if (probe_protocol)
		return protocol == probe_protocol;
	/* It can make itself the multicast router of its network namespace. What is routed there
	 * goes to any address, and no socket sends it. So it counts as a packet socket.
	 */
	if (family == AF_INET && type == SOCK_RAW && protocol == IPPROTO_IGMP)
		family = AF_PACKET;
	if (kern || ((__u32)family < 64 && families >> family & 1))
		return false;
	if (ancestor(NULL, policed.level) != policed.id)
		return false;
	id = find_container(&policed, ancestor, NULL, &c);
	if (!id || (c && may_use(c, family)))
		return false;
	return refuse_socket(c, id, family);
}

/* Since 6.0, if the BPF LSM is enabled. Runs for policed processes only. */
SEC("lsm_cgroup/socket_create")
int families_lsm(__u64 *ctx)
{
	return !refused(ctx[0], ctx[1], ctx[2], ctx[3], above_caller);
}

/* Since 5.7. Runs for every process of the host. */
SEC("fmod_ret/security_socket_create")
int families_fmod(__u64 *ctx)
{
	int before = ctx[4];

	if (before)
		return before;
	if (has_ancestor_helper)
		return refused(ctx[0], ctx[1], ctx[2], ctx[3], above_caller) ? -EPERM : 0;
	return refused(ctx[0], ctx[1], ctx[2], ctx[3], above_task) ? -EPERM : 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
