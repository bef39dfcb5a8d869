// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The types that the programs and the controller share. bpf2go turns them into Go, and a
 * test compares the two layouts.
 */
#ifndef EGRESSBPF_TYPES_H
#define EGRESSBPF_TYPES_H

#include <stdbool.h>
#include <linux/types.h>
#include <linux/bpf.h>

/* For arrays of bytes that are compared and copied as words. */
#define AS_WORDS __attribute__((aligned(4)))

/* Where a packet or a system call is refused. */
enum hook {
	HOOK_EGRESS,	/* a packet that leaves a container */
	HOOK_CONNECT,	/* connect() */
	HOOK_SOCKET,	/* socket() */
	HOOK_HOST,	/* a packet that reaches the host from a container */
	HOOK_SENDMSG,	/* sendmsg(); counted as HOOK_CONNECT */
};

/* Why it is refused. The values index arrays in kept maps, so a new
 * reason goes to the end.
 */
enum reason {
	REASON_MALFORMED,	/* unreadable, or its header hides where it goes */
	REASON_BLOCKED,		/* destination (or source) on the block list */
	REASON_RATE_LIMITED,	/* a mail connection without a token */
	REASON_NO_BUCKET,	/* a mail connection of a container without state */
	REASON_FAMILY,		/* a socket of a family that the policy refuses */
	REASONS,
	REASON_NONE = REASONS,	/* not refused */
};

/* Kept maps (bpf/maps.h) pass from version to version, in both directions. Their values
 * grow only at the end, if possible into spare fields, so that nothing has to be copied.
 * FORMAT changes if a field comes to mean something else: a version refuses to take over
 * maps of a format that it does not know.
 */
#define FORMAT 2

#define FIRST_REASONS 4	/* reasons of format 1 */
#define MAX_REASONS 8

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

/* All fields are __u64: see carry() in bpf/control.bpf.c. */
struct counters {
	COUNTERS_1;
	/* Since format 2. */
	struct drops more_dropped[MAX_REASONS - FIRST_REASONS];	/* continues dropped */
	struct traffic host_dropped[MAX_REASONS];	/* host_side, by reason */
	__u64 spare[2];
};

struct counters_1 {
	COUNTERS_1;
};

/* A limit of count tokens in a period, with up to burst at once. A token lasts interval +
 * rest/count nanoseconds, so no rate is rounded.
 */
struct limit {
	__u64 interval;		/* period / count, in ns, rounded down */
	__u64 tolerance;	/* (burst - 1) * period / count, in ns, rounded down */
	__u32 count;		/* 0: unlimited */
	__u32 rest;		/* period % count */
	__u32 burst;		/* 0: no limit is set here */
	__u32 period;		/* in seconds; only for display */
};

/* The token bucket, kept as its theoretical arrival time: the moment at which it is full
 * again. Times are in nanoseconds of CLOCK_MONOTONIC.
 */
struct bucket {
	__u64 full_at;
	__u32 rest;		/* fraction of full_at, in 1/count ns */
	/* The limit under which it was last used. */
	__u32 count;		/* 0: never used */
	__u64 interval;
	__u32 burst;
	__u32 closed;		/* 1: no tokens can be taken any more */
};

/* Exceptions of a single container. */
enum container_flag {
	CONTAINER_METADATA = 1,		/* may reach what the presets block */
	CONTAINER_LIMIT_SET = 2,	/* its limit was set by hand: no rule changes it */
	CONTAINER_FAMILIES = 0x7ffffffc,	/* socket families that it may use, a bit for each */
};

#define CONTAINER_1                                                                                \
	struct bpf_spin_lock lock; /* of everything but counters; 5.10 requires it here */         \
	enum container_flag flags;                                                                 \
	struct bucket bucket;                                                                      \
	struct limit limit /* of this container */

/* Everything that is kept about a container. Key: the id of its cgroup. */
struct container {
	CONTAINER_1;
	struct counters counters;
	__u64 spare[1];
};

struct container_1 {
	CONTAINER_1;
	struct counters_1 counters;
};

/* Sums over all containers. */
struct sums {
	struct counters counters;
	__u32 format;		/* of all kept maps; since format 2 */
	__u32 reserved;
	__u64 spare[7];
};

_Static_assert(sizeof(struct counters_1) == 128, "format 1 is what it was");
_Static_assert(sizeof(struct container_1) == 200, "format 1 is what it was");
/* With the kernel's own fields, an entry of the map takes 512 bytes; the next size that the
 * kernel allocates is twice that.
 */
_Static_assert(sizeof(struct container) == 448, "format 2 is what it was");
_Static_assert(sizeof(struct sums) == 432, "format 2 is what it was");
_Static_assert(__builtin_offsetof(struct counters, more_dropped) == sizeof(struct counters_1), "format 1 comes first");

