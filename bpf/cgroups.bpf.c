//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Containers appear and go. Where a policed cgroup holds other things too, such as
 * the slices of systemd, a container is known by the name of its cgroup, from the
 * moment that is made: the kernel runs this within mkdir, before a process can be
 * in there.
 */
#include "cgroup.h"
#include "owner.h"

/* The policed cgroups, up to the first whose id is 0. */
#define MAX_POLICED 8
const volatile struct policed_cgroup policed[MAX_POLICED];

#define MAX_SCOPES 32
const volatile struct scope scopes[MAX_SCOPES];
const volatile __u32 n_scopes;

/* Room for any name. */
#define TEXT sizeof(((struct name_key *)0)->name)

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

/* BuildKit's identity.NewID, and what stands before it where BuildKit takes the parent for
 * systemd to read for a name.
 */
#define BUILD_ID 25

static __always_inline bool build(const char *name, __u32 len)
{
	__u32 at = len - BUILD_ID;

	if (len < BUILD_ID || (at && name[(at - 1) & (TEXT - 1)] != ':'))
		return false;
	for (__u32 i = 0; i < BUILD_ID; i++) {
		char c = name[(at + i) & (TEXT - 1)];

		if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z')))
			return false;
	}
	return true;
}

/* Whether a name of len characters is one of the scope's. */
static __always_inline bool named(const char *name, __u32 len, const volatile struct scope *s)
{
	__u32 at = s->prefix_len;

	if (s->kind == SCOPE_BUILD)
		return build(name, len);
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

/* Whether the cgroup with a name of len characters, at a path, is a container's. */
static __always_inline bool is_container(struct cgroup *cgrp, const char *name, __u32 len, const char *path)
{
	__u32 level = BPF_CORE_READ(cgrp, level);
	char begin[SCOPE_PREFIX + 1];	/* with a NUL */

	for (__u32 i = 0; i < MAX_SCOPES && i < n_scopes; i++)
		if (scopes[i].kind != SCOPE_CHILD && named(name, len, &scopes[i]))
			return true;
	if (bpf_probe_read_kernel_str(begin, sizeof(begin), path) <= 0)
		return false;
	for (__u32 i = 0; i < MAX_SCOPES && i < n_scopes; i++)
		if (scopes[i].kind == SCOPE_CHILD && level == scopes[i].level && begins(begin, &scopes[i]))
			return true;
	return false;
}

static __always_inline __u64 above(void *ctx, __u32 level)
{
	struct cgroup *cgrp = ctx;

	return level < (__u32)BPF_CORE_READ(cgrp, level) ? ancestor_id(cgrp, level) : 0;
}

/* The policed cgroup that a cgroup is in, itself excluded; NULL if in none. */
static __always_inline const volatile struct policed_cgroup *policed_above(struct cgroup *cgrp)
{
	for (__u32 i = 0; i < MAX_POLICED && policed[i].id; i++)
		if (above(cgrp, policed[i].level) == policed[i].id)
			return &policed[i];
	return NULL;
}

/* Has a container judged without state of its own; 0 if there was room for that. */
static __always_inline long do_without(__u64 id, enum without_state why)
{
	return bpf_map_update_elem(&stateless, &id, &why, BPF_ANY);
}

/* Returns the length of the cgroup's name, which becomes the key's; 0 on an error. */
static __always_inline __u32 read_name(struct cgroup *cgrp, struct name_key *key)
{
	long len = bpf_probe_read_kernel_str(key->name, sizeof(key->name), BPF_CORE_READ(cgrp, kn, name));

	return len > 1 ? len - 1 : 0;
}

SEC("tp_btf/cgroup_mkdir")
int recognise(__u64 *ctx)
{
	struct cgroup *cgrp = (void *)ctx[0];
	const volatile struct policed_cgroup *top;
	struct name_key key = {};
	struct container *c;
	struct past *before;
	__u32 len, depth;
	__u64 id;

	if (cgrp->root->hierarchy_id)	/* cgroup v1 numbers its own */
		return 0;
	top = policed_above(cgrp);
	if (!top)
		return 0;
	depth = cgrp->level - top->level;
	/* No packet of it would be found to be a container's, and status says so. */
	if (depth > MAX_DEPTH)
		return 0;
	key.policed = top->id;
	len = read_name(cgrp, &key);
	before = bpf_map_lookup_elem(&retired, &key);
	if (top->recognises) {
		if (find_known(top->level, above, cgrp, &c) || !is_container(cgrp, key.name, len, (const char *)ctx[1]))
			return 0;
	} else if (!before || depth != 1) {
		return 0;	/* gets its state when it is needed */
	}
	id = cgrp->kn->id;
	c = state_of(id);
	if (!c && top->recognises)
		do_without(id, HAS_NO_ROOM);
	if (c && before) {
		/* A restart does not refill a bucket. */
		c->bucket = before->bucket;
		c->limit = before->limit;
		c->flags = before->flags;
		bpf_map_delete_elem(&retired, &key);
	}
	return 0;
}

/* Keeps what a container takes over when it is started again, and nothing else: the kernel
 * may not release the cgroup for months. Sockets can outlive the directory, and be somebody
 * else's by now. They are still a container's, but open no more mail connections: whoever
 * takes over the bucket has all of it. 5.10 has no lock for programs of this type.
 */
SEC("tp_btf/cgroup_rmdir")
int keep(__u64 *ctx)
{
	struct cgroup *cgrp = (void *)ctx[0];
	const volatile struct policed_cgroup *top;
	struct name_key key = {};
	struct past now = {};
	struct container *c;
	__u64 id;

	if (cgrp->root->hierarchy_id)
		return 0;
	top = policed_above(cgrp);
	if (!top)
		return 0;
	id = cgrp->kn->id;
	c = bpf_map_lookup_elem(&containers, &id);
	if (!c) {
		/* It would get one with a full bucket. */
		if (!top->recognises && cgrp->level == (int)top->level + 1)
			do_without(id, WAS_REMOVED);
		return 0;
	}
	c->bucket.closed = 1;
	now.bucket = c->bucket;
	now.bucket.closed = 0;
	if (c->flags & CONTAINER_LIMIT_SET) {
		now.limit = c->limit;
		now.flags = CONTAINER_LIMIT_SET;
	}
	if (now.bucket.count || now.flags) {	/* else it is as new */
		key.policed = top->id;
		read_name(cgrp, &key);
		bpf_map_update_elem(&retired, &key, &now, BPF_ANY);
	}
	if (!do_without(id, WAS_REMOVED))
		bpf_map_delete_elem(&containers, &id);
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
	bpf_map_delete_elem(&stateless, &id);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
