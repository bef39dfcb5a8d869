package iptables

import (
	"net/netip"
	"strconv"
	"strings"
)

// network reads ADDR, ADDR/BITS or ADDR/MASK. It refuses a mask with holes.
func network(s string) (netip.Prefix, error) {
	host, bits, ok := strings.Cut(s, "/")
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Zone() != "" || addr.Is4In6() { // a policy takes a v4-mapped address for IPv4, ip6tables does not
		return netip.Prefix{}, errUnknown
	}
	n := addr.BitLen()
	if mask, err := netip.ParseAddr(bits); ok && err == nil {
		if mask.BitLen() != addr.BitLen() {
			return netip.Prefix{}, errUnknown
		}
		n = 0
		for _, b := range mask.AsSlice() {
			for i := 7; i >= 0 && b&(1<<i) != 0; i-- {
				n++
			}
			if b != 0xff {
				break
			}
		}
		if p := netip.PrefixFrom(allOnes(addr), n).Masked(); p.Addr() != mask {
			return netip.Prefix{}, errUnknown
		}
	} else if ok {
		if n, err = strconv.Atoi(bits); err != nil || n < 0 || n > addr.BitLen() {
			return netip.Prefix{}, errUnknown
		}
	}
	return netip.PrefixFrom(addr, n).Masked(), nil
}

func allOnes(like netip.Addr) netip.Addr {
	b := like.AsSlice()
	for i := range b {
		b[i] = 0xff
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// addressRange returns the networks that make up FROM-TO.
func addressRange(s string) ([]netip.Prefix, error) {
	from, to, ok := strings.Cut(s, "-")
	if !ok {
		to = from
	}
	a, err := netip.ParseAddr(from)
	b, err2 := netip.ParseAddr(to)
	if err != nil || err2 != nil || a.BitLen() != b.BitLen() || b.Less(a) || a.Zone()+b.Zone() != "" || a.Is4In6() || b.Is4In6() {
		return nil, errUnknown
	}
	var list []netip.Prefix
	for {
		bits := a.BitLen()
		for bits > 0 {
			p := netip.PrefixFrom(a, bits-1)
			if p.Masked().Addr() != a || b.Less(last(p)) {
				break
			}
			bits--
		}
		p := netip.PrefixFrom(a, bits)
		list = append(list, p)
		end := last(p)
		if end == b {
			return list, nil
		}
		a = end.Next()
	}
}

// last returns the highest address of a network.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

var protocols = map[string]uint8{
	"tcp": 6, "udp": 17, "udplite": 136, "sctp": 132, "dccp": 33, "icmp": 1, "ipv6-icmp": 58, "icmpv6": 58,
	"igmp": 2, "ipencap": 4, "ipip": 4, "ipv6": 41, "gre": 47, "esp": 50, "ah": 51, "ospf": 89, "vrrp": 112, "l2tp": 115,
}

func protocol(s string) (uint8, error) {
	if n, ok := protocols[strings.ToLower(s)]; ok {
		return n, nil
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n == 0 {
		return 0, errUnknown
	}
	return uint8(n), nil
}

var services = map[string]uint16{
	"smtp": 25, "mail": 25, "smtps": 465, "ssmtp": 465, "urd": 465, "submissions": 465, "submission": 587,
	"domain": 53, "http": 80, "https": 443, "ntp": 123,
}

// portList reads ports and ranges of ports, separated by commas.
func portList(s string) ([]portRange, error) {
	var list []portRange
	for item := range strings.SplitSeq(s, ",") {
		low, high, isRange := strings.Cut(item, ":")
		if !isRange {
			high = low
		} else if low == "" {
			low = "0"
		}
		if high == "" {
			high = "65535"
		}
		a, err := port(low)
		b, err2 := port(high)
		if err != nil || err2 != nil || b < a {
			return nil, errUnknown
		}
		list = append(list, portRange{a, b})
	}
	return list, nil
}

func port(s string) (uint16, error) {
	if n, ok := services[s]; ok {
		return n, nil
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err
}
