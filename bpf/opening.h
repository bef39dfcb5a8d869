// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What a mail connection may send once it is paid for, and which segments could open
 * another.
 */
#ifndef EGRESSBPF_OPENING_H
#define EGRESSBPF_OPENING_H

#include "parse.h"
#include "policy.h"

static __always_inline bool says(const struct flow *f)
{
	return f->payload || f->flags & TCP_FIN;
}

/* The current time in the unit of struct opening: 2^20 ns, about a millisecond. */
static __always_inline __u32 moment(void)
{
	return (has_coarse_clock ? bpf_ktime_get_coarse_ns() : bpf_ktime_get_ns()) >> 20;
}

/* A connection whose first packet is f, whatever kind of segment that is. */
static __always_inline struct opening begin_opening(const struct flow *f)
{
	struct opening o = { .first = bpf_ntohl(f->seq), .since = moment() };

	if (opens(f)) {
		o.first++;
		/* If the SYN carries data, a server that accepts TCP fast open has a
		 * connection already.
		 */
		o.said = !!f->payload;
		return o;
	}
	o.ack = bpf_ntohl(f->ack);
	o.answered = 1;
	o.said = says(f);
	o.silent = !says(f);
	return o;
}

/* Whether a SYN is a repeat of the first one and can open no other connection. */
static __always_inline bool opens_no_more(const struct opening *o, const struct flow *f)
{
	return o->first == bpf_ntohl(f->seq) + 1 && !o->answered && !o->said && !f->payload;
}

/* A SYN cookie encodes one of four MSS values (net/ipv4/syncookies.c), so up to four
 * consecutive acknowledgement numbers belong to the same cookie. The first words of a
 * server are at least MIN_MOVE bytes, and shorter than MAX_MOVE.
 */
#define MIN_MOVE 4
#define MAX_MOVE (1 << 20)

/* Linux accepts its cookies for two minutes, others for less. This is 5 minutes in units of
 * 2^20 ns.
 */
#define COOKIE_AGE 286000

/* How soon after its acknowledgement a client that speaks first sends data, in units of
 * 2^20 ns.
 */
#define SPEAKS_FIRST 240

/* How often a kernel repeats data in about two minutes (MAX_SAID), answers probes
 * (MAX_SILENT), and answers a repeated SYN-ACK, which the server repeats if the
 * acknowledgement was lost (MAX_ANSWERS).
 */
#define MAX_SAID 15
#define MAX_SILENT 60
#define MAX_ANSWERS 5

/* How a segment relates to a connection that was paid for. */
enum standing {
	GOES_ON,
	REPEATS,	/* a repeat, as a kernel sends it */
	OPENS_AGAIN,	/* could open the connection again at a server with SYN cookies that has forgotten it */
	TOO_MUCH,	/* could do that too, but somebody else has asked for it */
};

/* Judges a segment that is not a SYN, and notes that it was sent. A kernel acknowledges the
 * server's answer, and then sends data or waits for the server to speak. If the kernel
 * repeats its first data, a server that has forgotten the connection opens it once more.
 * Nothing here shows whether the server has forgotten it or the segment was lost.
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
	/* A kernel does not take back an acknowledgement. */
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
	/* A kernel does not send this unless somebody else asks for it, so the container
	 * does not pay for it.
	 */
	if (o->silent >= (o->moved ? MAX_SILENT : MAX_ANSWERS))
		return TOO_MUCH;
	o->silent++;
	return REPEATS;
}

#endif
