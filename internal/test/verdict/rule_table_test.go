package verdict

import (
	"fmt"
	"net/netip"
	"slices"
)

func ruleTables() []table {
	return []table{
		{"metadata services", "default", presetRows()},
		{"nothing blocked", "nothing", nothingRows()},
		{"opt-in preset", "tasks", rowsTo(blocked, "169.254.170.2", "169.254.170.23", "fd00:ec2::23", metadata)},
		{"DNS allowed", "dns", dnsRows()},
		{"Google Cloud", "gcp", gcpRows()},
		{"spellings", "default", spellingRows()},
		{"prefixes", "prefixes", prefixRows()},
		{"all of IPv4", "IPv4", all4Rows()},
		{"all of IPv6", "IPv6", all6Rows()},
		{"services", "services", serviceRows()},
		{"nested prefixes", "nested", nestedRows()},
		{"sources", "nested", sourceRows()},
		{"sources with services", "services", sourceServiceRows()},
	}
}

// rowsTo sends UDP, TCP, ICMP and a protocol without ports to each address.
func rowsTo(want verdict, addresses ...string) []row {
	var rows []row
	for _, dst := range addresses {
		rows = append(rows,
			row{dst + " UDP", packet{dst: dst, payload: udp(53)}, want},
			row{dst + " TCP", packet{dst: dst, payload: tcp(80, syn)}, want},
			row{dst + " TCP data", packet{dst: dst, payload: tcp(80, ack).grow(100)}, want},
			row{dst + " ICMP", packet{dst: dst, payload: icmp()}, want},
			row{dst + " no ports", packet{dst: dst, payload: bare(protoTest, 4)}, want})
	}
	return rows
}

func presetRows() []row {
	rows := rowsTo(blocked, metadata, "fd00:ec2::254", "fd20:ce::254", "fd00:c1::a9fe:a9fe", "192.0.0.192",
		"100.100.100.200", "fe80::a9fe:a9fe", "169.254.42.42", "fd00:42::42", "fd00:a9fe:a9fe::1")
	// Neighbouring addresses that clouds use for DNS, time, disks and package mirrors.
	rows = append(rows, rowsTo(pass, "169.254.169.253", "169.254.169.123", "169.254.0.2", "169.254.2.0", "169.254.2.255",
		"169.254.169.255", "169.254.168.254", "169.253.169.254", "169.254.170.2", "169.254.170.23", "169.254.42.41",
		"169.254.42.43", "192.0.0.191", "192.0.0.193", "100.100.100.199", "100.100.100.201", "100.100.2.136",
		"fd00:ec2::253", "fd00:ec2::255", "fd00:ec2::23", "fd20:ce::253", "fd00:c1::a9fe:a9fd", "fe80::a9fe:a9ff",
		"fd00:42::43", "fd00:a9fe:a9fe::", "fd00:a9fe:a9fe::2", "168.63.129.15", "168.63.129.17", open4, open6)...)
	const wireServer = "168.63.129.16"
	for _, port := range []uint16{80, 32526} {
		rows = append(rows,
			row{fmt.Sprint("Azure TCP ", port), packet{dst: wireServer, payload: tcp(port, syn)}, blocked},
			row{fmt.Sprint("Azure TCP data ", port), packet{dst: wireServer, payload: tcp(port, ack)}, blocked},
			row{fmt.Sprint("Azure TCP from ", port), packet{src: wireServer, dst: open4, payload: tcp(40000, ack).from(port)}, blocked},
			row{fmt.Sprint("Azure UDP ", port), packet{dst: wireServer, payload: udp(port)}, pass},
			row{fmt.Sprint("Azure UDP from ", port), packet{src: wireServer, dst: open4, payload: udp(40000).from(port)}, pass})
		for _, near := range []uint16{port - 1, port + 1, port<<8 | port>>8} {
			rows = append(rows, row{fmt.Sprint("Azure TCP ", near), packet{dst: wireServer, payload: tcp(near, syn)}, pass})
		}
	}
	return append(rows,
		row{"Azure DNS", packet{dst: wireServer, payload: udp(53)}, pass},
		row{"Azure DNS over TCP", packet{dst: wireServer, payload: tcp(53, syn)}, pass},
		row{"answer to Azure's probe", packet{dst: wireServer, payload: tcp(50000, syn|ack).from(80)}, pass},
		row{"Azure ICMP", packet{dst: wireServer, payload: icmp()}, pass},
		row{"mail to metadata", packet{dst: metadata, payload: tcp(25, syn)}, blocked},
		row{"mail as metadata", packet{src: metadata, dst: open4, payload: tcp(25, syn)}, blocked},
		row{"malformed to metadata", packet{dst: metadata, payload: udp(53), length: 1}, malformed})
}

