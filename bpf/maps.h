// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* State. The controller pins it and hands it to the next version of the programs. */
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

/* The id of the first container that was recognised and found no room; 0 if there is
 * none. From there on, whatever is new counts as a container.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} overflow SEC(".maps");

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
	__type(value, struct counters);
} totals SEC(".maps");

/* The SYN that a TCP socket was last let through with. */
struct ticket {
	__u8 dst[16];
	__be32 seq;
	__be16 sport;
	__be16 dport;
	__u32 retransmits;	/* of the socket, when it was let through */
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct ticket);
} tickets SEC(".maps");

/* Mail SYNs on their way from the egress hook to the host. Whoever deletes an entry
 * has used it: each lets one packet pass.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct syn_key);
	__type(value, __u32);
} admitted SEC(".maps");

/* Packets to metadata services on their way to the host: how many of each flow may
 * still pass.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct flow_key);
	__type(value, __u32);
} permitted SEC(".maps");

/* Mail connections that were let through on the host. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct mail_key);
	__type(value, struct mail);
} mails SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);	/* index of a device */
	__type(value, struct device);
} devices SEC(".maps");

#endif
