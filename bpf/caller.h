// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The process that makes a system call. */
#ifndef EGRESSBPF_CALLER_H
#define EGRESSBPF_CALLER_H

#include "types.h"

#include <bpf/bpf_helpers.h>

/* Whether programs of this type have bpf_get_current_pid_tgid() and bpf_get_current_comm(): of
 * a socket's address, since 6.1.
 */
const volatile bool has_current;

/* Where the kernel keeps these in struct task_struct; 0 where the programs cannot read it. */
const volatile __u32 task_tgid;
const volatile __u32 task_comm;

/* Describes the calling process. Its pid stays 0 where it cannot be told. */
static __always_inline void describe_caller(struct process *p)
{
	const void *task;

	p->uid = bpf_get_current_uid_gid();
	if (has_current) {
		p->pid = bpf_get_current_pid_tgid() >> 32;
		bpf_get_current_comm(p->comm, sizeof(p->comm));
	} else if (task_tgid && task_comm) {
		task = (const void *)bpf_get_current_task();
		bpf_probe_read_kernel(&p->pid, sizeof(p->pid), task + task_tgid);
		bpf_probe_read_kernel(p->comm, sizeof(p->comm), task + task_comm);
	}
}

#endif
