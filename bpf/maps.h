// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* State, and policy as data. The controller pins the first three and hands
 * them to the next version of the programs; the others live and die with the
 * programs that were loaded with them.
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

/* Sized by the controller to the policy. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct prefix);
	__type(value, struct rule);
} rules SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct port_key);
	__type(value, enum rule_flag);
} ports SEC(".maps");

/* Constants of the loaded policy. The verifier prunes what they switch off. */
const volatile bool enforce = true;	/* false: count, drop nothing */
const volatile bool over_limit_reject;	/* refuse in connect() what has no token */
const volatile bool has_exempt;
const volatile bool has_set_retval;	/* bpf_set_retval(), 5.18 */
const volatile bool has_coarse_clock;	/* bpf_ktime_get_coarse_ns(), 5.11 */
const volatile struct limit default_limit;

/* The cgroup that this instance polices, and its depth below the root. */
const volatile __u64 policed_id;
const volatile __u32 policed_level;

/* Set for every address the rules might block: by its first 16 bits, and by its
 * second 16 bits, as they lie in memory. They keep the trie, whose cost grows with
 * the policy, off the path of ordinary packets. A byte each, since every packet
 * reads them: a bit costs more to find.
 */
#define WORDS 65536
struct suspects {
	bool first[WORDS];
	bool second[WORDS];
};
const volatile struct suspects suspects4;
const volatile struct suspects suspects6;

/* By port, in network byte order. */
const volatile bool smtp_ports[WORDS];

#endif
