package verdict

import (
	"bytes"
	"fmt"
)

// Destinations that no policy of the tables blocks, except those that block everything, and the
// metadata service of most clouds.
const (
	open4    = "192.0.2.99"
	open6    = "2001:4860::99"
	metadata = "169.254.169.254"
)

// headerTables test what is between the link header and the transport header.
func headerTables() []table {
	return []table{
		{"frames", "nothing", frameRows()},
		{"IPv4 header", "default", ipv4Rows()},
		{"IPv4 options", "default", optionRows()},
		{"IPv4 fragments", "default", fragment4Rows()},
		{"IPv6 header", "default", ipv6Rows()},
		{"IPv6 extensions", "default", extensionRows()},
		{"IPv6 fragments", "default", fragment6Rows()},
	}
}

func frameRows() []row {
	rows := []row{
		{"IPv4 as IPv6", packet{dst: open4, payload: udp(53).grow(20), link: new(uint16(etherIPv6))}, malformed},
		{"IPv6 as IPv4", packet{dst: open6, payload: udp(53), link: new(uint16(etherIPv4))}, malformed},
	}
	for _, link := range []uint16{0, 1, 0x0801, 0x0008, 0x0806, 0x8100, 0x86dc, 0xdd86, 0x88a8, 0xffff} {
		rows = append(rows,
			row{fmt.Sprintf("IPv4 in type %04x", link), packet{dst: open4, payload: udp(53), link: &link}, malformed},
			row{fmt.Sprintf("IPv6 in type %04x", link), packet{dst: open6, payload: udp(53), link: &link}, malformed})
	}
	return rows
}

func ipv4Rows() []row {
	rows := []row{
		{"UDP", packet{dst: open4, payload: udp(53)}, pass},
		{"TCP", packet{dst: open4, payload: tcp(443, ack).grow(100)}, pass},
		{"longest", packet{dst: open4, payload: udp(53).grow(longest - 28)}, pass},
		{"no payload", packet{dst: open4, payload: bare(protoTest, 0)}, pass},
		{"don't fragment", packet{dst: open4, payload: tcp(443, syn), flags: 2}, pass},
		{"evil bit", packet{dst: open4, payload: tcp(443, syn), flags: 4}, pass},
		{"mail with don't fragment", packet{dst: open4, payload: tcp(25, syn), flags: 2}, admitted},
		{"mail with the evil bit", packet{dst: open4, payload: tcp(25, syn), flags: 4}, admitted},
		{"blocked and longest", packet{dst: metadata, payload: udp(53).grow(longest - 28)}, blocked},
	}
	for version := range uint8(16) {
		want := malformed
		if version == 4 {
			want = pass
		}
		rows = append(rows, row{fmt.Sprint("version ", version), packet{dst: open4, payload: udp(53), first: new(version<<4 | 5)}, want})
	}
	// A wrong header length moves the ports or the options, which are NOP here.
	for ihl := range uint8(16) {
		p := packet{dst: open4, payload: bare(protoTest, 40), first: new(4<<4 | ihl)}
		p.payload.data = bytes.Repeat([]byte{1}, 40)
		want := pass
		if ihl < 5 {
			want = malformed
		}
		rows = append(rows, row{fmt.Sprint("header of ", ihl, " words"), p, want})
		p.payload.data = p.payload.data[:16]
		if ihl > 9 {
			want = malformed // longer than the packet
		}
		rows = append(rows, row{fmt.Sprint("header of ", ihl, " words in 9"), p, want})
	}
	for _, n := range []int{-48, -28, -8, -1, 1, 8, 256, 65535 - 48} {
		rows = append(rows,
			row{fmt.Sprintf("length off by %d", n), packet{dst: open4, payload: udp(53).grow(20), length: n}, malformed},
			row{fmt.Sprintf("mail, length off by %d", n), packet{dst: open4, payload: tcp(25, syn).grow(8), length: n}, malformed})
	}
	return append(rows, row{"trailing byte", packet{dst: open4, payload: udp(53), addition: []byte{0}}, malformed})
}

// Types of IPv4 options.
const (
	optEnd         = 0
	optNop         = 1
	optRR          = 7
	optTimestamp   = 68
	optLSRR        = 131
	optSSRR        = 137
	optRouterAlert = 148
)

