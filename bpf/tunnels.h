// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Where the host itself unpacks packets from others. */
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

/* Whether there is a tunnel at the port; it may be closed for one that may come. */
static __always_inline bool found_tunnel(__be16 port)
{
	__u8 *found = bpf_map_lookup_elem(&tunnels, &port);

	return found && *found;
}

/* Whether a protocol of IP is one for the host's tunnels to unpack. */
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

/* Whether a packet to the host itself is one for its tunnels to unpack. Containers have
 * no business with those.
 */
static __always_inline bool for_tunnel(const struct flow *f)
{
	return tunnel_protocol(f->proto) || (is_datagram(f) && tunnel_port(f->dport));
}

/* The same, in a network that may be a container's own: only of tunnels that there are. */
static __always_inline bool tunnel_of_host(const struct flow *f)
{
	return tunnel_protocol(f->proto) || (is_datagram(f) && found_tunnel(f->dport));
}

#endif
