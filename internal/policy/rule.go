package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Rule names destinations: the addresses of Prefix, on one port and of one IP
// protocol where these are given.
//
// Prefix is canonical: no host bits are set, and it is IPv4 if all of it lies in the
// v4-mapped block ::ffff:0:0/96 (RFC 4291, 2.5.5.2). A packet to either spelling reaches
// the IPv4 address, so the programs look up both as that address, and a rule in IPv6
// spelling would never match. For the same reason an IPv6 prefix that contains the block,
// such as ::/0, stays IPv6 and says nothing about the IPv4 addresses inside: they need a
// rule of their own, such as 0.0.0.0/0.
//
// A rule for an IPv4 address also holds for the IPv6 addresses that embed it, in addition
// to the rules for these: behind the NAT64 prefixes 64:ff9b::/96 (RFC 6052, 2.1) and
// 64:ff9b:1::/48 (RFC 8215), in 2002::/16 (RFC 3056) and in ::/96 (RFC 4291, 2.5.5.1).
type Rule struct {
	Prefix netip.Prefix
	Port   uint16 // 0: every port, and packets without one
	Proto  uint8  // IANA protocol number; 0: every protocol
}

// protocols are the protocols that have names here. Those with ports have the
// destination port in bytes 2 and 3 of their header.
var protocols = []struct {
	name   string
	number uint8
	ports  bool
}{
	{"tcp", 6, true},
	{"udp", 17, true},
	{"udplite", 136, true},
	{"sctp", 132, true},
	{"dccp", 33, true},
	{"icmp", protoICMP, false},
	{"icmpv6", 58, false},
	{"ipv6-icmp", 58, false}, // the name in IANA's list and in /etc/protocols
}

const protoICMP = 1

// The networks whose addresses embed IPv4 addresses: see Rule.
var (
	nat64      = netip.MustParsePrefix("64:ff9b::/96")
	localNAT64 = netip.MustParsePrefix("64:ff9b:1::/48")
	compatible = netip.MustParsePrefix("::/96")
	sixToFour  = netip.MustParsePrefix("2002::/16")
)

// ParseRule reads ADDR|CIDR[:PORT][/PROTO], for example
//
//	169.254.169.254         every port and protocol of one address
//	10.0.0.0/8:80/tcp       a network, one port, one protocol
//	168.63.129.16/udp       one protocol, every port
//	2001:db8::/32/tcp       IPv6 without a port
//	[2001:db8::/32]:80/tcp  IPv6 with a port: the brackets hold the length too
//	192.0.2.1/32/47         a protocol by number
//
// A bare number after the first slash is always a prefix length: 1.2.3.4/6 is a
// (malformed) network, and protocol 6 of that address is 1.2.3.4/32/6 or
// 1.2.3.4/tcp. Without brackets 2001:db8::1:80 is an address that ends in :80.
//
// ParseRule refuses host bits in a CIDR, zones, host names, port 0, a port for a protocol
// that has none, signs, spaces and leading zeros. The error gives the right spelling if
// there is one.
func ParseRule(s string) (Rule, error) {
	r, err := parseRule(s)
	if err != nil {
		return Rule{}, fmt.Errorf("%q: %w", s, err)
	}
	return r, nil
}

func parseRule(s string) (Rule, error) {
	host, tail, err := cutHost(s)
	if err != nil {
		return Rule{}, err
	}
	var r Rule
	if r.Prefix, err = parsePrefix(host); err != nil {
		return Rule{}, err
	}
	if rest, ok := strings.CutPrefix(tail, ":"); ok {
		port, proto, slash := strings.Cut(rest, "/")
		if strings.Contains(host, ":") && !strings.HasPrefix(s, "[") {
			return Rule{}, fmt.Errorf("an IPv6 destination with a port needs brackets: want [%s]:%s", host, rest)
		}
		if r.Port, err = ParsePort(port); err != nil {
			return Rule{}, fmt.Errorf("%w; leave it out to mean every port", err)
		}
		tail = ""
		if slash {
			tail = "/" + proto
		}
	}
	if proto, ok := strings.CutPrefix(tail, "/"); ok {
		if r.Proto, err = ParseProtocol(proto); err != nil {
			return Rule{}, err
		}
		tail = ""
	}
	if tail != "" {
		return Rule{}, fmt.Errorf("%q is left over: want ADDR|CIDR[:PORT][/PROTO]", tail)
	}
	return r, r.Validate()
}

// errNoAddress means that the place of an address holds something else.
var errNoAddress = errors.New("want an IPv4 or IPv6 address or CIDR; names are not looked up")