/* Why a container has no state. */
enum without_state {
	WAS_REMOVED,	/* its cgroup was; its sockets may live on */
	HAS_NO_ROOM,
};

/* What all containers behind one device of the host may send past the egress hook. Key: the
 * index of the device.
 */
struct device {
	struct bpf_spin_lock lock;
	__u32 reserved;
	struct bucket bucket;
};

/* A mail packet that the egress hook let through, as the host recognises it. On its way,
 * the container's own NAT may change the source of a SYN, and nothing else. So src and
 * sport of a SYN are 0; ack is 0 too, since a SYN acknowledges nothing.
 */
struct announcement {
	__u8 src[16] AS_WORDS;
	__u8 dst[16] AS_WORDS;
	__be32 seq;
	__be32 ack;
	__be16 sport;
	__be16 dport;
};

/* A mail connection, as the host sees it. */
struct mail_key {
	__u8 src[16] AS_WORDS;
	__u8 dst[16] AS_WORDS;
	__be16 sport;
	__be16 dport;
};

/* How a mail connection began. A server that answers with SYN cookies accepts a connection
 * from any segment with the first sequence number that acknowledges the server's answer.
 */
struct opening {
	__u32 first;		/* sequence number after the SYN, in host order */
	__u32 ack;		/* the last acknowledgement sent with first, in host order */
	__u32 since;		/* when it began, in units of 2^20 ns */
	__u8 answered;		/* 1: more than a SYN was sent */
	__u8 moved;		/* 1: ack is beyond the server's first answer */
	__u8 said;		/* how often data or a FIN was sent with first and ack */
	__u8 silent;		/* how often a segment without either was */
};

/* Key of the trie device_names: the name of a network device, or the beginning of such
 * names.
 */
struct device_name {
	__u32 len;		/* in bits; with the final NUL, key is a whole name */
	char name[16];		/* IFNAMSIZ */
};

/* A policed cgroup. */
struct policed_cgroup {
	__u64 id;
	__u32 level;		/* depth below the root */
	__u32 recognises;	/* 0: each child is a container; 1: containers are recognised by name */
};

/* How many cgroups can be policed. */
#define MAX_POLICED 8

/* How many levels below a policed cgroup containers are recognised. */
#define MAX_DEPTH 16

/* Length of a container's id, in hexadecimal digits. */
#define CONTAINER_ID 64

#define SCOPE_PREFIX 96
#define SCOPE_SUFFIX 16

/* The forms of names that the cgroups of containers have. */
enum scope_kind {
	SCOPE_ID,		/* prefix, id, suffix */
	SCOPE_ANY,		/* prefix, at least one character, suffix */
	SCOPE_BUILD,		/* 25 letters and digits, alone or behind a colon (BuildKit) */
	SCOPE_CHILD,		/* any name in the directory prefix, which ends with a slash */
};

struct scope {
	enum scope_kind kind;
	__u32 prefix_len;
	__u32 suffix_len;
	__u32 level;		/* SCOPE_CHILD: depth below the root */
	char prefix[SCOPE_PREFIX];
	char suffix[SCOPE_SUFFIX];
};

/* Packets to a metadata service that the egress hook let through, as the host recognises
 * them.
 */
struct permit {
	__u32 packets;		/* how many may still pass */
	__be32 closing;		/* the sequence number that the container's kernel sends after a FIN */
	__u32 closed;		/* 1: a FIN was sent */
};

struct flow_key {
	__u8 src[16] AS_WORDS;
	__u8 dst[16] AS_WORDS;
	__be16 sport;
	__be16 dport;
	__u32 proto;
};

/* A container by name: the name of its cgroup, and the policed cgroup that it is in. */
struct name_key {
	__u64 policed;
	char name[256];		/* NAME_MAX and a NUL */
};

/* What a container takes over when it is started again under its name. */
struct past {
	struct bucket bucket;
	struct limit limit;		/* if it was set by hand */
	enum container_flag flags;
	__u32 spare;
};

/* What holds for the containers of a pod from their start. */
struct pod {
	enum container_flag flags;
	__u32 reserved;
	struct limit limit;
};

/* Input of the program configure, behind an Ethernet header. The flags in mask become those
 * in flags, and the limit becomes limit, unless keep_limit is set or the container has one
 * of the flags in unless.
 */
struct request {
	__u64 id;
	enum container_flag mask;
	enum container_flag flags;
	__u32 keep_limit;
	enum container_flag unless;
	struct limit limit;
};

/* Input of the program carry, behind an Ethernet header. The counters follow, which carry
 * moves from one map to the map that replaces it.
 */
