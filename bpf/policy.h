// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The policy, as data and constants. It belongs to the programs that were loaded with it,
 * and goes with them.
 */
#ifndef EGRESSBPF_POLICY_H
#define EGRESSBPF_POLICY_H

#include "types.h"

#include <bpf/bpf_helpers.h>

/* The controller sets the sizes of these maps to fit the policy. */
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

/* Constants of the loaded policy. The verifier removes the code that they switch off. */
const volatile bool has_exempt;
const volatile bool has_coarse_clock;	/* bpf_ktime_get_coarse_ns(), 5.11 */
const volatile struct limit default_limit;

/* Set for every address that the rules might block: by its first 16 bits and by its second
 * 16 bits, as they are in memory. They keep ordinary packets off the trie, whose cost grows
 * with the policy. Each is a byte rather than a bit, which costs more to find: every packet
 * reads them.
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

/* The sets above by eight bits (fold()) of a port or of the first 16 bits of an address. Most
 * packets read only these few lines of memory, which stay in the CPU's cache. The tables above
 * are too large for that.
 */
struct sketch {
	bool addr4[256];
	bool addr6[256];
	bool mail[256];
};
const volatile struct sketch sketch;

/* The two bytes exclusive or: this keeps apart what belongs to the usual networks (10.0.0.0/8,
 * 172.17.0.0/16, 192.168.0.0/16, 2000::/3) and the usual metadata services.
 */
static __always_inline __u8 fold(__u16 word)
{
	__u32 folded = word ^ word >> 8;

	/* Verifiers before 6.4 do not know the bounds of an exclusive or of 32 bits. The
	 * compiler does, and would leave out the mask that tells them.
	 */
	asm volatile("" : "+r"(folded));
	return folded & 0xff;
}

#endif
