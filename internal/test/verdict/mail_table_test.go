package verdict

import (
	"cmp"
	"fmt"
)

func mailTables() []table {
	return []table{
		{"mail ports", "default", mailPortRows(25, 465, 587)},
		{"other mail ports", "smtp ports", append(mailPortRows(1, 63, 64, 256, 2525, 65535),
			row{"25 is not one", packet{dst: open4, payload: tcp(25, syn)}, pass})},
		{"mail, exempt", "exempt", exemptRows()},
		{"mail, unlimited", "unlimited", []row{
			{"IPv4", packet{dst: open4, payload: tcp(25, syn)}, admitted},
			{"IPv6", packet{dst: open6, payload: tcp(25, syn)}, admitted},
			{"blocked", packet{dst: metadata, payload: tcp(25, syn)}, blocked},
			{"answer", packet{dst: open4, payload: tcp(25, syn|ack)}, unlimited},
			{"data", packet{dst: open6, payload: tcp(25, psh|ack)}, unlimited},
		}},
	}
}

// mailPortRows has the mail ports, the ports next to them, and those with the bytes swapped.
func mailPortRows(ports ...uint16) []row {
	mail := map[uint16]bool{}
	for _, port := range ports {
		mail[port] = true
	}
	tried := map[uint16]bool{}
	var rows []row
	for _, port := range append(ports, 0, 80, 443, 2526, 65535) {
		for _, near := range []uint16{port, port - 1, port + 1, port<<8 | port>>8, port ^ 64, port ^ 0x4000} {
			if tried[near] {
				continue
			}
			tried[near] = true
			// A packet that does not ask for a connection must belong to one that a TCP
			// socket has paid for; test runs have no such socket.
			want, rest := pass, pass
			if mail[near] {
				want, rest = admitted, rateLimited
			}
			name := fmt.Sprint("port ", near)
			rows = append(rows,
				row{name, packet{dst: open4, payload: tcp(near, syn)}, want},
				row{name + " on IPv6", packet{dst: open6, payload: tcp(near, syn)}, want},
				row{name + " behind options", packet{dst: open4, payload: tcp(near, syn), options: []byte{optNop}}, want},
				row{name + " behind an extension", packet{dst: open6, payload: hopOpts(tcp(near, syn))}, want},
				row{name + " in a suspect network", packet{dst: "169.254.169.253", payload: tcp(near, syn)}, want},
				row{name + ", no SYN", packet{dst: open4, payload: tcp(near, psh|ack)}, rest},
				row{name + ", answer", packet{dst: open4, payload: tcp(near, syn|ack)}, rest},
				row{name + ", reset", packet{dst: open4, payload: tcp(near, rst)}, rest},
				row{name + ", no flags, on IPv6", packet{dst: open6, payload: tcp(near, 0)}, rest},
				row{name + " as source", packet{dst: open4, payload: tcp(40000, syn).from(near)}, rest},
				row{name + ", UDP", packet{dst: open4, payload: udp(near)}, pass},
				row{name + ", SCTP", packet{dst: open4, payload: segment{protoSCTP, tcp(near, syn).data}}, pass},
				row{name + ", later fragment", packet{dst: open4, payload: tcp(near, syn), offset: 24}, pass})
		}
	}
	return rows
}

// exemptRows: exempt are 198.51.100.0/24, 10.1.2.3, 2001:db8:e::/48,
// 2001:db8:f::1, 10.4.0.0/16; blocked 10.1.0.0/16, 10.4.4.4:25/tcp,
// 2001:db8:e:1::/64; allowed 10.1.2.0/24.
func exemptRows() []row {
	var rows []row
	for _, to := range []struct {
		dst  string
		want verdict
	}{
		{"198.51.99.255", admitted}, {"198.51.100.0", pass}, {"198.51.100.255", pass}, {"198.51.101.0", admitted},
		{"2001:db8:d:ffff::", admitted}, {"2001:db8:e::", pass}, {"2001:db8:e:ffff::", pass}, {"2001:db8:f::", admitted},
		{"2001:db8:f::1", pass}, {"2001:db8:f::2", admitted},
		{"::ffff:198.51.100.9", pass}, {"::ffff:198.51.101.9", admitted},
		{"64:ff9b::c633:6409", pass}, {"64:ff9b::c633:6509", admitted},
		// Exempt does not mean allowed, and allowed does not mean exempt.
		{"10.1.2.3", pass}, {"10.1.2.4", admitted}, {"10.1.3.3", blocked}, {"10.4.4.4", blocked}, {"10.4.4.5", pass},
		{"2001:db8:e:1::1", blocked}, {metadata, blocked},
	} {
		rows = append(rows,
			row{to.dst, packet{dst: to.dst, payload: tcp(25, syn)}, to.want},
			row{to.dst + ", no mail", packet{dst: to.dst, payload: tcp(25, ack)}, cmp.Or(map[verdict]verdict{admitted: rateLimited}[to.want], to.want)})
	}
	return append(rows,
		row{"exempt, another port than the blocked one", packet{dst: "10.4.4.4", payload: tcp(587, syn)}, pass},
		row{"exempt source", packet{src: "198.51.100.9", dst: open4, payload: tcp(25, syn)}, admitted},
		row{"exempt, as metadata", packet{src: metadata, dst: "198.51.100.9", payload: tcp(25, syn)}, blocked},
		row{"exempt, malformed", packet{dst: "198.51.100.9", payload: tcp(25, syn).cut(19)}, malformed})
}
