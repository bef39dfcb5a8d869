package iptables

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// pass is what one table does with the packets of containers.
type pass struct {
	steps []step

	// near are the steps that can match a packet to addr, the last address asked for,
	// and next says for each of them where a skip continues. They are a cache: no
	// answer depends on earlier questions.
	addr netip.Addr
	near []int
	next []int
}

// at sets near and next for an address.
func (p *pass) at(addr netip.Addr) {
	if p.addr == addr {
		return
	}
	p.addr, p.near, p.next = addr, p.near[:0], p.next[:0]
	for i := range p.steps {
		s := &p.steps[i]
		if s.act != none && s.possible(addr) {
			p.near = append(p.near, i)
		}
	}
	for _, i := range p.near {
		n, _ := slices.BinarySearch(p.near, p.steps[i].end)
		p.next = append(p.next, n)
	}
}

// packet is a packet that a container sends.
type packet struct {
	dst   netip.Addr
	proto uint8
	port  uint16 // 0 for protocols without ports
	old   bool   // of an existing connection
}

func (p packet) String() string {
	s := p.dst.String()
	if p.port != 0 {
		s = netip.AddrPortFrom(p.dst, p.port).String()
	}
	return s + "/" + protocolName(p.proto)
}

func protocolName(n uint8) string {
	for _, name := range []string{"tcp", "udp", "icmp", "icmpv6", "sctp", "udplite", "dccp", "gre", "esp", "ah"} {
		if protocols[name] == n {
			return name
		}
	}
	return fmt.Sprint(n)
}

func hasPorts(proto uint8) bool {
	return slices.Contains([]uint8{6, 17, 136, 132, 33}, proto)
}

// verdict is what happens to packets. Several verdicts are possible at once if the answer
// depends on something unknown.
type verdict uint8

const (
	passes verdict = 1 << iota
	limited
	dropped
)

// judge returns the verdict on a packet. buf has room for one verdict for each step, and
// one more.
func (p *pass) judge(pk packet, w world, buf []verdict) verdict {
	p.at(pk.dst)
	n := len(p.near)
	buf[n] = passes
	for i := n - 1; i >= 0; i-- {
		s := &p.steps[p.near[i]]
		next := buf[i+1]
		buf[i] = next
		if !s.applies(pk, w) {
			continue
		}
		then := dropped
		if s.act == skip {
			then = buf[p.next[i]]
		}
		within, over := then, then
		if l := s.limit; l != nil {
			if l.over {
				within = next
			} else {
				over = next
			}
		}
		switch {
		case within == over:
			buf[i] = within
		case within == dropped: // a limit used the wrong way round
			buf[i] = dropped
		default:
			buf[i] = limited
		}
	}
	return buf[0]
}

// decides returns the step that drops a packet that is over every limit, or within every
// limit; nil if there is none.
func (p *pass) decides(pk packet, w world, over bool) *step {
	p.at(pk.dst)
	for i := 0; i < len(p.near); {
		s := &p.steps[p.near[i]]
		end := p.next[i]
		i++
		if !s.applies(pk, w) {
			continue
		}
		if l := s.limit; l != nil && l.over != over {
			continue
		}
		if s.act == drop {
			return s
		}
		i = end
	}
	return nil
}

// family is everything that judges packets of IPv4, or of IPv6.
type family struct {
	v6      bool
	passes  []*pass
	worlds  []world
	partial bool // worlds does not have all combinations
	spectrum
	buf []verdict // for judge
}

func (f *family) judgeIn(pk packet, w world) verdict {
	v := passes
	for _, p := range f.passes {
		if len(f.buf) <= len(p.steps) {
			f.buf = make([]verdict, len(p.steps)+1)
		}
		v = max(v, p.judge(pk, w, f.buf))
	}
	return v
}

// judge returns the possible verdicts on a packet.
func (f *family) judge(pk packet) (possible verdict) {
	for _, w := range f.worlds {
		possible |= f.judgeIn(pk, w)
	}
	return possible
}

// deciders returns the steps that may drop a packet that is over every limit, or within
// every limit.
func (f *family) deciders(pk packet, over bool) (steps []*step) {
	for _, w := range f.worlds {
		for _, p := range f.passes {
			if s := p.decides(pk, w, over); s != nil && !slices.Contains(steps, s) {
				steps = append(steps, s)
			}
		}
	}
	return steps
}

// droppers returns all steps that may drop a packet.
func (f *family) droppers(pk packet) []*step {
	return append(f.deciders(pk, true), f.deciders(pk, false)...)
}

// reaches reports whether a packet may reach a step, within or over the limits before it.
func (f *family) reaches(pk packet, to *step) bool {
	for _, w := range f.worlds {
		for _, p := range f.passes {
			at := make([]bool, len(p.steps)+1)
			at[0] = true
			for i := range p.steps {
				s := &p.steps[i]
				if !at[i] {
					continue
				}
				applies := s.applies(pk, w)
				if s == to && applies {
					return true
				}
				if s.act == none || !applies || s.limit != nil {
					at[i+1] = true
				}
				if s.act == skip && applies {
					at[s.end] = true
				}
			}
		}
	}
	return false
}

// within calls do with a packet of every kind in an entry, until do returns false.
func (f *family) within(e policy.Rule, do func(packet) bool) {
	from, _ := slices.BinarySearchFunc(f.addrs, e.Prefix.Addr(), netip.Addr.Compare)
	addrs := []netip.Addr{e.Prefix.Addr(), last(e.Prefix)}
	for _, a := range f.addrs[from:] {
		if !e.Prefix.Contains(a) {
			break
		}
		addrs = append(addrs, a)
	}
	protos, ports := f.protos, f.ports
	if e.Proto != 0 {
		protos = []uint8{e.Proto}
	}
	if e.Port != 0 {
		ports = []uint16{e.Port}
	}
	for _, a := range addrs {
		for _, proto := range protos {
			if !hasPorts(proto) {
				if e.Port == 0 && !do(packet{dst: a, proto: proto}) {
					return
				}
				continue
			}
			for _, port := range ports {
				if !do(packet{dst: a, proto: proto, port: port}) {
					return
				}
			}
		}
	}
}

// verdicts returns the possible verdicts on the packets in an entry.
func (f *family) verdicts(e policy.Rule) (v verdict) {
	f.within(e, func(p packet) bool {
		v |= f.judge(p)
		return v != passes|limited|dropped
	})
	return v
}

// mailPacket returns a packet that opens a mail connection to an address that no rule
// names.
func (f *family) mailPacket(port uint16) packet { return packet{dst: f.other, proto: tcp, port: port} }

// limits reports whether the rules of the family limit or stop mail to any of the ports.
func (f *family) limits(ports []uint16) bool {
	return slices.ContainsFunc(ports, func(port uint16) bool { return f.judge(f.mailPacket(port)) != passes })
}

// every yields the steps of the families in order.
func every(families []*family) iter.Seq2[*family, *step] {
	return func(yield func(*family, *step) bool) {
		for _, f := range families {
			for s := range stepsOf(f.passes) {
				if !yield(f, s) {
					return
				}
			}
		}
	}
}

func stepsOf(passes []*pass) iter.Seq[*step] {
	return func(yield func(*step) bool) {
		for _, p := range passes {
			for i := range p.steps {
				if !yield(&p.steps[i]) {
					return
				}
			}
		}
	}
}
