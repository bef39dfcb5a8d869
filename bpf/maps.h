// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* State. The controller pins it and hands it to the next version of the programs: the first
 * four maps with all that is in them (internal/maps, Kept), the others where they still fit.
 */
#ifndef EGRESSBPF_MAPS_H
#define EGRESSBPF_MAPS_H

#include "types.h"

#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u64);	/* cgroup id */
	__type(value, struct container);
} containers SEC(".maps");

/* Containers without an entry there: what they send is judged, and none of it opens a mail
 * connection. The kernel may keep a cgroup for long after it was removed, and as many as
 * there is memory for.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, __u64);	/* cgroup id */
	__type(value, enum without_state);
} stateless SEC(".maps");

/* Containers whose cgroups were removed, and that had used their bucket. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct name_key);
	__type(value, struct past);
} retired SEC(".maps");

/* Sums over all containers, those that are gone or never got state included. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sums);
} totals SEC(".maps");

/* The mail connection that a TCP socket has paid for. */
struct ticket {
	__u8 src[16] AS_WORDS;
	__u8 dst[16] AS_WORDS;
	__be16 sport;
	__be16 dport;
	struct opening opening;
	__u32 retransmits;	/* of the socket, when its SYN was last let through */
	__u64 announced;	/* when the host side was last told of it, in ns */
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct ticket);
} tickets SEC(".maps");

/* Mail on its way from the egress hook to the host: when it was let through, in ns.
 * Whoever deletes an entry has used it: each lets one packet pass.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct announcement);
	__type(value, __u64);
} admitted SEC(".maps");

/* How long an announcement is good for. Whoever holds SYNs back on the way, to let them
 * go all at once, has to pay for them again.
 */
#define ANNOUNCED_NS (1000 * 1000 * 1000ULL)

/* Packets to metadata services on their way to the host: how many of each flow may
 * still pass.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct flow_key);
	__type(value, struct permit);
} permitted SEC(".maps");

/* Mail connections that were let through on the host. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct mail_key);
	__type(value, struct opening);
} mails SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);	/* index of a device */
	__type(value, struct device);
} devices SEC(".maps");

/* UDP ports at which the host unpacks packets from others: 1, or 0 where it may. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __be16);
	__type(value, __u8);
} tunnels SEC(".maps");

#endif