func optionRows() []row {
	route := []byte{7, 4, 169, 254, 169, 254}
	full := func(opt ...byte) []byte { return append(opt, make([]byte, 40-len(opt))...) }
	nops := func(n int, opt ...byte) []byte { return append(bytes.Repeat([]byte{optNop}, n), opt...) }
	rows := []row{
		{"one NOP", packet{options: []byte{optNop}}, pass},
		{"all NOP", packet{options: nops(40)}, pass},
		{"end", packet{options: []byte{optEnd}}, pass},
		{"all end", packet{options: full()}, pass},
		{"record route", packet{options: append([]byte{optRR}, route...)}, pass},
		{"longest record route", packet{options: full(optRR, 39, 4)}, pass},
		{"option of all 40 bytes", packet{options: full(optRR, 40, 4)}, pass},
		{"timestamp", packet{options: []byte{optTimestamp, 8, 5, 0, 0, 0, 0, 0}}, pass},
		{"router alert", packet{options: []byte{optRouterAlert, 4, 0, 0}}, pass},
		{"two options", packet{options: []byte{optRouterAlert, 4, 0, 0, optRR, 7, 4, 0, 0, 0, 0}}, pass},
		{"option of two bytes", packet{options: nops(38, 30, 2)}, pass},
		{"source route after the end", packet{options: append([]byte{optEnd, optLSRR}, route...)}, pass},
		{"source route within an option", packet{options: []byte{optRR, 8, optLSRR, 7, 4, 169, 254, 169}}, pass},
		{"no room for a length", packet{options: nops(39, 30)}, malformed},
		{"no room for the length of a record route", packet{options: nops(3, optRR)}, malformed},
		{"length 0", packet{options: []byte{30, 0, 0, 0}}, malformed},
		{"length 1", packet{options: []byte{30, 1, 1, 1}}, malformed},
		{"longer than the options by 1", packet{options: []byte{30, 5, 0, 0}}, malformed},
		{"longer than 40 bytes", packet{options: full(30, 41)}, malformed},
		{"length 255", packet{options: []byte{30, 255, 0, 0}}, malformed},
		{"second longer than the options", packet{options: []byte{30, 2, 30, 3}}, malformed},
	}
	for _, kind := range []byte{optLSRR, optSSRR} {
		name := map[byte]string{optLSRR: "LSRR", optSSRR: "SSRR"}[kind]
		for n := range 40 {
			p := packet{options: append(nops(n, kind), route...)}
			if n > 33 {
				p.options = p.options[:40]
			}
			rows = append(rows, row{fmt.Sprint(name, " at ", n), p, malformed})
		}
		rows = append(rows, row{name + " after a record route", packet{options: append([]byte{optRR, 7, 4, 0, 0, 0, 0, kind}, route...)}, malformed})
		for _, n := range []byte{0, 1, 2, 3, 6, 8, 255} {
			rows = append(rows, row{fmt.Sprint(name, " of length ", n), packet{options: append([]byte{kind, n}, route[1:]...)}, malformed})
		}
		// Only one bit of its type tells this option from a source route.
		for bit := range 8 {
			near := kind ^ 1<<bit
			rows = append(rows, row{fmt.Sprint("neighbour ", near, " of ", name), packet{options: append([]byte{near}, route...)}, pass})
		}
	}
	for i := range rows {
		rows[i].packet.dst, rows[i].packet.payload = open4, udp(53)
	}
	// The ports follow the options, whatever their length.
	for n := 0; n <= 40; n += 4 {
		rows = append(rows,
			row{fmt.Sprint("mail behind ", n, " bytes"), packet{dst: open4, payload: tcp(25, syn), options: nops(n)}, admitted},
			row{fmt.Sprint("web behind ", n, " bytes"), packet{dst: open4, payload: tcp(80, syn), options: nops(n)}, pass},
			row{fmt.Sprint("blocked behind ", n, " bytes"), packet{dst: metadata, payload: tcp(80, syn), options: nops(n)}, blocked})
	}
	return rows
}

