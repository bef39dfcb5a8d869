// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What may be sent once a mail connection has been paid for, and what could open another. */
#ifndef EGRESSBPF_OPENING_H
#define EGRESSBPF_OPENING_H

#include "parse.h"
#include "policy.h"

static __always_inline bool says(const struct flow *f)
{
	return f->payload || f->flags & TCP_FIN;
}

/* Now, as openings know it: in milliseconds, or nearly so. */
static __always_inline __u32 moment(void)
{
	return (has_coarse_clock ? bpf_ktime_get_coarse_ns() : bpf_ktime_get_ns()) >> 20;
}

/* A connection that begins with a packet, whichever that is. */
static __always_inline struct opening begin_opening(const struct flow *f)
{
	struct opening o = { .first = bpf_ntohl(f->seq), .since = moment() };

	if (opens(f)) {
		o.first++;
		/* A server that takes fast open has a connection from this. */
		o.said = !!f->payload;
		return o;
	}
	o.ack = bpf_ntohl(f->ack);
	o.answered = 1;
	o.said = says(f);
	o.silent = !says(f);
	return o;
}

/* Whether a SYN that repeats the first one opens nothing but what that would. */
static __always_inline bool opens_no_more(const struct opening *o, const struct flow *f)
{
	return o->first == bpf_ntohl(f->seq) + 1 && !o->answered && !o->said && !f->payload;
}

/* A SYN cookie holds which of four MSS it is (net/ipv4/syncookies.c), so that four
 * acknowledgements in a row belong to the same one. What a server says first is longer than
 * that, and shorter than MAX_MOVE.
 */
#define MIN_MOVE 4
#define MAX_MOVE (1 << 20)

/* Linux takes its cookies for two minutes, others for less; openings are as old in 5 minutes. */
#define COOKIE_AGE 286000

/* How soon after its acknowledgement a client that speaks first says something. */
#define SPEAKS_FIRST 240

/* How often a kernel repeats what it has said, for two minutes or so, answers probes, and
 * answers the answer to its SYN, which is repeated if its own was lost.
 */
#define MAX_SAID 15
#define MAX_SILENT 60
#define MAX_ANSWERS 5

/* What a segment is to a connection that has been paid for. */
enum standing {
	GOES_ON,
	REPEATS,	/* as a kernel does */
	OPENS_AGAIN,	/* a server with SYN cookies that has forgotten the connection takes it up */
	TOO_MUCH,	/* so would this, and somebody else has asked for it */
};

/* Judges a segment that is not a SYN, and notes that it was sent. A kernel acknowledges the
 * server's answer, and says something or waits for the server to speak. If it repeats the
 * former, a server that has forgotten the connection takes it up once more; nothing here
 * tells whether it has, or the segment was lost.
 */
static __always_inline enum standing go_on(struct opening *o, const struct flow *f)
{
	__u32 move, age;

	if (!o->answered) {
		if (bpf_ntohl(f->seq) == o->first)
			*o = begin_opening(f);
		o->answered = 1;
		return GOES_ON;
	}
	if (bpf_ntohl(f->seq) != o->first)
		return GOES_ON;
	age = moment() - o->since;
	if (age > COOKIE_AGE)
		return GOES_ON;
	move = bpf_ntohl(f->ack) - o->ack;
	if (move >= MIN_MOVE && move <= MAX_MOVE) {
		o->ack = bpf_ntohl(f->ack);
		o->moved = 1;
		o->said = says(f);
		o->silent = !says(f);
		return GOES_ON;
	}
	/* A kernel does not take back what it has acknowledged. */
	if (move + MIN_MOVE > 2 * MIN_MOVE)
		return says(f) ? OPENS_AGAIN : TOO_MUCH;
	if (says(f)) {
		if (!o->said && (o->moved || age < SPEAKS_FIRST)) {
			o->said = 1;
			return GOES_ON;
		}
		if (!o->moved || o->said >= MAX_SAID)
			return OPENS_AGAIN;
		o->said++;
		return REPEATS;
	}
	if (!o->silent) {
		o->silent = 1;
		return GOES_ON;
	}
	/* A kernel does not send this by itself, so that it is not the container that pays. */
	if (o->silent >= (o->moved ? MAX_SILENT : MAX_ANSWERS))
		return TOO_MUCH;
	o->silent++;
	return REPEATS;
}

#endif