func nothingRows() []row {
	return append(rowsTo(pass, metadata, "fd00:ec2::254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "0.0.0.0", "::"),
		row{"as metadata", packet{src: metadata, dst: open4, payload: udp(53)}, pass},
		row{"mail", packet{dst: metadata, payload: tcp(25, syn)}, admitted},
		row{"mail on IPv6", packet{dst: open6, payload: tcp(25, syn)}, admitted},
		row{"mail to a v4-mapped address", packet{dst: "::ffff:192.0.2.99", payload: tcp(25, syn)}, admitted})
}

func dnsRows() []row {
	var rows []row
	for _, dst := range []string{metadata, "fd00:ec2::254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"} {
		rows = append(rows,
			row{dst + " UDP 53", packet{dst: dst, payload: udp(53)}, pass},
			row{dst + " TCP 53", packet{dst: dst, payload: tcp(53, syn)}, pass},
			row{dst + " UDP 52", packet{dst: dst, payload: udp(52)}, blocked},
			row{dst + " UDP 54", packet{dst: dst, payload: udp(54)}, blocked},
			row{dst + " UDP 53 swapped", packet{dst: dst, payload: udp(53 << 8)}, blocked},
			row{dst + " UDP 80", packet{dst: dst, payload: udp(80)}, blocked},
			row{dst + " TCP 80", packet{dst: dst, payload: tcp(80, syn)}, blocked},
			row{dst + " SCTP 53", packet{dst: dst, payload: withPorts(protoSCTP, 53, 12)}, blocked},
			row{dst + " UDP from 53", packet{dst: dst, payload: udp(123).from(53)}, blocked},
			row{dst + " ICMP", packet{dst: dst, payload: icmp()}, blocked})
	}
	return append(rows,
		row{"first fragment to DNS", packet{dst: metadata, payload: udp(53), flags: 1}, pass},
		row{"later fragment, whose port is unknown", packet{dst: metadata, payload: bare(protoUDP, 8), offset: 1480}, blocked},
		row{"as metadata to DNS of metadata", packet{src: metadata, dst: metadata, payload: udp(53)}, pass},
		row{"as DNS of metadata", packet{src: metadata, dst: open4, payload: udp(40000).from(53)}, blocked})
}

func gcpRows() []row {
	return []row{
		{"DNS", packet{dst: metadata, payload: udp(53)}, pass},
		{"DNS over TCP", packet{dst: metadata, payload: tcp(53, syn)}, pass},
		{"time", packet{dst: metadata, payload: udp(123)}, pass},
		{"port of the time, TCP", packet{dst: metadata, payload: tcp(123, syn)}, blocked},
		{"metadata", packet{dst: metadata, payload: tcp(80, syn)}, blocked},
		{"metadata on IPv6", packet{dst: "fd20:ce::254", payload: tcp(80, syn)}, blocked},
		{"DNS on IPv6", packet{dst: "fd20:ce::254", payload: udp(53)}, blocked},
		{"ICMP", packet{dst: metadata, payload: icmp()}, blocked},
		{"another cloud's", packet{dst: "169.254.42.42", payload: tcp(80, syn)}, pass},
	}
}

func spellingRows() []row {
	rows := rowsTo(blocked, "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "::ffff:100.100.100.200", "64:ff9b::6464:64c8",
		"::169.254.169.254", "2002:a9fe:a9fe::", "2002:a9fe:a9fe:1::a9fe:a9fe", "2002:6464:64c8::1",
		// For local use, with prefixes of 96, 64, 56 and 48 bits.
		"64:ff9b:1::a9fe:a9fe", "64:ff9b:1:ffff:ffff:ffff:a9fe:a9fe", "64:ff9b:1:0:a9:fea9:fe00:0", "64:ff9b:1:7:a9:fea9:fe00:0",
		"64:ff9b:1:a9:fe:a9fe::", "64:ff9b:1:7a9:fe:a9fe::", "64:ff9b:1:a9fe:a9:fe00::")
	rows = append(rows, rowsTo(pass, "::ffff:169.254.169.253", "64:ff9b::a9fe:a9fd", "64:ff9b::a9fe:a9ff",
		// One bit away from the block of v4-mapped or NAT64 addresses.
		"::fffe:a9fe:a9fe", "::1:ffff:a9fe:a9fe", "8000::ffff:a9fe:a9fe", "0:1::ffff:a9fe:a9fe",
		"64:ff9a::a9fe:a9fe", "65:ff9b::a9fe:a9fe", "64:ff9b::1:a9fe:a9fe", "64:ff9b:2::a9fe:a9fe", "64:ff9b:0:1::a9fe:a9fe",
		"64:ff9b:0:0:1:0:a9fe:a9fe", "fe80::ffff:a9fe:a9fe",
		"::169.254.169.253", "::1:169.254.169.254", "2002:a9fe:a9fd::", "2003:a9fe:a9fe::", "2002:0:a9fe:a9fe::",
		"64:ff9b:1::a9fe:a9fd", "64:ff9b:1:0:a9:fea9:fd00:0", "64:ff9b:1:a9:fe:a9fd::", "64:ff9b:1:a9fe:a9:fd00::", "64:ff9b:1:a9fe:a9fe::")...)
	for _, spelling := range []string{
		"::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "::169.254.169.254", "2002:a9fe:a9fe::1", "64:ff9b:1::a9fe:a9fe", "64:ff9b:1:a9fe:a9:fe00::",
	} {
		rows = append(rows, row{"as " + spelling, packet{src: spelling, dst: open6, payload: icmp()}, blocked})
	}
	for _, spelling := range []string{"::ffff:168.63.129.16", "64:ff9b::a83f:8110", "::168.63.129.16", "2002:a83f:8110::1", "64:ff9b:1::a83f:8110"} {
		rows = append(rows,
			row{spelling + " TCP 80", packet{dst: spelling, payload: tcp(80, syn)}, blocked},
			row{spelling + " TCP 81", packet{dst: spelling, payload: tcp(81, syn)}, pass},
			row{spelling + " UDP 80", packet{dst: spelling, payload: udp(80)}, pass},
			row{"as " + spelling + " TCP 80", packet{src: spelling, dst: open6, payload: tcp(40000, ack).from(80)}, blocked},
			row{"as " + spelling + " TCP 81", packet{src: spelling, dst: open6, payload: tcp(40000, ack).from(81)}, pass})
	}
	return append(rows,
		row{"mail to a v4-mapped address", packet{dst: "::ffff:192.0.2.99", payload: tcp(25, syn)}, admitted},
		row{"mail to a NAT64 address", packet{dst: "64:ff9b::c000:263", payload: tcp(25, syn)}, admitted})
}

// spellings returns an address in the spellings that IPv6 packets can carry.
func spellings(a netip.Addr) []netip.Addr {
	if !a.Is4() {
		return []netip.Addr{a}
	}
	b := a.As4()
	return []netip.Addr{a, netip.AddrFrom16(a.As16()), netip.AddrFrom16([16]byte{1: 0x64, 2: 0xff, 3: 0x9b, 12: b[0], b[1], b[2], b[3]})}
}

// lastOf returns the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

// prefixRows has the first and last address of each prefix of the policy and the addresses next
// to the prefix, as destination and as source.
func prefixRows() []row {
	var rows []row
	for _, text := range []string{"9.0.0.0/8", "11.22.0.0/15", "12.34.0.0/16", "13.37.128.0/17", "100.64.0.0/10",
		"198.51.100.7/32", "203.0.113.8/31", "224.0.0.0/3", "0.0.0.0/32",
		"3000::/4", "4010::/15", "4003::/16", "4004:8000::/17", "4006:2::/31", "4007:1::/32",
		"4008:1:8000::/33", "2001:db8:1::/48", "2001:db8:2::7/128", "2001:db8:2::8/127", "::1/128"} {
		prefix := netip.MustParsePrefix(text)
		near := func(what string, a netip.Addr, want verdict) {
			asSource := pass
			if want == blocked && prefix.IsSingleIP() {
				asSource = blocked
			}
			for _, a := range spellings(a) {
				name := fmt.Sprintf("%s of %s (%s)", what, text, a)
				other := open6
				if a.Is4() {
					other = open4
				}
				rows = append(rows,
					row{name, packet{dst: a.String(), payload: udp(53)}, want},
					row{name + ", TCP", packet{dst: a.String(), payload: tcp(80, ack)}, want},
					row{name + ", as source", packet{src: a.String(), dst: other, payload: udp(53)}, asSource})
			}
		}
		near("first", prefix.Addr(), blocked)
		near("last", lastOf(prefix), blocked)
		// The /128 and the /127 are neighbours.
		if a := prefix.Addr().Prev(); a.IsValid() && text != "2001:db8:2::8/127" {
			near("before", a, pass)
		}
		if a := lastOf(prefix).Next(); a.IsValid() && text != "2001:db8:2::7/128" {
			near("behind", a, pass)
		}
	}
	return rows
}

func all4Rows() []row {
	rows := rowsTo(blocked, "0.0.0.0", "255.255.255.255", "127.0.0.1", open4, "198.51.99.255", "198.51.101.0", "203.0.113.1",
		"::ffff:192.0.2.99", "::ffff:0.0.0.0", "::ffff:255.255.255.255", "64:ff9b::", "64:ff9b::ffff:ffff")
	rows = append(rows, rowsTo(pass, "198.51.100.0", "198.51.100.255", "::ffff:198.51.100.1", "64:ff9b::c633:6401",
		open6, "::", "::1", "::fffe:ffff:ffff", "::1:0:0:0", "64:ff9a:ffff:ffff:ffff:ffff:ffff:ffff", "64:ff9b::1:0:0", "ff02::1")...)
	return append(rows,
		row{"allowed service", packet{dst: "203.0.113.1", payload: tcp(443, syn)}, pass},
		row{"next to the allowed service", packet{dst: "203.0.113.1", payload: tcp(444, syn)}, blocked},
		row{"next to the allowed protocol", packet{dst: "203.0.113.1", payload: udp(443)}, blocked},
		row{"mail to an allowed network", packet{dst: "198.51.100.1", payload: tcp(25, syn)}, admitted},
		row{"mail to a blocked network", packet{dst: open4, payload: tcp(25, syn)}, blocked},
		row{"mail on IPv6", packet{dst: open6, payload: tcp(25, syn)}, admitted})
}

func all6Rows() []row {
	// A rule for IPv6 does not hold for v4-mapped addresses, which are IPv4 addresses. NAT64
	// addresses are both.
	rows := rowsTo(blocked, "::", "::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", open6, "2001:db8:9:ffff::", "2001:db8:b::1",
		"::fffe:ffff:ffff", "::1:0:0:0", "64:ff9b::c000:263", "64:ff9b::",
		// Almost v4-mapped.
		"8000::ffff:c000:263", "1::ffff:c000:263", "0:0:8000::ffff:c000:263", "::1:0:ffff:c000:263", "::8000:ffff:c000:263", "::7fff:c000:263")
	rows = append(rows, rowsTo(pass, open4, "169.254.169.253", "169.254.100.200", "0.0.0.0", "255.255.255.255", "::ffff:192.0.2.99", "::ffff:169.254.169.253",
		"::ffff:0.0.0.0", "::ffff:255.255.255.255", "2001:db8:a::", "2001:db8:a:ffff:ffff:ffff:ffff:ffff")...)
	return append(rows,
		row{"allowed service", packet{dst: "2001:db8:b::1", payload: tcp(443, syn)}, pass},
		row{"next to the allowed service", packet{dst: "2001:db8:b::1", payload: tcp(442, syn)}, blocked},
		row{"next to the allowed protocol", packet{dst: "2001:db8:b::1", payload: udp(443)}, blocked},
		row{"mail to an allowed network", packet{dst: "2001:db8:a::1", payload: tcp(25, syn)}, admitted},
		row{"mail on IPv4", packet{dst: open4, payload: tcp(25, syn)}, admitted})
}

// transports has one segment for each kind of protocol that a rule can name, to a port if the
// protocol has ports.
func transports(port uint16) []segment {
	return []segment{
		tcp(port, ack), udp(port), withPorts(protoUDPLite, port, 8), withPorts(protoSCTP, port, 12),
		withPorts(protoDCCP, port, 16), icmp(), bare(protoICMPv6, 8), segment{protoGRE, udp(port).data},
	}
}

// service is a block rule of the policy, or two for the same protocols.
type service struct {
	dst    string
	ports  []uint16 // none: all
	protos []uint8
}

func services() []service {
	withPorts := []uint8{protoTCP, protoUDP, protoUDPLite, protoSCTP, protoDCCP}
	return []service{
		{"203.0.113.1", []uint16{1, 65535}, withPorts},
		{"203.0.113.1", []uint16{256}, []uint8{protoTCP}},
		{"203.0.113.2", []uint16{53}, []uint8{protoUDP}},
		{"203.0.113.3", nil, []uint8{protoUDP}},
		{"203.0.113.4", nil, []uint8{protoGRE}},
		{"203.0.113.5", []uint16{5000}, []uint8{protoSCTP}},
		{"203.0.113.5", []uint16{5001}, []uint8{protoDCCP}},
		{"203.0.113.5", []uint16{5002}, []uint8{protoUDPLite}},
		{"203.0.113.6", nil, []uint8{protoICMP}},
		{"203.0.113.7", []uint16{25}, []uint8{protoTCP}},
		{"203.0.113.8", nil, []uint8{protoICMPv6}},
		{"2001:db8::1:1", []uint16{443}, []uint8{protoTCP}},
		{"2001:db8::1:2", nil, []uint8{protoICMPv6}},
		{"2001:db8::1:3", []uint16{1, 65535}, withPorts},
		{"203.0.113.128", []uint16{80}, []uint8{protoTCP}}, // first and last of a network
		{"203.0.113.255", []uint16{80}, []uint8{protoTCP}},
	}
}

// serviceVerdict returns the verdict for a protocol and port of an address in services.
func serviceVerdict(dst string, proto uint8, port uint16) verdict {
	for _, s := range services() {
		if s.dst == dst && slices.Contains(s.protos, proto) && (s.ports == nil || slices.Contains(s.ports, port)) {
			return blocked
		}
	}
	return pass
}

func serviceRows() []row {
	var rows []row
	for _, s := range services() {
		for _, dst := range spellings(netip.MustParseAddr(s.dst)) {
			for _, port := range append([]uint16{0, 2, 54, 443, 13568, 65534}, s.ports...) {
				for _, t := range transports(port) {
					rows = append(rows, row{fmt.Sprintf("%s protocol %d port %d", dst, t.proto, port),
						packet{dst: dst.String(), payload: t}, serviceVerdict(s.dst, t.proto, port)})
				}
			}
		}
	}
	later := func(dst string, proto uint8) packet {
		return packet{dst: dst, payload: segment{proto, udp(53).data}, offset: 1480}
	}
	return append(rows,
		row{"mail, blocked", packet{dst: "203.0.113.7", payload: tcp(25, syn)}, blocked},
		row{"mail data, blocked", packet{dst: "203.0.113.7", payload: tcp(25, ack)}, blocked},
		row{"other mail, limited", packet{dst: "203.0.113.7", payload: tcp(587, syn)}, admitted},
		row{"port 25 of UDP", packet{dst: "203.0.113.7", payload: udp(25)}, pass},
		// A later fragment has a protocol but no port, and its data must not be read as one.
		row{"later fragment, rule with a port", later("203.0.113.2", protoUDP), pass},
		row{"later fragment, rule for the protocol", later("203.0.113.3", protoUDP), blocked},
		row{"later fragment, rule for another protocol", later("203.0.113.4", protoUDP), pass},
		row{"first fragment, rule with a port", packet{dst: "203.0.113.2", payload: udp(53), flags: 1}, blocked},
		row{"later fragment on IPv6, rule with a port", packet{dst: "2001:db8::1:1", payload: fragment(1448, false, tcp(443, ack))}, pass},
		row{"first fragment on IPv6, rule with a port", packet{dst: "2001:db8::1:1", payload: fragment(0, true, tcp(443, ack))}, blocked},
		row{"behind extensions, rule with a port", packet{dst: "2001:db8::1:1", payload: hopOpts(dstOpts(tcp(443, ack)))}, blocked},
		row{"behind extensions, rule for the protocol", packet{dst: "2001:db8::1:2", payload: chain(8, bare(protoICMPv6, 8))}, blocked},
		row{"behind AH, rule with a port", packet{dst: "203.0.113.2", payload: authentication(24, udp(53))}, blocked},
		row{"later fragment on IPv6, rule for the protocol", packet{dst: "2001:db8::1:2", payload: fragment(1448, true, bare(protoICMPv6, 8))}, blocked})
}

func nestedRows() []row {
	return []row{
		// Blocked 10.0.0.0/8, 10.1.0.0/16:80/tcp, 10.2.0.0/16:53; allowed
		// 10.1.0.0/16:25/tcp, 10.2.2.2, 10.3.0.0/16/udp.
		{"outer", packet{dst: "10.0.0.1", payload: udp(80)}, blocked},
		{"inner, its port", packet{dst: "10.1.0.1", payload: tcp(80, syn)}, blocked},
		{"inner, another port", packet{dst: "10.1.0.1", payload: tcp(81, syn)}, blocked},
		{"inner, another protocol", packet{dst: "10.1.0.1", payload: udp(80)}, blocked},
		{"inner, no port", packet{dst: "10.1.0.1", payload: icmp()}, blocked},
		{"inner, allowed port", packet{dst: "10.1.255.255", payload: tcp(25, ack)}, rateLimited},
		{"inner, allowed port, mail", packet{dst: "10.1.255.255", payload: tcp(25, syn)}, admitted},
		{"inner, allowed port of another protocol", packet{dst: "10.1.0.1", payload: udp(25)}, blocked},
		{"behind inner, its allowed port", packet{dst: "10.2.0.0", payload: tcp(25, syn)}, blocked},
		{"inner, port of any protocol", packet{dst: "10.2.0.1", payload: withPorts(protoSCTP, 53, 12)}, blocked},
		{"innermost, allowed", packet{dst: "10.2.2.2", payload: udp(53)}, pass},
		{"innermost, allowed, no port", packet{dst: "10.2.2.2", payload: icmp()}, pass},
		{"next to innermost", packet{dst: "10.2.2.3", payload: udp(54)}, blocked},
		{"inner, allowed protocol", packet{dst: "10.3.3.3", payload: udp(1)}, pass},
		{"inner, allowed protocol, later fragment", packet{dst: "10.3.3.3", payload: bare(protoUDP, 8), offset: 1480}, pass},
		{"inner, not the allowed protocol", packet{dst: "10.3.3.3", payload: tcp(1, ack)}, blocked},
		{"inner, not the allowed protocol, no port", packet{dst: "10.3.3.3", payload: icmp()}, blocked},
		{"outside", packet{dst: "11.0.0.0", payload: udp(80)}, pass},

		// Blocked 172.16.0.0/12:80/tcp, 172.16.1.0/24:443/tcp, 172.16.1.1/udp,
		// 172.17.0.1; allowed 172.16.0.0/16:8080/tcp, 172.17.0.0/16:9/udp.
		{"port of outer", packet{dst: "172.31.255.255", payload: tcp(80, ack)}, blocked},
		{"not the port of outer", packet{dst: "172.31.255.255", payload: tcp(443, ack)}, pass},
		{"port of outer, in inner", packet{dst: "172.16.1.2", payload: tcp(80, ack)}, blocked},
		{"port of inner", packet{dst: "172.16.1.2", payload: tcp(443, ack)}, blocked},
		{"port of inner, in outer", packet{dst: "172.16.2.2", payload: tcp(443, ack)}, pass},
		{"no port of any", packet{dst: "172.16.1.2", payload: tcp(444, ack)}, pass},
		{"protocol of innermost", packet{dst: "172.16.1.1", payload: udp(444)}, blocked},
		{"protocol of innermost, later fragment", packet{dst: "172.16.1.1", payload: bare(protoUDP, 0), offset: 8}, blocked},
		{"port of outer, in innermost", packet{dst: "172.16.1.1", payload: tcp(80, ack)}, blocked},
		{"port of inner, in innermost", packet{dst: "172.16.1.1", payload: tcp(443, ack)}, blocked},
		{"allowed port, in innermost", packet{dst: "172.16.1.1", payload: tcp(8080, ack)}, pass},
		{"not the protocol of innermost", packet{dst: "172.16.1.1", payload: icmp()}, pass},
		{"single address in an allowed port", packet{dst: "172.17.0.1", payload: udp(9)}, pass},
		{"single address, another port", packet{dst: "172.17.0.1", payload: udp(10)}, blocked},
		{"single address, no port", packet{dst: "172.17.0.1", payload: icmp()}, blocked},
		{"next to it", packet{dst: "172.17.0.2", payload: icmp()}, pass},

		// Blocked 192.168.0.0/16 within allowed 192.168.0.0/15.
		{"blocked within allowed", packet{dst: "192.168.1.1", payload: udp(53)}, pass},
		{"blocked within allowed, mail", packet{dst: "192.168.1.1", payload: tcp(25, syn)}, admitted},

		// Blocked 2001:db8::/32, [2001:db8:1::/48]:80/tcp; allowed
		// 2001:db8:1:1::/64, [2001:db8:2::1]:25/tcp.
		{"IPv6 outer", packet{dst: "2001:db8::2", payload: udp(53)}, blocked},
		{"IPv6 inner, its port", packet{dst: "2001:db8:1::2", payload: tcp(80, syn)}, blocked},
		{"IPv6 inner, another port", packet{dst: "2001:db8:1::2", payload: tcp(81, syn)}, blocked},
		{"IPv6 innermost, allowed", packet{dst: "2001:db8:1:1::2", payload: tcp(80, syn)}, pass},
		{"IPv6 innermost, allowed, no port", packet{dst: "2001:db8:1:1::2", payload: bare(protoICMPv6, 8)}, pass},
		{"IPv6 single address, allowed port", packet{dst: "2001:db8:2::1", payload: tcp(25, syn)}, admitted},
		{"IPv6 single address, another port", packet{dst: "2001:db8:2::1", payload: tcp(26, syn)}, blocked},
		{"IPv6 behind innermost", packet{dst: "2001:db8:1:2::", payload: tcp(80, syn)}, blocked},

		{"allowed time of metadata", packet{dst: metadata, payload: udp(123)}, pass},
		{"allowed time of metadata, v4-mapped", packet{dst: "::ffff:169.254.169.254", payload: udp(123)}, pass},
		{"allowed time of metadata, NAT64", packet{dst: "64:ff9b::a9fe:a9fe", payload: udp(123)}, pass},
		{"metadata, NAT64", packet{dst: "64:ff9b::a9fe:a9fe", payload: udp(124)}, blocked},
	}
}

// sourceRows are packets with a forged source. Only single addresses are blocked as sources: a
// blocked network may contain the containers themselves.
func sourceRows() []row {
	return []row{
		{"metadata", packet{src: metadata, dst: open4, payload: udp(53)}, blocked},
		{"metadata, no ports", packet{src: metadata, dst: open4, payload: icmp()}, blocked},
		{"metadata, later fragment", packet{src: metadata, dst: open4, payload: bare(protoUDP, 8), offset: 1480}, blocked},
		{"metadata, to metadata", packet{src: metadata, dst: metadata, payload: tcp(80, syn)}, blocked},
		{"metadata on IPv6", packet{src: "fd00:ec2::254", dst: open6, payload: bare(protoICMPv6, 8)}, blocked},
		{"next to metadata", packet{src: "169.254.169.253", dst: open4, payload: icmp()}, pass},
		{"single address within an allowed port", packet{src: "172.17.0.1", dst: open4, payload: icmp()}, blocked},
		// The allow list holds for destinations only.
		{"port that is allowed as destination", packet{src: metadata, dst: open4, payload: udp(40000).from(123)}, blocked},
		{"single address, from the allowed port", packet{src: "172.17.0.1", dst: open4, payload: udp(40000).from(9)}, blocked},
		{"protocol of a single address", packet{src: "172.16.1.1", dst: open4, payload: udp(1)}, blocked},
		{"not the protocol of a single address", packet{src: "172.16.1.1", dst: open4, payload: tcp(1, ack)}, pass},
		{"network", packet{src: "10.0.0.1", dst: open4, payload: udp(53)}, pass},
		{"network, mail", packet{src: "10.0.0.1", dst: open4, payload: tcp(25, syn)}, admitted},
		{"network with a port", packet{src: "172.16.1.2", dst: open4, payload: tcp(1, ack).from(443)}, pass},
		{"network on IPv6", packet{src: "2001:db8::9", dst: open6, payload: udp(53)}, pass},
		// An allowed destination is not blocked, whatever the source.
		{"metadata, to an allowed service of a blocked address", packet{src: metadata, dst: metadata, payload: udp(123)}, pass},
		{"metadata, to an allowed part of a blocked network", packet{src: metadata, dst: "10.2.2.2", payload: udp(53)}, pass},
		{"metadata, to an allowed address", packet{src: metadata, dst: "198.51.100.9", payload: udp(53)}, pass},
		{"metadata, to an allowed address, mail", packet{src: metadata, dst: "198.51.100.9", payload: tcp(25, syn)}, admitted},
		{"metadata, next to an allowed address", packet{src: metadata, dst: "198.51.100.8", payload: udp(53)}, blocked},
	}
}

// sourceServiceRows test rules with ports and protocols. For a source, the port of the rule is
// the source port.
func sourceServiceRows() []row {
	var rows []row
	for _, s := range services() {
		src := netip.MustParseAddr(s.dst)
		other := open6
		if src.Is4() {
			other = open4
		}
		for _, port := range append([]uint16{0, 2, 80, 65534}, s.ports...) {
			for _, t := range transports(40000) {
				want := serviceVerdict(s.dst, t.proto, port)
				if s.dst == "203.0.113.128" || s.dst == "203.0.113.255" {
					want = pass
				}
				rows = append(rows, row{fmt.Sprintf("%s protocol %d port %d", s.dst, t.proto, port),
					packet{src: s.dst, dst: other, payload: t.from(port)}, want})
			}
		}
		for _, port := range s.ports {
			rows = append(rows, row{fmt.Sprint(s.dst, ", its port ", port, " as destination"),
				packet{src: s.dst, dst: other, payload: udp(port)}, pass})
		}
	}
	rows = append(rows, row{"later fragment", packet{src: "203.0.113.2", dst: open4, payload: segment{protoUDP, udp(53).from(53).data}, offset: 1480}, pass})
	return rows
}