func fragment4Rows() []row {
	ah := func(s segment) segment { return authentication(24, s) }
	rows := []row{
		{"first of UDP", packet{dst: open4, payload: udp(53).grow(8), flags: 1}, pass},
		{"first of mail", packet{dst: open4, payload: tcp(25, syn).grow(4), flags: 1}, admitted},
		{"first of mail behind AH", packet{dst: open4, payload: ah(tcp(25, syn)), flags: 1}, admitted},
		{"first, blocked", packet{dst: metadata, payload: udp(53), flags: 1}, blocked},
		{"last, blocked", packet{dst: metadata, payload: bare(protoUDP, 8), offset: 1480}, blocked},
		{"later, from a blocked address", packet{src: metadata, dst: open4, payload: bare(protoUDP, 8), offset: 1480}, blocked},
	}
	for n := 8; n <= 24; n += 4 {
		want := pass
		if n < 20 {
			want = malformed
		}
		rows = append(rows, row{fmt.Sprint("first with ", n, " bytes of TCP"), packet{dst: open4, payload: tcp(443, syn).grow(4).cut(n), flags: 1}, want})
	}
	for _, offset := range []int{8, 16, 24, 32, 1480, 65528} {
		for _, more := range []uint16{0, 1} {
			what := fmt.Sprint(" at ", offset)
			if more == 1 {
				what += " with more to come"
			}
			tcpWant := pass
			if offset < 20 {
				tcpWant = malformed
			}
			// Bytes that would be a header in a whole packet are data here.
			rows = append(rows,
				row{"TCP" + what, packet{dst: open4, payload: tcp(25, syn), flags: more, offset: offset}, tcpWant},
				row{"short TCP" + what, packet{dst: open4, payload: bare(protoTCP, 0), flags: more, offset: offset}, tcpWant},
				row{"UDP" + what, packet{dst: open4, payload: bare(protoUDP, 4), flags: more, offset: offset}, pass},
				row{"SCTP" + what, packet{dst: open4, payload: bare(protoSCTP, 0), flags: more, offset: offset}, pass},
				row{"ICMP" + what, packet{dst: open4, payload: bare(protoICMP, 1), flags: more, offset: offset}, pass},
				row{"AH" + what, packet{dst: open4, payload: ah(udp(53)), flags: more, offset: offset}, malformed})
		}
	}
	return rows
}

func ipv6Rows() []row {
	rows := []row{
		{"UDP", packet{dst: open6, payload: udp(53)}, pass},
		{"TCP", packet{dst: open6, payload: tcp(443, ack).grow(100)}, pass},
		{"longest", packet{dst: open6, payload: udp(53).grow(longest - 48)}, pass},
		{"nothing behind the header", packet{dst: open6, payload: bare(protoNone, 0)}, pass},
		{"no next header, but bytes", packet{dst: open6, payload: bare(protoNone, 20)}, pass},
		{"blocked and longest", packet{dst: "fd00:ec2::254", payload: udp(53).grow(longest - 48)}, blocked},
		{"traffic class and flow label", packet{dst: open6, payload: tcp(25, syn), first: new(uint8(0x6f))}, admitted},
		{"payload length of a jumbogram", packet{dst: open6, payload: hopOpts(udp(53)), length: -16}, malformed},
		{"trailing byte", packet{dst: open6, payload: udp(53), addition: []byte{0}}, malformed},
	}
	for version := range uint8(16) {
		want := malformed
		if version == 6 {
			want = pass
		}
		rows = append(rows, row{fmt.Sprint("version ", version), packet{dst: open6, payload: udp(53), first: new(version << 4)}, want})
	}
	for _, n := range []int{-28, -8, -1, 1, 8, 40, 256, 65535 - 28} {
		rows = append(rows,
			row{fmt.Sprintf("length off by %d", n), packet{dst: open6, payload: udp(53).grow(20), length: n}, malformed},
			row{fmt.Sprintf("mail, length off by %d", n), packet{dst: open6, payload: tcp(25, syn).grow(8), length: n}, malformed})
	}
	return rows
}

// extensions are all extension headers, before a segment.
func extensions() []struct {
	name   string
	before func(segment) segment
} {
	sized := func(proto uint8, size int) func(segment) segment {
		return func(s segment) segment { return extension(proto, size, s) }
	}
	return []struct {
		name   string
		before func(segment) segment
	}{
		{"hop-by-hop options", sized(protoHopOpts, 16)},
		{"destination options", sized(protoDstOpts, 16)},
		{"longest options", sized(protoDstOpts, 2048)},
		{"routing header", func(s segment) segment { return routing(0, s) }},
		{"atomic fragment header", func(s segment) segment { return fragment(0, false, s) }},
		{"AH", func(s segment) segment { return authentication(24, s) }},
		{"AH of odd size", func(s segment) segment { return authentication(28, s) }},
		{"longest AH", func(s segment) segment { return authentication(1028, s) }},
		{"mobility header", sized(protoMobility, 16)},
		{"HIP", sized(protoHIP, 40)},
		{"shim6", sized(protoShim6, 16)},
	}
}