struct cargo {
	__u64 id;		/* of the container's cgroup; 0: the totals */
	__u64 debt;		/* of tokens taken since the bucket was copied, in ns */
	struct bucket bucket;	/* replaces a bucket that is unused or fuller */
};

/* What the policy says about an address. */
enum rule_flag {
	RULE_ALLOW = 1,		/* wins over every block */
	RULE_BLOCK = 2,		/* blocked as a destination, for every container */
	RULE_BLOCK_SOURCE = 4,	/* blocked as a source */
	RULE_EXEMPT = 8,	/* mail to it takes no token */
	RULE_METADATA = 16,	/* blocked as a destination, by a preset */
};

/* Key of the rules trie. IPv4 addresses are v4-mapped (::ffff:a.b.c.d) and
 * their prefix lengths are 96 longer.
 */
struct prefix {
	__u32 len;
	__u8 addr[16];		/* network byte order */
};

/* What holds for a prefix. It includes what holds for the prefixes around it, so the
 * longest match is enough.
 */
struct rule {
	__u32 group;		/* of its entries in ports; 0: it has none */
	enum rule_flag flags;	/* for every protocol and port */
};

struct port_key {
	__u32 group;
	__be16 port;		/* 0: every port */
	__u8 proto;		/* 0: every protocol that has ports */
	__u8 reserved;
};

/* A process, as the host sees it. */
struct process {
	__u32 pid;		/* 0: not known */
	__u32 uid;
	__u8 comm[16];		/* ends with a NUL */
};

/* A refusal, as readers get it. It grows only at the end: a reader takes what it knows. */
struct event {
	__u64 time;		/* in ns of CLOCK_MONOTONIC */
	__u64 container;	/* id of its cgroup; 0: not known */
	__u8 src[16] AS_WORDS;	/* network byte order; IPv4 is v4-mapped; all 0: not known */
	__u8 dst[16] AS_WORDS;
	__be16 sport;		/* 0: none, or not known */
	__be16 dport;
	__u16 proto;
	__u16 family;		/* of a socket; 0 otherwise */
	__u32 bytes;		/* of a packet, from the IP header on */
	__u32 device;		/* index of the device by which it reached the host; or 0 */
	enum hook hook;
	enum reason reason;
	struct process process;
	__u32 refused;		/* 0: only counted, since the mode is audit */
	__u32 reserved;
};
_Static_assert(sizeof(struct event) == 104, "no padding");

/* How many can read events at the same time. */
#define MAX_READERS 8

/* A reader of events. Its buffer is in buffers, at the same index. */
struct reader {
	__u64 until;		/* gets events until then, in ns of CLOCK_MONOTONIC */
	__u64 lost;		/* events for which its buffer had no room */
	__u64 owner;		/* when it came, which tells it from all others; 0: the place is free */
	__u64 reserved;
};

/* The readers change this in memory that they share with the programs. */
struct audience {
	union {
		__u8 waiting[MAX_READERS];	/* 1: the reader gets events */
		__u64 any;			/* 0: nobody does */
	};
	__u64 reserved[7];	/* each refusal reads any, and a flood writes what follows */
	__u64 left_out;		/* events that nobody got, since their containers had too many */
	__u64 lost;		/* sum over all readers, with those that are gone */
	__u64 reserved2[6];
	struct reader reader[MAX_READERS];
};

/* How many events of one container readers get: EVENTS_BURST at once, then one for each
 * EVENTS_INTERVAL, in ns. So a flood of one container hides nothing of another.
 */
#define EVENTS_BURST 50
#define EVENTS_INTERVAL (100 * 1000 * 1000ULL)

/* Key of what is noted about the events of a container: the id of its cgroup, or, where the
 * host does not know the container, the index of the device with this bit.
 */
#define EVENTS_OF_DEVICE (1ULL << 63)

struct telling {
	__u64 full_at;		/* when as many as EVENTS_BURST can be told again */
	__u64 left_out;		/* how many events were not told */
};

/* What a container asked for and was not refused, since the mode is audit. */
struct seen_key {
	__u64 container;
	__u8 dst[16] AS_WORDS;
	__be16 dport;
	__u16 proto;
	__u16 family;
	__u8 reason;
	__u8 reserved;
};
_Static_assert(sizeof(struct seen_key) == 32, "no padding");

/* A time in which no more than most of a sighting lie: it reaches into two slots at most. */
#define SEEN_SLOT (60 * 1000 * 1000 * 1000ULL)

struct sighting {
	__u64 count;
	__u64 first;		/* in ns of CLOCK_MONOTONIC */
	__u64 last;
	__u64 slot;		/* that of last */
	__u64 in_slot;		/* how many were in it, and in the slot before */
	__u64 in_slot_before;
	__u64 most;		/* in any two slots, one after the other */
};

#endif
