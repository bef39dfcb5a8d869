//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Containers appear and go. Where a policed cgroup holds other things too, such as
 * the slices of systemd, a container is known by the name of its cgroup, from the
 * moment that is made: the kernel runs this within mkdir, before a process can be
 * in there.
 */
#include "cgroup.h"
#include "state.h"

/* The policed cgroups whose containers are recognised, up to the first whose id is 0. */
#define MAX_PLACES 8
const volatile struct place places[MAX_PLACES];

#define MAX_SCOPES 16
const volatile struct scope scopes[MAX_SCOPES];
const volatile __u32 n_scopes;

/* Room for any name (NAME_MAX and a NUL), and the beginning of any path. */
#define TEXT 256

static __always_inline bool hex(char c)
{
	return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
}

static __always_inline bool begins(const char *text, const volatile struct scope *s)
{
	for (__u32 i = 0; i < SCOPE_PREFIX && i < s->prefix_len; i++)
		if (text[i] != s->prefix[i])
			return false;
	return true;
}

/* Whether a name of len characters is one of the scope's. */
static __always_inline bool named(const char *name, __u32 len, const volatile struct scope *s)
{
	__u32 at = s->prefix_len;

	if (s->kind == SCOPE_ID ? len != at + CONTAINER_ID + s->suffix_len : len <= at + s->suffix_len)
		return false;
	if (!begins(name, s))
		return false;
	for (__u32 i = 0; s->kind == SCOPE_ID && i < CONTAINER_ID; i++)
		if (!hex(name[(at + i) & (TEXT - 1)]))
			return false;
	at = len - s->suffix_len;
	for (__u32 i = 0; i < SCOPE_SUFFIX && i < s->suffix_len; i++)
		if (name[(at + i) & (TEXT - 1)] != s->suffix[i])
			return false;
	return true;
}

static __always_inline bool is_container(struct cgroup *cgrp, const char *path)
{
	__u32 level = BPF_CORE_READ(cgrp, level);
	char text[TEXT];
	long len;

	len = bpf_probe_read_kernel_str(text, sizeof(text), BPF_CORE_READ(cgrp, kn, name));
	if (len <= 0)
		return false;
	for (__u32 i = 0; i < MAX_SCOPES && i < n_scopes; i++)
		if (scopes[i].kind != SCOPE_CHILD && named(text, len - 1, &scopes[i]))
			return true;
	if (bpf_probe_read_kernel_str(text, sizeof(text), path) <= 0)
		return false;
	for (__u32 i = 0; i < MAX_SCOPES && i < n_scopes; i++)
		if (scopes[i].kind == SCOPE_CHILD && level == scopes[i].level && begins(text, &scopes[i]))
			return true;
	return false;
}

/* Whether the cgroup is where containers are recognised: below a policed cgroup, and
 * not within a container, whose nested cgroups may have any name.
 */
static __always_inline bool may_be_container(struct cgroup *cgrp)
{
	__u32 level = BPF_CORE_READ(cgrp, level);

	for (__u32 i = 0; i < MAX_PLACES && places[i].id; i++) {
		__u32 top = places[i].level;

		if (level <= top || ancestor_id(cgrp, top) != places[i].id)
			continue;
		for (__u32 l = 1; l < MAX_DEPTH && top + l < level; l++) {
			__u64 id = ancestor_id(cgrp, top + l);

			if (bpf_map_lookup_elem(&containers, &id))
				return false;
		}
		return true;
	}
	return false;
}

/* Without an entry it could not be told from what is no container. The kernel makes
 * one cgroup at a time.
 */
static __always_inline void overflowed(__u64 id)
{
	__u32 key = 0;
	__u64 *first = bpf_map_lookup_elem(&overflow, &key);

	if (first && !*first)
		*first = id;
}

SEC("tp_btf/cgroup_mkdir")
int recognise(__u64 *ctx)
{
	struct cgroup *cgrp = (void *)ctx[0];
	__u64 id;

	if (cgrp->root->hierarchy_id)	/* cgroup v1 numbers its own */
		return 0;
	if (!may_be_container(cgrp) || !is_container(cgrp, (const char *)ctx[1]))
		return 0;
	id = cgrp->kn->id;
	if (cgrp->level >= MAX_DEPTH || !state_of(id))
		overflowed(id);
	return 0;
}

/* Forgets a container once its cgroup is gone with the last of its sockets. */
SEC("tp_btf/cgroup_release")
int release(__u64 *ctx)
{
	struct cgroup *cgrp = (void *)ctx[0];
	__u64 id;

	if (cgrp->root->hierarchy_id)
		return 0;
	id = cgrp->kn->id;
	bpf_map_delete_elem(&containers, &id);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
