// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What the programs and the controller share. bpf2go turns these types into
 * Go; a test holds both layouts against each other.
 */
#ifndef EGRESSBPF_TYPES_H
#define EGRESSBPF_TYPES_H

#include <stdbool.h>
#include <linux/types.h>
#include <linux/bpf.h>

/* Of bytes that are compared and copied as words, not one by one. */
#define AS_WORDS __attribute__((aligned(4)))

/* Where something is refused. */
enum hook {
	HOOK_EGRESS,	/* a packet that leaves a container */
	HOOK_CONNECT,	/* connect() or sendmsg() */
	HOOK_SOCKET,	/* socket() */
	HOOK_HOST,	/* a packet that reaches the host from a container */
};

/* Why it is refused. Indexes arrays that are kept: a new reason goes to the end. */
enum reason {
	REASON_MALFORMED,	/* unreadable, or its header hides where it goes */
	REASON_BLOCKED,		/* destination (or source) on the block list */
	REASON_RATE_LIMITED,	/* a mail connection without a token */
	REASON_NO_BUCKET,	/* a mail connection of a container without state */
	REASON_FAMILY,		/* a socket of a family that the policy refuses */
	REASONS,
	REASON_NONE = REASONS,	/* not refused */
};

/* Kept maps (bpf/maps.h) pass from version to version, in both directions. Their values grow
 * at the end alone, and best into what is spare: then nothing has to be copied. The format is
 * a number that changes when a field comes to mean something else: a version refuses to take
 * over maps of a format that it does not know.
 */
#define FORMAT 2

#define FIRST_REASONS 4	/* those of format 1 */
#define MAX_REASONS 12

struct traffic {
	__u64 packets;
	__u64 bytes;		/* from the IP header on */
};

struct drops {
	__u64 packets;
	__u64 bytes;		/* from the IP header on */
	__u64 connects;		/* attempts refused in connect() or sendmsg() */
};

#define COUNTERS_1                                                                                 \
	struct drops dropped[FIRST_REASONS];                                                       \
	__u64 smtp_allowed;	/* mail connections that took a token */                           \
	__u64 families_denied;	/* refused at HOOK_SOCKET */                                       \
	struct traffic host_side /* refused at HOOK_HOST, whatever the reason */

/* Nothing but __u64 inside: see carry() in bpf/control.bpf.c. */
struct counters {
	COUNTERS_1;
	/* Since format 2. */
	struct drops more_dropped[MAX_REASONS - FIRST_REASONS];	/* goes on where dropped ends */
	struct traffic host_dropped[MAX_REASONS];	/* host_side, by reason */
	__u64 spare[8];
};

struct counters_1 {
	COUNTERS_1;
};

/* count tokens a period, with up to burst at once. A token lasts
 * interval + rest/count nanoseconds, so no rate is rounded.
 */
struct limit {
	__u64 interval;		/* period / count, in ns, rounded down */
	__u64 tolerance;	/* (burst - 1) * period / count, in ns, rounded down */
	__u32 count;		/* 0: unlimited */
	__u32 rest;		/* period % count */
	__u32 burst;		/* 0: no limit is given here */
	__u32 period;		/* in seconds; for display */
};

/* The token bucket, kept as its theoretical arrival time: the moment at which
 * the bucket is full again. Times are in nanoseconds of CLOCK_MONOTONIC.
 */
struct bucket {
	__u64 full_at;
	__u32 rest;		/* fraction of full_at, in 1/count ns */
	/* The limit that it is reckoned with. */
	__u32 count;		/* 0: never used */
	__u64 interval;
	__u32 burst;
	__u32 closed;		/* 1: no token is taken any more */
};

/* What holds for one container alone. */
enum container_flag {
	CONTAINER_METADATA = 1,		/* may reach what the presets block */
	CONTAINER_LIMIT_SET = 2,	/* its limit was set by hand: no rule changes it */
	CONTAINER_FAMILIES = 0x7ffffffc,	/* sockets that it may make, a bit for each family */
};

#define CONTAINER_1                                                                                \
	struct bpf_spin_lock lock; /* of all but counters; up here, where 5.10 looks for it */     \
	enum container_flag flags;                                                                 \
	struct bucket bucket;                                                                      \
	struct limit limit /* its own */

/* Everything kept about a container. Key: id of its cgroup. */
struct container {
	CONTAINER_1;
	struct counters counters;
	__u64 spare[8];
};

struct container_1 {
	CONTAINER_1;
	struct counters_1 counters;
};

/* Sums over all containers. */
struct sums {
	struct counters counters;
	__u32 format;		/* since format 2, of all maps that are kept */
	__u32 reserved;
	__u64 spare[7];
};

_Static_assert(sizeof(struct counters_1) == 128, "format 1 is what it was");
_Static_assert(sizeof(struct container_1) == 200, "format 1 is what it was");
_Static_assert(__builtin_offsetof(struct counters, more_dropped) == sizeof(struct counters_1), "format 1 comes first");
_Static_assert(sizeof(struct container) == 712, "format 2 is what it was");
_Static_assert(sizeof(struct sums) == 640, "format 2 is what it was");

/* Why nothing is kept about a container. */
enum without_state {
	WAS_REMOVED,	/* its cgroup; its sockets may live on */
	HAS_NO_ROOM,
};

