//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Follows containers as they come and go. If a policed cgroup also holds other things, such
 * as systemd's slices, a container is recognised by the name of its cgroup as soon as the
 * cgroup is made: the kernel runs recognise() within mkdir, before a process can be in the
 * cgroup.
 */
#include "cgroup.h"
#include "owner.h"

/* The policed cgroups, up to the first whose id is 0. */
const volatile struct policed_cgroup policed[MAX_POLICED];

#define MAX_SCOPES 32
const volatile struct scope scopes[MAX_SCOPES];
const volatile __u32 n_scopes;

/* The length of a buffer for any name. */
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

/* The length of a BuildKit identity (identity.NewID). Something and a colon precede it if
 * BuildKit takes the parent for one that systemd manages.
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

/* Whether a name of len characters matches the scope. */
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

/* Whether the cgroup with this name of len characters, at this path, is a container's. */
static __always_inline bool is_container(struct cgroup *cgrp, const char *name, __u32 len, const char *path)
{
	__u32 level = BPF_CORE_READ(cgrp, level);
	char begin[SCOPE_PREFIX + 1];	/* with room for a NUL */

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

/* The policed cgroup that contains cgrp; NULL if there is none. A policed cgroup does not
 * contain itself.
 */
static __always_inline const volatile struct policed_cgroup *policed_above(struct cgroup *cgrp)
{
	for (__u32 i = 0; i < MAX_POLICED && policed[i].id; i++)
		if (above(cgrp, policed[i].level) == policed[i].id)
			return &policed[i];
	return NULL;
}

/* Makes a container one without state. Returns 0 if the map had room. */
static __always_inline long do_without(__u64 id, enum without_state why)
{
	return bpf_map_update_elem(&stateless, &id, &why, BPF_ANY);
}

/* Reads the cgroup's name into key and returns its length; 0 on an error. */
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
	struct pod *pod;
	__u32 len, depth;
	__u64 id;

	if (cgrp->root->hierarchy_id)	/* ids of cgroup v1 are separate */
		return 0;
	top = policed_above(cgrp);
	if (!top)
		return 0;
	depth = cgrp->level - top->level;
	/* find_known() does not look this deep; status reports such a container. */
	if (depth > MAX_DEPTH)
		return 0;
	key.policed = top->id;
	len = read_name(cgrp, &key);
	before = bpf_map_lookup_elem(&retired, &key);
	if (top->recognises) {
		if (find_known(top->level, above, cgrp, &c) || !is_container(cgrp, key.name, len, (const char *)ctx[1]))
			return 0;
	} else if (!before || depth != 1) {
		return 0;	/* gets its state when it first needs it */
	}
	id = cgrp->kn->id;
	c = state_of(id);
	if (!c && top->recognises)
		do_without(id, HAS_NO_ROOM);
	id = above(cgrp, cgrp->level - 1);
	pod = bpf_map_lookup_elem(&pods, &id);
	if (c && pod) {
		c->limit = pod->limit;
		c->flags = pod->flags;
	}
	if (c && before) {
		/* A restart does not refill a bucket. */
		c->bucket = before->bucket;
		if (before->flags) {	/* a limit that was set by hand */
			c->limit = before->limit;
			c->flags |= before->flags;
		}
		bpf_map_delete_elem(&retired, &key);
	}
	return 0;
}

/* Keeps what a container takes over when it is started again, and nothing else: the kernel
 * may not release the cgroup for months. The container's sockets can outlive the directory
 * and pass to other processes. They stay the container's, but open no more mail
 * connections, since the restarted container takes over the whole bucket. Takes no lock:
 * 5.10 has none for programs of this type.
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
	bpf_map_delete_elem(&pods, &id);
	c = bpf_map_lookup_elem(&containers, &id);
	if (!c) {
		/* Otherwise a socket that lives on would get an entry
		 * with a full bucket.
		 */
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
	if (now.bucket.count || now.flags) {	/* otherwise it is like new */
		key.policed = top->id;
		read_name(cgrp, &key);
		bpf_map_update_elem(&retired, &key, &now, BPF_ANY);
	}
	/* Versions of format 1 have no other way to know whose its sockets are. */
	if (format >= 2 && !do_without(id, WAS_REMOVED))
		bpf_map_delete_elem(&containers, &id);
	return 0;
}

/* Forgets a container once the kernel releases its cgroup, after the
 * last of its sockets.
 */
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