// ParseDestination reads ADDR[:PORT][/PROTO], as [ParseRule] does, and refuses networks. It
// also refuses protocols that no packet can have behind its IP headers.
func ParseDestination(s string) (Rule, error) {
	r, err := ParseRule(s)
	switch {
	case errors.Is(err, errNoAddress):
		return Rule{}, fmt.Errorf("%q: want an IPv4 or IPv6 address; names are not looked up", s)
	case err != nil:
		return Rule{}, err
	case !r.Prefix.IsSingleIP():
		return Rule{}, fmt.Errorf("%q: want a single address, not a network", s)
	case r.Prefix.Addr().IsUnspecified():
		return Rule{}, fmt.Errorf("%q: this is no destination; a connection to it goes to the loopback address", s)
	case isExtension(r.Proto, r.Prefix.Addr().Is6()):
		return Rule{}, fmt.Errorf("%q: protocol %d is an extension header: want the protocol behind it", s, r.Proto)
	}
	return r, nil
}

// isExtension says whether a protocol number stands for an extension header.
func isExtension(proto uint8, v6 bool) bool {
	switch proto {
	case 51: // AH
		return true
	case 43, 44, 60, 135, 139, 140:
		return v6
	}
	return false
}

// cutHost splits a rule into ADDR or ADDR/LENGTH, out of its brackets, and the
// port and protocol that follow.
func cutHost(s string) (host, tail string, err error) {
	if inner, ok := strings.CutPrefix(s, "["); ok {
		host, tail, ok = strings.Cut(inner, "]")
		switch {
		case !ok:
			return "", "", errors.New("the closing bracket is missing: want [ADDR]:PORT")
		case !strings.Contains(host, ":"):
			return "", "", fmt.Errorf("brackets are for IPv6: want %s%s", host, tail)
		case !strings.Contains(host, "/") && startsLength(tail):
			// A length or a protocol number: either reading would surprise somebody.
			return "", "", errors.New("the prefix length belongs inside the brackets: want [ADDR/LENGTH]")
		}
		return host, tail, nil
	}
	end := strings.IndexByte(s, '/')
	if end < 0 {
		end = len(s)
	}
	// One colon begins the port of an IPv4 address; more are an IPv6 address.
	if strings.Count(s[:end], ":") == 1 {
		end = strings.IndexByte(s, ':')
	}
	if startsLength(s[end:]) {
		if n := strings.IndexAny(s[end+1:], ":/"); n >= 0 {
			end += 1 + n
		} else {
			end = len(s)
		}
	}
	return s[:end], s[end:], nil
}

func startsLength(tail string) bool {
	return len(tail) > 1 && tail[0] == '/' && '0' <= tail[1] && tail[1] <= '9'
}

// String returns the form that [ParseRule] reads back to the same rule.
func (r Rule) String() string {
	if !r.Prefix.IsValid() {
		return "invalid rule"
	}
	proto := protoName(r.Proto)
	host := r.Prefix.String()
	// A number after the only slash would be read as a prefix length.
	bare := r.Port == 0 && r.Proto != 0 && proto[0] <= '9'
	if r.Prefix.IsSingleIP() && !bare {
		host = r.Prefix.Addr().String()
	}
	if r.Port != 0 {
		if r.Prefix.Addr().Is6() {
			host = "[" + host + "]"
		}
		host += ":" + strconv.Itoa(int(r.Port))
	}
	if r.Proto != 0 {
		host += "/" + proto
	}
	return host
}

// Validate refuses a rule that [ParseRule] could not have returned.
func (r Rule) Validate() error {
	want := r
	want.Prefix = canonical(r.Prefix)
	switch {
	case !r.Prefix.IsValid():
		return errors.New("want an address or a CIDR")
	case r.Prefix != r.Prefix.Masked():
		return fmt.Errorf("host bits are set: want %s", want)
	case r.Prefix != want.Prefix:
		return fmt.Errorf("this is an IPv4 destination in IPv6 spelling: want %s", want)
	case r.Port != 0 && !hasPorts(r.Proto):
		return fmt.Errorf("protocol %s has no ports: leave out the port or the protocol", protoName(r.Proto))
	case r.Proto == protoICMP && r.Prefix.Addr().Is6():
		// It would never match, and a block list that matches nothing is open.
		return errors.New("protocol icmp is IPv4's: want icmpv6")
	}
	return nil
}

// MarshalText returns [Rule.String], and an error for a rule that is not valid.
func (r Rule) MarshalText() ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	return []byte(r.String()), nil
}

// UnmarshalText is [ParseRule].
func (r *Rule) UnmarshalText(text []byte) (err error) {
	*r, err = ParseRule(string(text))
	return err
}

// matches reports whether the rule matches a packet; dst went through [unmap]. Port 0
// means that the packet's port is not known.
func (r Rule) matches(dst netip.Addr, proto uint8, port uint16) bool {
	return r.Prefix.Contains(dst) &&
		(r.Proto == 0 || r.Proto == proto) &&
		(r.Port == 0 || r.Port == port && hasPorts(proto))
}

