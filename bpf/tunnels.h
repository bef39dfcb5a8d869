// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Which packets the host's own tunnels would unpack. */
#ifndef EGRESSBPF_TUNNELS_H
#define EGRESSBPF_TUNNELS_H

#include "maps.h"
#include "parse.h"

#define PROTO_IPIP 4
#define PROTO_IPV6 41
#define PROTO_GRE 47
#define PROTO_ETHERIP 97
#define PROTO_IPCOMP 108
#define PROTO_L2TP 115
#define PROTO_MPLS 137
#define PROTO_ETHERNET 143

static __always_inline bool tunnel_port(__be16 port)
{
	return bpf_map_lookup_elem(&tunnels, &port);
}

/* Whether the host has a tunnel at the port. False for a port that is closed in case of a
 * tunnel.
 */
static __always_inline bool found_tunnel(__be16 port)
{
	__u8 *found = bpf_map_lookup_elem(&tunnels, &port);

	return found && *found;
}

/* Whether the host's tunnels unpack packets of this IP protocol. */
static __always_inline bool tunnel_protocol(__u8 proto)
{
	switch (proto) {
	case PROTO_IPIP:
	case PROTO_IPV6:
	case PROTO_GRE:
	case PROTO_ETHERIP:
	case PROTO_IPCOMP:
	case PROTO_L2TP:
	case PROTO_MPLS:
	case PROTO_ETHERNET:
		return true;
	}
	return false;
}

static __always_inline bool is_datagram(const struct flow *f)
{
	return f->has_ports && (f->proto == IPPROTO_UDP || f->proto == PROTO_UDPLITE);
}

/* Whether a packet to the host itself would go to a tunnel. Containers have no business
 * with the host's tunnels.
 */
static __always_inline bool for_tunnel(const struct flow *f)
{
	return tunnel_protocol(f->proto) || (is_datagram(f) && tunnel_port(f->dport));
}

/* The same in a network that may be the container's own: only ports at which the host has a
 * tunnel count.
 */
static __always_inline bool tunnel_of_host(const struct flow *f)
{
	return tunnel_protocol(f->proto) || (is_datagram(f) && found_tunnel(f->dport));
}

#endif
