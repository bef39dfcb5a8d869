// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The policy, as data and constants. It lives and dies with the programs that were
 * loaded with it.
 */
#ifndef EGRESSBPF_POLICY_H
#define EGRESSBPF_POLICY_H

#include "types.h"

#include <bpf/bpf_helpers.h>

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
const volatile bool has_exempt;
const volatile bool has_coarse_clock;	/* bpf_ktime_get_coarse_ns(), 5.11 */
const volatile struct limit default_limit;

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