// ParsePrefix reads an address or a CIDR, normalised as in a [Rule]. Host bits
// and zones are refused.
func ParsePrefix(s string) (netip.Prefix, error) {
	p, err := parsePrefix(s)
	if err == nil && p != p.Masked() {
		err = fmt.Errorf("host bits are set: want %s", p.Masked())
	}
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q: %w", s, err)
	}
	return p, nil
}

// parsePrefix keeps host bits, so that the caller can name the right spelling.
func parsePrefix(s string) (netip.Prefix, error) {
	host, length, cidr := strings.Cut(s, "/")
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Prefix{}, errNoAddress
	}
	if zone := addr.Zone(); zone != "" {
		return netip.Prefix{}, fmt.Errorf("a destination has no zone: leave out %%%s", zone)
	}
	bits := addr.BitLen()
	if cidr {
		n, ok := number(length, 0, uint64(bits))
		if !ok {
			return netip.Prefix{}, fmt.Errorf("prefix length %q: want 0 to %d", length, bits)
		}
		bits = int(n)
	}
	p := netip.PrefixFrom(addr, bits)
	if v4 := unmap(addr); v4 != addr {
		if bits >= 96 {
			return netip.PrefixFrom(v4, bits-96), nil
		}
		// Whoever writes ::ffff:10.0.0.0/8 means 10.0.0.0/8. Masking as usual
		// would recommend ::/8 instead.
		if p != p.Masked() && bits <= 32 {
			return netip.Prefix{}, fmt.Errorf("the length of an IPv4 address in IPv6 spelling counts from 96: want %s",
				netip.PrefixFrom(v4, bits).Masked())
		}
	}
	return p, nil
}

// canonical returns the form that a prefix has in a rule.
func canonical(p netip.Prefix) netip.Prefix {
	p = p.Masked()
	if v4 := unmap(p.Addr()); v4 != p.Addr() && p.Bits() >= 96 {
		p = netip.PrefixFrom(v4, p.Bits()-96)
	}
	return p
}

// unmap returns the address by which a packet to addr is judged. It removes the zone:
// fe80::a9fe:a9fe is the metadata service on every link.
func unmap(addr netip.Addr) netip.Addr { return addr.Unmap().WithZone("") }

// embedded returns the IPv4 addresses that an IPv6 address embeds, or may embed: a local
// NAT64 prefix has one of four lengths (RFC 6052, 2.2). Read with the wrong length, an
// address begins or ends with zeros.
func embedded(addr netip.Addr) (is, maybe []netip.Addr) {
	b := addr.As16()
	at := func(i, j, k, l int) netip.Addr { return netip.AddrFrom4([4]byte{b[i], b[j], b[k], b[l]}) }
	switch {
	case nat64.Contains(addr), compatible.Contains(addr) && b[12] != 0: // not :: and ::1
		is = append(is, at(12, 13, 14, 15))
	case sixToFour.Contains(addr):
		is = append(is, at(2, 3, 4, 5))
	case localNAT64.Contains(addr):
		for _, v4 := range []netip.Addr{at(6, 7, 9, 10), at(7, 9, 10, 11), at(9, 10, 11, 12), at(12, 13, 14, 15)} {
			if raw := v4.As4(); raw[0] != 0 && raw[3] != 0 {
				maybe = append(maybe, v4)
			}
		}
	}
	return is, maybe
}

// ParsePort reads a port from 1 to 65535.
func ParsePort(s string) (uint16, error) {
	n, ok := number(s, 1, 65535)
	if !ok {
		return 0, fmt.Errorf("port %q: want 1 to 65535", s)
	}
	return uint16(n), nil
}

// ParseProtocol reads the name or the number of an IP protocol.
func ParseProtocol(s string) (uint8, error) {
	for _, p := range protocols {
		if p.name == s {
			return p.number, nil
		}
	}
	n, ok := number(s, 1, 255)
	if !ok {
		var names []string
		for _, p := range protocols {
			names = append(names, p.name)
		}
		return 0, fmt.Errorf("protocol %q: want %s or a number from 1 to 255", s, strings.Join(names, ", "))
	}
	return uint8(n), nil
}

// ProtocolName returns the name of an IP protocol, or its number if it has none here.
func ProtocolName(number uint8) string { return protoName(number) }

// HasPorts reports whether packets of an IP protocol carry ports.
func HasPorts(number uint8) bool { return number != 0 && hasPorts(number) }

func protoName(number uint8) string {
	for _, p := range protocols {
		if p.number == number {
			return p.name
		}
	}
	return strconv.Itoa(int(number))
}

// hasPorts reports whether a protocol carries ports; 0, any protocol, may.
func hasPorts(number uint8) bool {
	for _, p := range protocols {
		if p.number == number {
			return p.ports
		}
	}
	return number == 0
}

// number reads a decimal number without sign, space or leading zero, which elsewhere would
// mean octal.
func number(s string, low, high uint64) (uint64, bool) {
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil && strconv.FormatUint(n, 10) == s && low <= n && n <= high
}