func extensionRows() []row {
	var rows []row
	for _, ext := range extensions() {
		name, before := ext.name, ext.before
		rows = append(rows,
			row{name, packet{dst: open6, payload: before(udp(53))}, pass},
			row{name + ", web", packet{dst: open6, payload: before(tcp(443, syn))}, pass},
			row{name + ", mail", packet{dst: open6, payload: before(tcp(25, syn))}, admitted},
			row{name + ", mail answer", packet{dst: open6, payload: before(tcp(25, syn|ack))}, rateLimited},
			row{name + ", blocked", packet{dst: "fd00:ec2::254", payload: before(icmp())}, blocked},
			row{name + " before AH, mail", packet{dst: open6, payload: before(authentication(12, tcp(25, syn)))}, admitted})
		whole := before(bare(protoICMPv6, 0)).data
		for n := range min(len(whole), 64) {
			rows = append(rows, row{fmt.Sprint(name, " cut to ", n), packet{dst: open6, payload: before(bare(protoICMPv6, 0)).cut(n)}, malformed})
		}
		rows = append(rows,
			row{name + " cut by one", packet{dst: open6, payload: before(bare(protoICMPv6, 0)).cut(len(whole) - 1)}, malformed},
			row{name + " and nothing else", packet{dst: open6, payload: before(bare(protoICMPv6, 0))}, pass},
			row{name + " without its TCP", packet{dst: open6, payload: before(tcp(443, syn)).cut(len(whole) + 19)}, malformed},
			row{name + " without its UDP", packet{dst: open6, payload: before(udp(53)).cut(len(whole) + 7)}, malformed})
	}
	for left := range 256 {
		want := malformed
		if left == 0 {
			want = pass
		}
		rows = append(rows, row{fmt.Sprint("segments left ", left), packet{dst: open6, payload: routing(uint8(left), udp(53))}, want})
	}
	for _, kind := range []byte{0, 2, 3, 4} {
		rows = append(rows,
			row{fmt.Sprint("routing type ", kind), packet{dst: open6, payload: routing(0, udp(53)).edit(2, kind)}, pass},
			row{fmt.Sprint("routing type ", kind, " with segments"), packet{dst: open6, payload: routing(1, udp(53)).edit(2, kind)}, malformed})
	}
	rows = append(rows,
		row{"segments left behind options", packet{dst: open6, payload: hopOpts(routing(1, udp(53)))}, malformed},
		row{"segments left behind a routing header", packet{dst: open6, payload: routing(0, routing(1, udp(53)))}, malformed},
		row{"segments left, ICMPv6", packet{dst: open6, payload: routing(1, bare(protoICMPv6, 8))}, malformed},
		row{"AH shorter than itself", packet{dst: open6, payload: authentication(8, tcp(25, syn))}, admitted},
		row{"ESP", packet{dst: open6, payload: bare(protoESP, 64)}, pass},
		row{"ESP that looks like mail", packet{dst: open6, payload: segment{protoESP, tcp(25, syn).data}}, pass},
		row{"IPv6 in IPv6", packet{dst: open6, payload: segment{protoIPv6, packet{dst: "fd00:ec2::254", payload: udp(53)}.bytes()}}, pass})
	for n := 6; n <= 10; n++ {
		web, mail, stop := pass, admitted, blocked
		if n > 8 {
			web, mail, stop = malformed, malformed, malformed
		}
		rows = append(rows,
			row{fmt.Sprint("chain of ", n), packet{dst: open6, payload: chain(n, udp(53))}, web},
			row{fmt.Sprint("chain of ", n, ", no next header"), packet{dst: open6, payload: chain(n, bare(protoNone, 0))}, web},
			row{fmt.Sprint("chain of ", n, ", mail"), packet{dst: open6, payload: chain(n, tcp(25, syn))}, mail},
			row{fmt.Sprint("chain of ", n, ", blocked"), packet{dst: "fd00:ec2::254", payload: chain(n, udp(53))}, stop},
			row{fmt.Sprint("chain of ", n, ", a later fragment at the end"), packet{dst: open6, payload: chain(n-1, fragment(1448, true, bare(protoTCP, 8)))}, web})
	}
	// IPv4 has only one of them; there, the others' numbers are protocols without ports.
	for _, ext := range extensions() {
		name, before := ext.name, ext.before
		s := before(tcp(25, syn))
		want := pass
		if s.proto == protoAH {
			want = admitted
		}
		rows = append(rows,
			row{"on IPv4: " + name, packet{dst: open4, payload: s}, want},
			row{"on IPv4: " + name + ", blocked", packet{dst: metadata, payload: s}, blocked},
			row{"on IPv4: " + name + " behind AH", packet{dst: open4, payload: authentication(12, s)}, want})
	}
	return rows
}