/* What all containers behind one device of the host may send past the egress
 * hook. Key: index of the device.
 */
struct device {
	struct bpf_spin_lock lock;
	__u32 reserved;
	struct bucket bucket;
};

/* A mail packet that the egress hook has let through, as the host finds it again. Of a
 * SYN, the container's own NAT may change the source on the way and nothing else, so
 * that src and sport are 0; it acknowledges nothing.
 */
struct announcement {
	__u8 src[16] AS_WORDS;
	__u8 dst[16] AS_WORDS;
	__be32 seq;
	__be32 ack;
	__be16 sport;
	__be16 dport;
};

/* A mail connection as the host sees it. */
struct mail_key {
	__u8 src[16] AS_WORDS;
	__u8 dst[16] AS_WORDS;
	__be16 sport;
	__be16 dport;
};

/* How a mail connection has begun. A server that answers with SYN cookies takes up a
 * connection from any segment with the first number and the acknowledgement of its answer.
 */
struct opening {
	__u32 first;		/* number after the SYN, in host order */
	__u32 ack;		/* the last that was acknowledged with it, in host order */
	__u32 since;		/* when it began, in units of 2^20 ns */
	__u8 answered;		/* 1: more than a SYN was sent */
	__u8 moved;		/* 1: ack is more than the first answer of the server */
	__u8 said;		/* how often data or a FIN was sent with both */
	__u8 silent;		/* how often nothing was */
};

/* Key of the devices trie: a name of network devices, or the beginning of names. */
struct device_name {
	__u32 len;		/* in bits; with its final NUL it is the whole name */
	char name[16];		/* IFNAMSIZ */
};

/* A policed cgroup. */
struct policed_cgroup {
	__u64 id;
	__u32 level;		/* depth below the root */
	__u32 recognises;	/* 0: its children are containers; 1: what is recognised is */
};

/* How deep below a policed cgroup a container is recognised. */
#define MAX_DEPTH 16

/* The hexadecimal digits of a container's id. */
#define CONTAINER_ID 64

#define SCOPE_PREFIX 96
#define SCOPE_SUFFIX 16

/* What the cgroups of containers are called. */
enum scope_kind {
	SCOPE_ID,		/* prefix, id, suffix */
	SCOPE_ANY,		/* prefix, at least one character, suffix */
	SCOPE_BUILD,		/* 25 letters and digits, alone or behind a colon: BuildKit's */
	SCOPE_CHILD,		/* any name, in the directory prefix, which ends with a slash */
};

struct scope {
	enum scope_kind kind;
	__u32 prefix_len;
	__u32 suffix_len;
	__u32 level;		/* SCOPE_CHILD: below the root */
	char prefix[SCOPE_PREFIX];
	char suffix[SCOPE_SUFFIX];
};

/* Packets that the egress hook has let through to a metadata service, as the host
 * finds them again.
 */
struct permit {
	__u32 packets;		/* that may still pass */
	__be32 closing;		/* what the container's kernel sends with after a FIN */
	__u32 closed;		/* 1: there was one */
};

struct flow_key {
	__u8 src[16] AS_WORDS;
	__u8 dst[16] AS_WORDS;
	__be16 sport;
	__be16 dport;
	__u32 proto;
};

/* A container by its name: that of its cgroup, and the policed cgroup that this is in. */
struct name_key {
	__u64 policed;
	char name[256];		/* NAME_MAX and a NUL */
};

/* What a container that is started again takes over from its last time. */
struct past {
	struct bucket bucket;
	struct limit limit;		/* if it was set by hand */
	enum container_flag flags;
	__u32 spare;
};

/* Input of the program configure, behind an Ethernet header: the flags in mask become
 * flags, and the limit becomes limit, unless keep_limit is set or the container has one of
 * the flags in unless.
 */
struct request {
	__u64 id;
	enum container_flag mask;
	enum container_flag flags;
	__u32 keep_limit;
	enum container_flag unless;
	struct limit limit;
};

/* Input of the program carry, behind an Ethernet header and before the counters to move
 * from one map to the map that replaces it.
 */
struct cargo {
	__u64 id;		/* of the container's cgroup; 0: the sums over all */
	__u32 tokens;		/* that were taken since the bucket was copied */
	__u32 reserved;
	struct bucket bucket;	/* replaces one that is unused, or fuller */
};

/* What the policy says of a destination. */
enum rule_flag {
	RULE_ALLOW = 1,		/* wins over all that block */
	RULE_BLOCK = 2,		/* as a destination, for every container */
	RULE_BLOCK_SOURCE = 4,	/* as a source */
	RULE_EXEMPT = 8,	/* mail to it takes no token */
	RULE_METADATA = 16,	/* as a destination, by a preset */
};

/* Key of the rules trie. IPv4 addresses are v4-mapped (::ffff:a.b.c.d) and
 * their prefix lengths are 96 longer.
 */
struct prefix {
	__u32 len;
	__u8 addr[16];		/* network byte order */
};

/* What holds for a prefix, that of the prefixes around it included: the
 * longest match alone tells everything.
 */
struct rule {
	__u32 group;		/* of its port_keys; 0: it has none */
	enum rule_flag flags;	/* for every protocol and port */
};

struct port_key {
	__u32 group;
	__be16 port;		/* 0: every port */
	__u8 proto;		/* 0: every protocol that has ports */
	__u8 reserved;
};

#endif
