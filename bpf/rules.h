// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What the policy says about an address, a protocol and a port. */
#ifndef EGRESSBPF_RULES_H
#define EGRESSBPF_RULES_H

#include "parse.h"
#include "policy.h"

static __always_inline bool suspect4(__be32 ip)
{
	return suspects4.first[(__u16)ip] && suspects4.second[ip >> 16];
}

/* If any IPv4 address is suspect, so are all IPv6 prefixes that can embed one. */
static __always_inline bool suspect6(const union address *a)
{
	return suspects6.first[a->be16[0]] && suspects6.second[a->be16[1]];
}

/* One check for both addresses of a packet: for most packets, a single branch. */
static __always_inline bool either_suspect4(__be32 a, __be32 b)
{
	return ((__u8)sketch.addr4[fold(a)] | (__u8)sketch.addr4[fold(b)]) && (suspect4(a) || suspect4(b));
}

static __always_inline bool either_suspect6(const union address *a, const union address *b)
{
	return ((__u8)sketch.addr6[fold(a->be16[0])] | (__u8)sketch.addr6[fold(b->be16[0])]) &&
	       (suspect6(a) || suspect6(b));
}

static __always_inline bool suspect(const union address *a)
{
	return mapped4(a) ? suspect4(a->be32[3]) : suspect6(a);
}

/* False for most addresses that are not suspect. */
static __always_inline bool near_suspect(const union address *a)
{
	return mapped4(a) ? sketch.addr4[fold(a->be16[6])] : sketch.addr6[fold(a->be16[0])];
}

static __always_inline __u32 port_flags(__u32 group, __u8 proto, __be16 port)
{
	struct port_key key = { .group = group, .port = port, .proto = proto };
	enum rule_flag *flags = bpf_map_lookup_elem(&ports, &key);

	return flags ? *flags : 0;
}

/* The protocol and port of a packet at one of its addresses. */
struct service {
	__u8 proto;
	bool has_ports;
	__be16 port;
};

static __always_inline __u32 prefix_flags(const union address *a, struct service s)
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
		flags |= port_flags(rule->group, s.proto, 0);
		if (s.has_ports && s.port) {
			flags |= port_flags(rule->group, s.proto, s.port);
			flags |= port_flags(rule->group, 0, s.port);
		}
	}
	return flags;
}

/* Which bytes of an IPv6 address hold the IPv4 address that it embeds. */
struct spelling {
	__u8 at[4];
};

static __always_inline __u32 spelling_flags(const union address *a, struct spelling at, struct service s)
{
	union address embedded = { .be16[5] = 0xffff };

	for (int i = 0; i < 4; i++)
		embedded.bytes[12 + i] = a->bytes[at.at[i]];
	return prefix_flags(&embedded, s);
}

/* Whether the address is in 64:ff9b::/96 (NAT64, RFC 6052) or in ::/96 (RFC 4291, 2.5.5.1),
 * which embed all of IPv4. In ::/96, ::/104 does not count: :: and ::1 are there.
 */
static __always_inline bool embeds_at_end(const union address *a)
{
	return (a->be32[0] == bpf_htonl(0x64ff9b) || (!a->be32[0] && a->bytes[12])) && !a->be32[1] && !a->be32[2];
}

/* Whether the address is in 64:ff9b:1::/48 (RFC 8215). A host may use any part of it for
 * NAT64, with prefixes of 48, 56, 64 or 96 bits (RFC 6052, 2.2).
 */
static __always_inline bool local_nat64(const union address *a)
{
	return a->be32[0] == bpf_htonl(0x64ff9b) && a->be16[2] == bpf_htons(1);
}

/* The flags that block such a spelling; none if the spelling is allowed. An address that is
 * read with the wrong one of these prefixes begins or ends with a zero byte.
 */
static __always_inline __u32 local_nat64_flags(const union address *a, struct spelling at, struct service s)
{
	__u32 flags;

	if (!a->bytes[at.at[0]] || !a->bytes[at.at[3]])
		return 0;
	flags = spelling_flags(a, at, s);
	return flags & RULE_ALLOW ? 0 : flags & (RULE_BLOCK | RULE_BLOCK_SOURCE | RULE_METADATA);
}

/* Whether the address is in 2002::/16 (6to4, RFC 3056). */
static __always_inline bool six_to_four(const union address *a)
{
	return a->be16[0] == bpf_htons(0x2002);
}

#ifndef RULES_LINKAGE
#define RULES_LINKAGE static __always_inline
#endif

/* The flags of every rule for the address whose halves are given, and for its port if it
 * has one. A rule for an IPv4 address holds for its other spellings too, as do rules for
 * those spellings themselves.
 *
 * Programs that have global functions anyway make this one global, so that the verifier
 * checks it once. Global functions take only numbers before 5.12.
 */
RULES_LINKAGE __u32 address_flags(__u64 high, __u64 low, __u8 proto, __u8 has_ports, __be16 port)
{
	const struct spelling end = { { 12, 13, 14, 15 } }, bits16 = { { 2, 3, 4, 5 } }, bits48 = { { 6, 7, 9, 10 } },
			      bits56 = { { 7, 9, 10, 11 } }, bits64 = { { 9, 10, 11, 12 } };
	struct service s = { proto, has_ports, port };
	union address a = { .be64 = { high, low } };
	__u32 flags = prefix_flags(&a, s);

	if (embeds_at_end(&a))
		flags |= spelling_flags(&a, end, s);
	else if (six_to_four(&a))
		flags |= spelling_flags(&a, bits16, s);
	else if (local_nat64(&a))
		flags |= local_nat64_flags(&a, end, s) | local_nat64_flags(&a, bits64, s) |
			 local_nat64_flags(&a, bits56, s) | local_nat64_flags(&a, bits48, s);
	return flags;
}

static __always_inline __u32 rule_flags(const union address *a, struct service s)
{
	return address_flags(a->be64[0], a->be64[1], s.proto, s.has_ports, s.port);
}

static __always_inline __u32 flags_to(const struct flow *f)
{
	return rule_flags(&f->dst, (struct service){ f->proto, f->has_ports, f->dport });
}

static __always_inline __u32 flags_from(const struct flow *f)
{
	return rule_flags(&f->src, (struct service){ f->proto, f->has_ports, f->sport });
}

/* Why a packet may not pass: RULE_BLOCK and RULE_METADATA of its destination, and
 * RULE_BLOCK_SOURCE of its source. A packet whose source is the metadata service is blocked
 * because its answer would go there.
 */
static __always_inline __u32 blocked(const struct flow *f)
{
	__u32 to, from = 0;

	if (!suspect(&f->dst) && !suspect(&f->src))
		return 0;
	to = flags_to(f);
	if (to & RULE_ALLOW)
		return 0;
	if (suspect(&f->src))
		from = flags_from(f);
	return (to & (RULE_BLOCK | RULE_METADATA)) | (from & RULE_BLOCK_SOURCE);
}

static __always_inline bool exempt(const struct flow *f)
{
	return has_exempt && flags_to(f) & RULE_EXEMPT;
}

#endif
