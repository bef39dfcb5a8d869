// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What the policy says of an address, a protocol and a port. */
#ifndef EGRESSBPF_RULES_H
#define EGRESSBPF_RULES_H

#include "parse.h"
#include "policy.h"

static __always_inline bool suspect4(__be32 ip)
{
	return suspects4.first[(__u16)ip] && suspects4.second[ip >> 16];
}

/* Set for v4-mapped and NAT64 addresses too, whenever any IPv4 address is. */
static __always_inline bool suspect6(const union address *a)
{
	return suspects6.first[a->be16[0]] && suspects6.second[a->be16[1]];
}

/* Of two addresses: one branch tells most packets from the rest. */
static __always_inline bool either_suspect4(__be32 a, __be32 b)
{
	return ((__u8)suspects4.first[(__u16)a] | (__u8)suspects4.first[(__u16)b]) &&
	       (suspect4(a) || suspect4(b));
}

static __always_inline bool either_suspect6(const union address *a, const union address *b)
{
	return ((__u8)suspects6.first[a->be16[0]] | (__u8)suspects6.first[b->be16[0]]) &&
	       (suspect6(a) || suspect6(b));
}

static __always_inline bool suspect(const union address *a)
{
	return mapped4(a) ? suspect4(a->be32[3]) : suspect6(a);
}

static __always_inline __u32 port_flags(__u32 group, __u8 proto, __be16 port)
{
	struct port_key key = { .group = group, .port = port, .proto = proto };
	enum rule_flag *flags = bpf_map_lookup_elem(&ports, &key);

	return flags ? *flags : 0;
}

static __always_inline __u32 prefix_flags(const union address *a, __u8 proto, bool has_ports, __be16 port)
{
	struct prefix key = { .len = 128 };
	struct rule *rule;
	__u32 flags;

	__builtin_memcpy(key.addr, a, sizeof(key.addr));
	rule = bpf_map_lookup_elem(&rules, &key);
	if (!rule)
		return 0;
	flags = rule->flags;
	if (rule->group) {
		flags |= port_flags(rule->group, proto, 0);
		if (has_ports && port) {
			flags |= port_flags(rule->group, proto, port);
			flags |= port_flags(rule->group, 0, port);
		}
	}
	return flags;
}

/* The flags of every rule that holds for the address, with its port where
 * has_ports says that there is one. What holds for an IPv4 address holds for
 * its NAT64 spelling, beside what the policy says of that.
 */
static __always_inline __u32 rule_flags(const union address *a, __u8 proto, bool has_ports, __be16 port)
{
	__u32 flags = prefix_flags(a, proto, has_ports, port);

	if (nat64(a)) {
		union address embedded;

		map4(&embedded, a->be32[3]);
		flags |= prefix_flags(&embedded, proto, has_ports, port);
	}
	return flags;
}

/* RULE_BLOCK and RULE_METADATA, as they hold for the destination. */
static __always_inline __u32 blocked_destination(const struct flow *f)
{
	__u32 flags;

	if (!suspect(&f->dst))
		return 0;
	flags = rule_flags(&f->dst, f->proto, f->has_ports, f->dport);
	return flags & RULE_ALLOW ? 0 : flags & (RULE_BLOCK | RULE_METADATA);
}

/* Whoever answers a packet sent as the metadata service answers to it. */
static __always_inline bool blocked_source(const struct flow *f)
{
	return suspect(&f->src) &&
	       rule_flags(&f->src, f->proto, f->has_ports, f->sport) & RULE_BLOCK_SOURCE &&
	       !(rule_flags(&f->dst, f->proto, f->has_ports, f->dport) & RULE_ALLOW);
}

static __always_inline bool exempt(const struct flow *f)
{
	return has_exempt && rule_flags(&f->dst, f->proto, f->has_ports, f->dport) & RULE_EXEMPT;
}

#endif
