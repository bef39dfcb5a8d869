// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The state. The controller pins these maps and hands them to the next version of the
 * programs: some with their contents (internal/maps, Kept), the others if they still fit.
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

/* Containers that have no entry in containers. Their packets are judged, and none opens a
 * mail connection. The kernel may keep a removed cgroup for a long time, and as many of
 * them as memory allows.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, __u64);	/* cgroup id */
	__type(value, enum without_state);
} stateless SEC(".maps");

/* Containers whose cgroups were removed after they had used their bucket or got a limit by
 * hand.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct name_key);
	__type(value, struct past);
} retired SEC(".maps");

/* Pods of Kubernetes to which a rule gives something, which the controller knows as soon as the
 * pod's sandbox exists. Their containers follow. The kernel never uses an id again, and the entry
 * goes with the pod's cgroup.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u64);	/* id of the pod's cgroup */
	__type(value, struct pod);
} pods SEC(".maps");

/* Sums over all containers, including those that are gone or never had state. */
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
	__u32 retransmits;	/* of the socket, when its SYN last passed */
	__u64 announced;	/* when the host side was last told of the connection, in ns */
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct ticket);
} tickets SEC(".maps");

/* Mail packets on their way from the egress hook to the host. The value is the time at
 * which the egress hook let the packet through, in ns. Deleting an entry uses it up: each
 * entry lets one packet pass.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct announcement);
	__type(value, __u64);
} admitted SEC(".maps");

/* How long an announcement is valid. A container that holds back SYNs, to release them all
 * at once, has to pay for them again.
 */
#define ANNOUNCED_NS (1000 * 1000 * 1000ULL)

/* How many packets of each flow to a metadata service may still pass on the host. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct flow_key);
	__type(value, struct permit);
} permitted SEC(".maps");

/* Mail connections that the host side has let through. */
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

/* UDP ports that are closed to containers. 1: a socket of the host unpacks packets from its
 * datagrams; 0: one may do so later.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __be16);
	__type(value, __u8);
} tunnels SEC(".maps");

/* Who reads events. Memory that is shared with the readers. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct audience);
} readers SEC(".maps");

/* The readers' buffers. A ring buffer has one consumer, so each reader brings its own. */
struct buffer {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);	/* the reader chooses */
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_READERS);
	__type(key, __u32);
	__array(values, struct buffer);
} buffers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);	/* see EVENTS_OF_DEVICE */
	__type(value, struct telling);
} tellings SEC(".maps");

/* The processes that have opened mail connections: when a packet is refused, nothing else
 * tells whose it is. Noted only while somebody reads events.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct process);
} callers SEC(".maps");

/* Only in mode audit. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct seen_key);
	__type(value, struct sighting);
} seen SEC(".maps");

#endif