func fragment6Rows() []row {
	rows := []row{
		{"first of UDP", packet{dst: open6, payload: fragment(0, true, udp(53))}, pass},
		{"first of mail", packet{dst: open6, payload: fragment(0, true, tcp(25, syn))}, admitted},
		{"atomic, mail", packet{dst: open6, payload: fragment(0, false, tcp(25, syn))}, admitted},
		{"reserved bits", packet{dst: open6, payload: fragment(0, false, tcp(25, syn)).edit(3, 6)}, admitted},
		{"first behind options, mail", packet{dst: open6, payload: dstOpts(fragment(0, true, tcp(25, syn)))}, admitted},
		{"first before options, mail", packet{dst: open6, payload: fragment(0, true, dstOpts(tcp(25, syn)))}, admitted},
		{"first without its options", packet{dst: open6, payload: fragment(0, true, segment{protoDstOpts, nil})}, malformed},
		{"atomic in atomic, mail", packet{dst: open6, payload: fragment(0, false, fragment(0, false, tcp(25, syn)))}, admitted},
		{"later in first", packet{dst: open6, payload: fragment(0, true, fragment(1448, true, bare(protoUDP, 8)))}, pass},
		{"later in atomic, TCP at 8", packet{dst: open6, payload: fragment(0, false, fragment(8, true, bare(protoTCP, 8)))}, malformed},
		{"first, blocked", packet{dst: "fd00:ec2::254", payload: fragment(0, true, udp(53))}, blocked},
		{"later, blocked", packet{dst: "fd00:ec2::254", payload: fragment(1448, false, bare(protoUDP, 1))}, blocked},
		{"later, from a blocked address", packet{src: "fd00:ec2::254", dst: open6, payload: fragment(1448, false, bare(protoUDP, 1))}, blocked},
	}
	for _, n := range []int{0, 8, 16, 19, 20, 24} {
		want := pass
		if n < 20 {
			want = malformed
		}
		rows = append(rows, row{fmt.Sprint("first with ", n, " bytes of TCP"), packet{dst: open6, payload: fragment(0, true, tcp(443, syn).grow(4).cut(n))}, want})
	}
	for _, offset := range []uint16{8, 16, 24, 32, 1448, 65528} {
		for _, more := range []bool{false, true} {
			later := func(s segment) packet { return packet{dst: open6, payload: fragment(offset, more, s)} }
			what := fmt.Sprint(" at ", offset)
			if more {
				what += " with more to come"
			}
			tcpWant := pass
			if offset < 20 {
				tcpWant = malformed
			}
			rows = append(rows,
				row{"TCP" + what, later(tcp(25, syn)), tcpWant},
				row{"short TCP" + what, later(bare(protoTCP, 0)), tcpWant},
				row{"UDP" + what, later(bare(protoUDP, 4)), pass},
				row{"ICMPv6" + what, later(bare(protoICMPv6, 0)), pass},
				row{"ESP" + what, later(bare(protoESP, 8)), pass})
			for _, proto := range []uint8{protoHopOpts, protoRouting, protoFragment, protoAH, protoDstOpts, protoMobility, protoHIP, protoShim6} {
				rows = append(rows, row{fmt.Sprint("extension ", proto, what), later(bare(proto, 8)), malformed})
			}
		}
	}
	return rows
}
