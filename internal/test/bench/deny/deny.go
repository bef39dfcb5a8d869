// Package deny makes the program that systemd attaches for IPAddressDeny=, to compare with:
// it looks up the destination of each packet in a trie, and counts packets and bytes.
package deny

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Program is loaded and not attached.
type Program struct {
	*ebpf.Program
	maps []*ebpf.Map
}

// Close closes the program and its maps. The kernel keeps them while it is attached.
func (p *Program) Close() error {
	var errs []error
	if p.Program != nil {
		errs = append(errs, p.Program.Close())
	}
	for _, m := range p.maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// New loads a program for egress that denies so many prefixes of each family. The first is
// the metadata service.
func New(prefixes int) (_ *Program, err error) {
	p := new(Program)
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	four, err := p.trie(4, append([]netip.Addr{netip.MustParseAddr("169.254.169.254")}, Spread4(prefixes-1)...))
	if err != nil {
		return nil, err
	}
	six, err := p.trie(16, append([]netip.Addr{netip.MustParseAddr("fd00:ec2::254")}, Spread6(prefixes-1)...))
	if err != nil {
		return nil, err
	}
	counters, err := p.add(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 2})
	if err != nil {
		return nil, err
	}
	p.Program, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.CGroupSKB,
		AttachType:   ebpf.AttachCGroupInetEgress,
		Instructions: instructions(four, six, counters),
		License:      "Dual BSD/GPL",
	})
	return p, err
}

func (p *Program) add(spec *ebpf.MapSpec) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(spec)
	if err == nil {
		p.maps = append(p.maps, m)
	}
	return m, err
}

// trie makes a map of addresses.
func (p *Program) trie(size uint32, addrs []netip.Addr) (*ebpf.Map, error) {
	m, err := p.add(&ebpf.MapSpec{
		Type: ebpf.LPMTrie, KeySize: 4 + size, ValueSize: 8, MaxEntries: uint32(len(addrs)), Flags: unix.BPF_F_NO_PREALLOC,
	})
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		key := binary.NativeEndian.AppendUint32(nil, 8*size)
		if err := m.Put(append(key, a.AsSlice()...), uint64(1)); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// golden spreads consecutive numbers evenly (Knuth, The Art of Computer Programming, 6.4).
const golden = 2654435761

// Spread4 returns n addresses that are spread over the internet, as those of lists of malicious
// hosts are. None is in 198.51.0.0/16, where the benchmarks send to.
func Spread4(n int) (all []netip.Addr) {
	for i := uint32(1); len(all) < n; i++ {
		v := 1<<24 + (i*golden)%(222<<24)
		if v>>16 != 198<<8|51 {
			all = append(all, netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, v))))
		}
	}
	return all
}

// Spread6 returns n addresses in 2000::/3. None is in 2620::/16 or 2001::/16, where the
// benchmarks send to.
func Spread6(n int) (all []netip.Addr) {
	for i := uint32(1); len(all) < n; i++ {
		v := 1<<29 + (i*golden)>>3
		if v>>16 == 0x2620 || v>>16 == 0x2001 {
			continue
		}
		b := binary.BigEndian.AppendUint32(nil, v)
		all = append(all, netip.AddrFrom16([16]byte(append(b, make([]byte, 12)...))))
	}
	return all
}

// Offsets in struct __sk_buff, and on the stack.
const (
	skbLen, skbProtocol  = 0, 16
	counterKey, trieKey  = -4, -32
	destination4, addr4  = 16, 4
	destination6, addr6  = 24, 16
	packetsKey, bytesKey = 0, 1
)

func instructions(four, six, counters *ebpf.Map) asm.Instructions {
	ins := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R7, asm.R6, skbProtocol, asm.Word),
		asm.Mov.Imm(asm.R8, 1), // pass
		asm.JNE.Imm(asm.R7, networkOrder(unix.ETH_P_IP), "not4"),
	}
	ins = append(ins, lookUp(four, destination4, addr4)...)
	ins = append(ins, asm.JNE.Imm(asm.R7, networkOrder(unix.ETH_P_IPV6), "account").WithSymbol("not4"))
	ins = append(ins, lookUp(six, destination6, addr6)...)
	ins = append(ins, count(counters, packetsKey, "account", "bytes", asm.Mov.Imm(asm.R1, 1))...)
	ins = append(ins, count(counters, bytesKey, "bytes", "end", asm.LoadMem(asm.R1, asm.R6, skbLen, asm.Word))...)
	return append(ins, asm.Mov.Reg(asm.R0, asm.R8).WithSymbol("end"), asm.Return())
}

func networkOrder(v uint16) int32 {
	return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)))
}

// lookUp looks up an address of the packet, and denies the packet if it is found.
func lookUp(m *ebpf.Map, at, size int32) asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.RFP, trieKey, int64(8*size), asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, at),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, trieKey+4),
		asm.Mov.Imm(asm.R4, size),
		asm.FnSkbLoadBytes.Call(),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, trieKey),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "account"),
		asm.Mov.Imm(asm.R8, 0),
		asm.Ja.Label("account"),
	}
}

// count adds what value loads into R1 to a counter.
func count(m *ebpf.Map, key int64, symbol, next string, value asm.Instruction) asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.RFP, counterKey, key, asm.Word).WithSymbol(symbol),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, counterKey),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, next),
		value,
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
	}
}
