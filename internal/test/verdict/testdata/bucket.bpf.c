//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Asks the token bucket at a moment, and under a limit, of the test's choosing. */
#include "../../../../bpf/bucket.h"

struct ask {
	__u64 now;
	struct limit limit;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bucket);
} buckets SEC(".maps");

__u64 taken;

/* Returns 1 if it took a token, and 2 if the look at the bucket that comes before
 * would have refused it.
 */
SEC("tc")
int take(struct __sk_buff *skb)
{
	struct bucket *b;
	struct ask ask;
	__u32 key = 0;
	bool took, empty;

	b = bpf_map_lookup_elem(&buckets, &key);
	if (!b || bpf_skb_load_bytes(skb, 0, &ask, sizeof(ask)))
		return -1;
	empty = ask.limit.count && bucket_settled(b, &ask.limit) &&
		!bucket_has(b, &ask.limit, ask.now);
	took = bucket_take(b, &ask.limit, ask.now);
	taken += took;
	return took + 2 * empty;
}

char _license[] SEC("license") = "Dual BSD/GPL";
