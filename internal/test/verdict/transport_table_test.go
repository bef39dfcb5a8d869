package verdict

import "fmt"

func transportTables() []table {
	return []table{
		{"transport headers cut short", "services", shortRows()},
		{"protocols", "default", protocolRows()},
		{"TCP flags", "default", flagRows()},
	}
}

// shortRows cuts each transport header at each length.
func shortRows() []row {
	var rows []row
	for _, transport := range []struct {
		name   string
		header segment
		need   int
	}{
		{"TCP", tcp(443, syn), 20},
		{"TCP with options", tcp(443, syn).doff(10).grow(20), 20},
		{"UDP", udp(53), 8},
		{"UDPLite", withPorts(protoUDPLite, 53, 8), 8},
		{"SCTP", withPorts(protoSCTP, 53, 12), 8},
		{"DCCP", withPorts(protoDCCP, 53, 16), 8},
		{"ICMP", icmp(), 0},
		{"ICMPv6", bare(protoICMPv6, 8), 0},
		{"ESP", bare(protoESP, 8), 0},
		{"experimental protocol", bare(protoTest, 8), 0},
	} {
		for n := range len(transport.header.data) + 1 {
			want := pass
			if n < transport.need {
				want = malformed
			}
			s := transport.header.cut(n)
			name := fmt.Sprint(n, " bytes of ", transport.name)
			rows = append(rows,
				row{name, packet{dst: open4, payload: s}, want},
				row{name + " on IPv6", packet{dst: open6, payload: s}, want},
				row{name + " behind options", packet{dst: open4, payload: s, options: []byte{optNop}}, want},
				row{name + " behind an extension", packet{dst: open6, payload: dstOpts(s)}, want},
				row{name + ", first fragment", packet{dst: open4, payload: s, flags: 1}, want},
				row{name + ", first fragment on IPv6", packet{dst: open6, payload: fragment(0, true, s)}, want})
		}
	}
	return rows
}

// protocolRows has every protocol on IPv4 and IPv6, to an open destination and to the metadata
// service, with a header that would be a mail SYN. Read as a fragment header, it is that of a
// later fragment of an unknown protocol.
func protocolRows() []row {
	var rows []row
	for proto := range 256 {
		s := segment{uint8(proto), tcp(25, syn).data}
		want4, want6 := pass, pass
		switch proto {
		case protoTCP:
			want4, want6 = admitted, admitted
		case protoAH:
			want4, want6 = malformed, malformed // longer than the packet
		case protoHopOpts, protoRouting, protoDstOpts, protoMobility, protoHIP, protoShim6:
			want6 = malformed // so are these, and there are segments left
		}
		stop4, stop6 := blocked, blocked
		if want4 == malformed {
			stop4 = malformed
		}
		if want6 == malformed {
			stop6 = malformed
		}
		name := fmt.Sprint("protocol ", proto)
		rows = append(rows,
			row{name, packet{dst: open4, payload: s}, want4},
			row{name + " on IPv6", packet{dst: open6, payload: s}, want6},
			row{name + " blocked", packet{dst: metadata, payload: s}, stop4},
			row{name + " blocked on IPv6", packet{dst: "fd00:ec2::254", payload: s}, stop6})
	}
	return append(rows,
		row{"tunnelled mail", packet{dst: open4, payload: segment{protoIPv4, packet{dst: open4, payload: tcp(25, syn)}.bytes()}}, pass},
		row{"tunnel to metadata", packet{dst: open4, payload: segment{protoIPv4, packet{dst: metadata, payload: tcp(80, syn)}.bytes()}}, pass},
		row{"6in4 to metadata", packet{dst: open4, payload: segment{protoIPv6, packet{dst: "fd00:ec2::254", payload: tcp(80, syn)}.bytes()}}, pass},
		row{"GRE", packet{dst: open4, payload: bare(protoGRE, 4)}, pass})
}

// flagRows has every combination of TCP flags.
func flagRows() []row {
	var rows []row
	for flags := range 256 {
		want := rateLimited // no TCP socket sends it
		if flags&(syn|ack) == syn {
			want = admitted
		}
		name := fmt.Sprintf("flags %#02x", flags)
		rows = append(rows,
			row{name, packet{dst: open4, payload: tcp(25, uint8(flags))}, want},
			row{name + " on IPv6", packet{dst: open6, payload: tcp(25, uint8(flags))}, want},
			row{name + " behind options", packet{dst: open4, payload: tcp(25, uint8(flags)), options: []byte{optNop}}, want},
			row{name + " behind an extension", packet{dst: open6, payload: dstOpts(tcp(25, uint8(flags)))}, want},
			row{name + " to the web", packet{dst: open4, payload: tcp(443, uint8(flags))}, pass},
			row{name + " to metadata", packet{dst: metadata, payload: tcp(80, uint8(flags))}, blocked})
	}
	// The data offset does not say where a packet goes, and Linux sends SYNs with data.
	for doff := range uint8(16) {
		for _, n := range []int{0, 1, 40, 1400} {
			s := tcp(25, syn).doff(doff).grow(n)
			name := fmt.Sprint("data offset ", doff, " and ", n, " bytes")
			rows = append(rows,
				row{name, packet{dst: open4, payload: s}, admitted},
				row{name + " on IPv6", packet{dst: open6, payload: s}, admitted})
		}
	}
	// Flags are read from the header, not from the bytes around it.
	return append(rows,
		row{"reserved bits set", packet{dst: open4, payload: tcp(25, syn).edit(12, 0x5f)}, admitted},
		row{"all else set", packet{dst: open4, payload: tcp(25, syn).edit(4, 255, 255, 255, 255, 255, 255, 255, 255)}, admitted},
		row{"window, checksum and urgent pointer", packet{dst: open4, payload: tcp(443, ack).edit(14, 2, 2, 2, 2, 2, 2)}, pass})
}
