// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What may be sent once a mail connection has been paid for, and what could open another. */
#ifndef EGRESSBPF_OPENING_H
#define EGRESSBPF_OPENING_H

#include "parse.h"

static __always_inline bool says(const struct flow *f)
{
	return f->payload || f->flags & TCP_FIN;
}

/* A connection that begins with a packet, whichever that is. */
static __always_inline struct opening begin_opening(const struct flow *f)
{
	struct opening o = { .first = bpf_ntohl(f->seq) };

	if (opens(f)) {
		o.first++;
		return o;
	}
	o.ack = bpf_ntohl(f->ack);
	o.answered = 1;
	o.said = says(f);
	o.silent = !says(f);
	return o;
}

/* Whether a segment has the number with which connections are opened. */
static __always_inline bool at_opening(const struct opening *o, const struct flow *f)
{
	return bpf_ntohl(f->seq) == o->first;
}

/* How often the first data, or an acknowledgement without any, may be sent: what was lost on
 * the way comes again. A kernel repeats data for two minutes or so this often.
 */
#define MAX_SAID 9
#define MAX_SILENT 5

/* A SYN cookie holds which of four MSS it is (net/ipv4/syncookies.c), so that four
 * acknowledgements in a row belong to the same one. What a server says first is longer than
 * that, and shorter than MAX_MOVE.
 */
#define MIN_MOVE 4
#define MAX_MOVE (1 << 20)

/* Whether a segment, which is not a SYN, goes on with the connection, and notes that it was
 * sent. With the first number, a kernel acknowledges the server's answer and then what else
 * it gets, and it sends its first data. If it repeats one of these, a server that has
 * forgotten the connection takes it up once more. Nothing here tells whether it has, or the
 * segment was lost; so there are only so many repeats.
 */
static __always_inline bool goes_on(struct opening *o, const struct flow *f)
{
	__u32 move;

	if (!o->answered) {
		if (at_opening(o, f))
			*o = begin_opening(f);
		o->answered = 1;
		return true;
	}
	if (!at_opening(o, f))
		return true;
	move = bpf_ntohl(f->ack) - o->ack;
	if (move >= MIN_MOVE && move <= MAX_MOVE && o->moves < 255) {
		o->moves++;
		o->ack = bpf_ntohl(f->ack);
		o->said = says(f);
		o->silent = !says(f);
		return true;
	}
	if (says(f) ? o->said >= MAX_SAID : o->silent >= MAX_SILENT)
		return false;
	if (says(f))
		o->said++;
	else
		o->silent++;
	return true;
}

#endif
