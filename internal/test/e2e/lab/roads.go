package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Link is a device, the sender and the next hop.
type Link struct {
	Device          string
	Source, Gateway net.HardwareAddr
}

// Frame returns an Ethernet frame with an IP packet. Each tag is the type of a VLAN tag
// (0x8100, 0x88a8), the outermost first. All tags have VLAN 0, which means no VLAN.
func (l Link) Frame(packet []byte, tags ...uint16) []byte {
	frame := slices.Concat(l.Gateway, l.Source)
	for _, tag := range tags {
		frame = append(binary.BigEndian.AppendUint16(frame, tag), 0, 0)
	}
	return append(binary.BigEndian.AppendUint16(frame, EtherType(packet)), packet...)
}

// EtherType returns the EtherType of an IP packet.
func EtherType(packet []byte) uint16 {
	if packet[0]>>4 == 4 {
		return unix.ETH_P_IP
	}
	return unix.ETH_P_IPV6
}

// Send sends IP packets by a road: by other means than IP sockets. The error wraps the
// errno of the call that failed.
func (a *Agent) Send(road string, l Link, packets ...[]byte) error {
	a.t.Helper()
	var r Sent
	a.call("Send", Sending{Road: road, Link: l, Packets: packets}, &r)
	return r.err()
}

// SendUDP sends datagrams from an ordinary socket.
func (a *Agent) SendUDP(to netip.AddrPort, payloads ...[]byte) error {
	a.t.Helper()
	return a.SendUDPFrom(0, nil, to, payloads...)
}

// SendUDPFrom sends datagrams from a port, with options set on the socket. Port 0 means any
// port.
func (a *Agent) SendUDPFrom(port uint16, options []Option, to netip.AddrPort, payloads ...[]byte) error {
	a.t.Helper()
	var r Sent
	a.call("SendUDP", Sending{From: port, Options: options, To: to, Packets: payloads}, &r)
	return r.err()
}

// SendSegments sends datagrams at once: the kernel handles them as one packet for as long
// as it can. All but the last are padded to the length of the longest.
func (a *Agent) SendSegments(options []Option, to netip.AddrPort, payloads ...[]byte) error {
	a.t.Helper()
	size := 0
	for _, payload := range payloads {
		size = max(size, len(payload))
	}
	var all []byte
	for _, payload := range payloads {
		all = append(all, make([]byte, (size-len(all)%size)%size)...)
		all = append(all, payload...)
	}
	options = append([]Option{{unix.SOL_UDP, unix.UDP_SEGMENT, binary.NativeEndian.AppendUint32(nil, uint32(size))}}, options...)
	return a.SendUDPFrom(0, options, to, all)
}

// Finished is Packet with all checksums, which nobody fills in on a road. It is for TCP,
// UDP and ICMP.
func (h Header) Finished(payload []byte) []byte {
	packet := h.Packet(payload)
	size := len(packet) - len(payload)
	if h.Dst.Is4() {
		binary.BigEndian.PutUint16(packet[10:], ^sum(packet[:size], 0))
	}
	at, ok := map[uint8]int{
		unix.IPPROTO_TCP: 16, unix.IPPROTO_UDP: 6, unix.IPPROTO_ICMP: 2, unix.IPPROTO_ICMPV6: 2,
	}[h.Proto]
	if !ok || h.More || h.Offset > 0 || len(payload) < at+2 {
		return packet
	}
	var pseudo uint32
	if h.Proto != unix.IPPROTO_ICMP {
		pseudo = uint32(sum(slices.Concat(h.Src.AsSlice(), h.Dst.AsSlice()), uint32(h.Proto)+uint32(len(payload))))
	}
	binary.BigEndian.PutUint16(packet[size+at:], 0)
	binary.BigEndian.PutUint16(packet[size+at:], ^sum(packet[size:], pseudo))
	return packet
}

// Datagram returns a UDP datagram with its checksum, for the header.
func (h Header) Datagram(sport, dport uint16, payload []byte) []byte {
	datagram := UDP(sport, dport, len(payload))
	copy(datagram[8:], payload)
	packet := Header{Src: h.Src, Dst: h.Dst, Proto: unix.IPPROTO_UDP}.Finished(datagram)
	return packet[len(packet)-len(datagram):]
}

// sum is the ones' complement sum of RFC 1071.
func sum(b []byte, s uint32) uint16 {
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) > 0 {
		s += uint32(b[0]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// The rest runs in the agent.

// Sending is the argument of Remote.Send.
type Sending struct {
	Road    string
	Link    Link
	From    uint16
	Options []Option
	To      netip.AddrPort
	Packets [][]byte
}

// Option is a socket option, as in setsockopt(2).
type Option struct {
	Level, Name int
	Value       []byte
}

// Sent is the result of Send.
type Sent struct {
	Errno  syscall.Errno
	Failed string // what had the errno
}

// Send is Agent.Send.
func (*Remote) Send(s Sending, r *Sent) error {
	send, ok := roads()[s.Road]
	if !ok {
		return fmt.Errorf("no road %q", s.Road)
	}
	*r = sent(send(s.Link, s.Packets))
	return nil
}

// SendUDP is Agent.SendUDP.
func (*Remote) SendUDP(s Sending, r *Sent) error {
	family := Family(s.To.Addr())
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		*r = sent(fmt.Errorf("socket: %w", err))
		return nil
	}
	defer unix.Close(fd)
	if s.From != 0 {
		if err := unix.Bind(fd, sockaddr(family, netip.AddrPortFrom(unspecified(family), s.From))); err != nil {
			*r = sent(fmt.Errorf("bind: %w", err))
			return nil
		}
	}
	for _, o := range s.Options {
		if err := unix.SetsockoptString(fd, o.Level, o.Name, string(o.Value)); err != nil {
			*r = sent(fmt.Errorf("setsockopt(%d, %d): %w", o.Level, o.Name, err))
			return nil
		}
	}
	for _, payload := range s.Packets {
		if err := unix.Sendto(fd, payload, 0, sockaddr(family, s.To)); err != nil {
			*r = sent(fmt.Errorf("sendto: %w", err))
		}
	}
	return nil
}

func unspecified(family int) netip.Addr {
	if family == unix.AF_INET {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func sent(err error) Sent {
	if err == nil {
		return Sent{}
	}
	return Sent{errno(err), err.Error()}
}

func (s Sent) err() error {
	if s.Errno == 0 {
		return nil
	}
	return fmt.Errorf("%s%w", strings.TrimSuffix(s.Failed, s.Errno.Error()), s.Errno)
}

// Command runs a command with a text on its stdin and returns its output.
func (a *Agent) Command(stdin string, args ...string) (output string, err error) {
	a.t.Helper()
	var r Ran
	a.call("Command", Script{stdin, args}, &r)
	if r.Failed != "" {
		return r.Output, errors.New(r.Failed)
	}
	return r.Output, nil
}

// Script is a command and its stdin.
type Script struct {
	Stdin string
	Args  []string
}

// Ran is the output of a command, and how it failed.
type Ran struct{ Output, Failed string }

// Command is Agent.Command.
func (*Remote) Command(s Script, r *Ran) error {
	cmd := exec.Command(s.Args[0], s.Args[1:]...)
	cmd.Stdin = strings.NewReader(s.Stdin)
	output, err := cmd.CombinedOutput()
	r.Output = string(output)
	if err != nil {
		r.Failed = fmt.Sprintf("%v: %s", err, output)
	}
	return nil
}

// roads holds, by name, the functions that send packets on a link.
func roads() map[string]func(Link, [][]byte) error {
	raw := func() (int, error) { return unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) }
	dgram := func() (int, error) { return unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) }
	tagged := func(tags ...uint16) func(Link, [][]byte) error {
		return packetRoad(raw, 0, func(l Link, packet []byte) []byte { return l.Frame(packet, tags...) })
	}
	const q, ad = unix.ETH_P_8021Q, unix.ETH_P_8021AD
	return map[string]func(Link, [][]byte) error{
		"AF_PACKET":              tagged(),
		"AF_PACKET SOCK_DGRAM":   packetRoad(dgram, 0, func(_ Link, packet []byte) []byte { return packet }),
		"AF_PACKET QDISC_BYPASS": packetRoad(raw, unix.PACKET_QDISC_BYPASS, untagged),
		"AF_PACKET VNET_HDR":     packetRoad(raw, unix.PACKET_VNET_HDR, withVnetHeader),
		"AF_PACKET padded": packetRoad(raw, 0, func(l Link, packet []byte) []byte {
			return append(l.Frame(packet), make([]byte, 64)...)
		}),
		"AF_PACKET TSO":     packetRoad(raw, unix.PACKET_VNET_HDR, toBeSegmented),
		"AF_PACKET TX_RING": txRing,
		"SOCK_PACKET":       sockPacket,
		"socketcall":        packetRoad(socketcall, 0, untagged),
		"io_uring":          ioUring,
		"AF_XDP":            xdp,
		"VLAN tag":          tagged(q),
		"two VLAN tags":     tagged(q, q),
		"three VLAN tags":   tagged(q, q, q),
		"802.1ad":           tagged(ad),
		"802.1ad over VLAN": tagged(ad, q),
		"two of 802.1ad":    tagged(ad, ad, q),
		"raw IP":            func(_ Link, packets [][]byte) error { return rawIP(packets, nil) },
		"raw IP SO_BINDTODEVICE": func(l Link, packets [][]byte) error {
			return rawIP(packets, func(fd int) error { return unix.BindToDevice(fd, l.Device) })
		},
		"raw IP SO_MARK": func(_ Link, packets [][]byte) error {
			return rawIP(packets, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 1) })
		},
		"tun":               tun,
		"AF_RDS":            rds,
		"multicast routing": routed,
	}
}

func untagged(l Link, packet []byte) []byte { return l.Frame(packet) }

func withVnetHeader(l Link, packet []byte) []byte {
	return append(make([]byte, 10), l.Frame(packet)...) // struct virtio_net_hdr
}

// TSOSegment is the size of the segments into which the TSO road splits a packet.
const TSOSegment = 20

// toBeSegmented makes the kernel split a TCP packet with data into many.
func toBeSegmented(l Link, packet []byte) []byte {
	const needsChecksum, tcp4, tcp6 = 1, 1, 4 // include/uapi/linux/virtio_net.h
	kind, ip, addresses := byte(tcp4), int(packet[0]&15)*4, packet[12:20]
	if EtherType(packet) == unix.ETH_P_IPV6 {
		kind, ip, addresses = tcp6, 40, packet[8:40]
	}
	// The segmentation fills in the rest.
	pseudo := sum(addresses, uint32(unix.IPPROTO_TCP)+uint32(len(packet)-ip))
	binary.BigEndian.PutUint16(packet[ip+16:], pseudo)
	frame := l.Frame(packet)
	start := len(frame) - len(packet) + ip
	header := []byte{needsChecksum, kind}
	for _, field := range []int{start + int(packet[ip+12]>>4)*4, TSOSegment, start, 16} {
		header = binary.NativeEndian.AppendUint16(header, uint16(field))
	}
	return append(header, frame...)
}

func (l Link) index() (int, error) {
	device, err := net.InterfaceByName(l.Device)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", l.Device, unix.ENODEV)
	}
	return device.Index, nil
}

func bigEndian(port uint16) uint16 { return port>>8 | port<<8 }

// packetRoad sends frames on a packet socket on which an option is set.
func packetRoad(socket func() (int, error), option int, frame func(Link, []byte) []byte) func(Link, [][]byte) error {
	return func(l Link, packets [][]byte) error {
		index, err := l.index()
		if err != nil {
			return err
		}
		fd, err := socket()
		if err != nil {
			return fmt.Errorf("socket: %w", err)
		}
		defer unix.Close(fd)
		if option != 0 {
			if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, option, 1); err != nil {
				return fmt.Errorf("setsockopt: %w", err)
			}
		}
		to := &unix.SockaddrLinklayer{Ifindex: index, Halen: 6}
		copy(to.Addr[:], l.Gateway)
		for _, packet := range packets {
			to.Protocol = bigEndian(EtherType(packet))
			if err := unix.Sendto(fd, frame(l, packet), 0, to); err != nil {
				return fmt.Errorf("sendto: %w", err)
			}
		}
		return nil
	}
}

// txRing sends from a ring that is shared with the kernel.
func txRing(l Link, packets [][]byte) error {
	index, err := l.index()
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	const frameSize, frames, header = 2048, 2, 32 // struct tpacket2_hdr
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V2); err != nil {
		return fmt.Errorf("PACKET_VERSION: %w", err)
	}
	req := unix.TpacketReq{Block_size: frameSize * frames, Block_nr: 1, Frame_size: frameSize, Frame_nr: frames}
	if err := unix.SetsockoptTpacketReq(fd, unix.SOL_PACKET, unix.PACKET_TX_RING, &req); err != nil {
		return fmt.Errorf("PACKET_TX_RING: %w", err)
	}
	ring, err := unix.Mmap(fd, 0, frameSize*frames, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() { _ = unix.Munmap(ring) }()
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_IP), Ifindex: index}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	for i, packet := range packets {
		slot := ring[i%frames*frameSize:]
		n := copy(slot[header:], l.Frame(packet))
		binary.NativeEndian.PutUint32(slot[4:], uint32(n))
		binary.NativeEndian.PutUint32(slot, unix.TP_STATUS_SEND_REQUEST)
		// Without MSG_DONTWAIT it returns when all is sent.
		if _, _, e := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), 0, 0, 0, 0, 0); e != 0 {
			return fmt.Errorf("send: %w", e)
		}
	}
	return nil
}

// sockPacket sends on a packet socket of the family AF_INET (SOCK_PACKET).
func sockPacket(l Link, packets [][]byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_PACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	for _, packet := range packets {
		var to [18]byte // struct sockaddr_pkt
		binary.NativeEndian.PutUint16(to[:], unix.AF_INET)
		copy(to[2:15], l.Device)
		binary.BigEndian.PutUint16(to[16:], EtherType(packet))
		if err := sendto(fd, l.Frame(packet), to[:]); err != nil {
			return err
		}
	}
	return nil
}

// sendto sends to an address that x/sys/unix does not know.
func sendto(fd int, b, to []byte) error {
	_, _, e := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0,
		uintptr(unsafe.Pointer(&to[0])), uintptr(len(to)))
	if e != 0 {
		return fmt.Errorf("sendto: %w", e)
	}
	return nil
}

// socketcall makes a packet socket with the system call of 32-bit programs.
func socketcall() (fd int, err error) {
	const nr, socket = 102, 1 // arch/x86/entry/syscalls/syscall_32.tbl, include/uapi/linux/net.h
	// Some virtual machines have no such entry, whatever the kernel's configuration is: they end a
	// program that tries.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if recover() != nil {
			fd, err = -1, unix.ENOSYS
		}
	}()
	low, err := unix.MmapPtr(-1, 0, nil, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|map32Bit)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.MunmapPtr(low, 4096) }()
	*(*[3]uint32)(low) = [3]uint32{unix.AF_PACKET, unix.SOCK_RAW, 0}
	fd = int(int32(int80(nr, socket, uint32(uintptr(low)))))
	if fd < 0 {
		return -1, syscall.Errno(-fd)
	}
	return fd, nil
}

// rawIP sends on a raw IP socket.
func rawIP(packets [][]byte, prepare func(fd int) error) error {
	for _, packet := range packets {
		family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: [4]byte(packet[16:20])})
		if EtherType(packet) == unix.ETH_P_IPV6 {
			family, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: [16]byte(packet[24:40])}
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return fmt.Errorf("socket: %w", err)
		}
		if prepare != nil {
			err = prepare(fd)
		}
		if err == nil {
			err = unix.Sendto(fd, packet, 0, to)
		}
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	return nil
}

// routed makes this network namespace a multicast router, and sends each IPv4 packet in such a way that the kernel
// routes a copy of it, which belongs to no socket. The copy goes where the header says, whatever the address of
// the call is.
func routed(l Link, packets [][]byte) error {
	// include/uapi/linux/mroute.h
	const (
		mrtInit, mrtAddVIF, mrtAddMFC = 200, 202, 204
		useIndex                      = 8
	)
	router, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_IGMP)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(router)
	set := func(option int, value []byte) error {
		return unix.SetsockoptString(router, unix.IPPROTO_IP, option, string(value))
	}
	if err := set(mrtInit, binary.NativeEndian.AppendUint32(nil, 1)); err != nil {
		return fmt.Errorf("MRT_INIT: %w", err)
	}
	lo, err := Link{Device: "lo"}.index()
	if err != nil {
		return err
	}
	out, err := l.index()
	if err != nil {
		return err
	}
	for vif, device := range []int{lo, out} {
		control := make([]byte, 16) // struct vifctl
		binary.NativeEndian.PutUint16(control, uint16(vif))
		control[2], control[3] = useIndex, 1
		binary.NativeEndian.PutUint32(control[8:], uint32(device))
		if err := set(mrtAddVIF, control); err != nil {
			return fmt.Errorf("MRT_ADD_VIF: %w", err)
		}
	}
	control := make([]byte, 60) // struct mfcctl: from anywhere to anywhere, by the second device
	binary.NativeEndian.PutUint16(control[8:], 1)
	control[10], control[11] = 1, 1
	if err := set(mrtAddMFC, control); err != nil {
		return fmt.Errorf("MRT_ADD_MFC: %w", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_MULTICAST_IF, &unix.IPMreqn{Ifindex: int32(lo)}); err != nil {
		return fmt.Errorf("IP_MULTICAST_IF: %w", err)
	}
	for _, packet := range packets {
		// The packet itself may be refused; its copy has been made then.
		err := unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: [4]byte{239, 1, 1, 1}})
		if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ECONNREFUSED) {
			return fmt.Errorf("send: %w", err)
		}
	}
	return nil
}

// xdp sends from memory that is shared with the device, in copy mode, which needs
// no driver's help.
func xdp(l Link, packets [][]byte) error {
	index, err := l.index()
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	const chunk, entries = 4096, 4
	area, err := unix.Mmap(-1, 0, chunk*entries, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() { _ = unix.Munmap(area) }()
	var reg [32]byte // struct xdp_umem_reg
	binary.NativeEndian.PutUint64(reg[0:], uint64(uintptr(unsafe.Pointer(&area[0]))))
	binary.NativeEndian.PutUint64(reg[8:], uint64(len(area)))
	binary.NativeEndian.PutUint32(reg[16:], chunk)
	if err := unix.SetsockoptString(fd, unix.SOL_XDP, unix.XDP_UMEM_REG, string(reg[:])); err != nil {
		return fmt.Errorf("XDP_UMEM_REG: %w", err)
	}
	for _, ring := range []int{unix.XDP_UMEM_FILL_RING, unix.XDP_UMEM_COMPLETION_RING, unix.XDP_TX_RING} {
		if err := unix.SetsockoptInt(fd, unix.SOL_XDP, ring, entries); err != nil {
			return fmt.Errorf("ring %d: %w", ring, err)
		}
	}
	var offsets unix.XDPMmapOffsets
	size := uint32(unsafe.Sizeof(offsets))
	if _, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_XDP, unix.XDP_MMAP_OFFSETS,
		uintptr(unsafe.Pointer(&offsets)), uintptr(unsafe.Pointer(&size)), 0); e != 0 {
		return fmt.Errorf("XDP_MMAP_OFFSETS: %w", e)
	}
	mapRing := func(at int64, n int) ([]byte, error) {
		return unix.Mmap(fd, at, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	}
	tx, err := mapRing(unix.XDP_PGOFF_TX_RING, int(offsets.Tx.Desc)+entries*16)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() { _ = unix.Munmap(tx) }()
	done, err := mapRing(unix.XDP_UMEM_PGOFF_COMPLETION_RING, int(offsets.Cr.Desc)+entries*8)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() { _ = unix.Munmap(done) }()
	// A socket that was closed keeps the queue until the kernel has time.
	bound := eventually(func() bool {
		err = unix.Bind(fd, &unix.SockaddrXDP{Flags: unix.XDP_COPY, Ifindex: uint32(index)})
		return err != unix.EBUSY
	})
	if !bound || err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	for i, packet := range packets {
		n := copy(area, l.Frame(packet))
		desc := tx[int(offsets.Tx.Desc)+i%entries*16:]
		binary.NativeEndian.PutUint64(desc, 0)
		binary.NativeEndian.PutUint32(desc[8:], uint32(n))
		binary.NativeEndian.PutUint32(tx[offsets.Tx.Producer:], uint32(i+1))
		if _, _, e := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), 0, 0, unix.MSG_DONTWAIT, 0, 0); e != 0 {
			return fmt.Errorf("sendto: %w", e)
		}
		// The device is done with the frame when it is freed, at the receiver.
		if !eventually(func() bool { return binary.NativeEndian.Uint32(done[offsets.Cr.Producer:]) == uint32(i+1) }) {
			return fmt.Errorf("completion: %w", unix.ETIMEDOUT)
		}
		binary.NativeEndian.PutUint32(done[offsets.Cr.Consumer:], uint32(i+1))
	}
	return nil
}

// eventually waits for a condition that no file descriptor announces.
func eventually(ok func() bool) bool {
	for deadline := time.Now().Add(answerPatience); !ok(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// ioUring makes a packet socket and sends on it. Of the system calls for sockets it uses
// only bind.
func ioUring(l Link, packets [][]byte) error {
	index, err := l.index()
	if err != nil {
		return err
	}
	const opSend, opSocket = 26, 45 // include/uapi/linux/io_uring.h
	var params [30]uint32           // struct io_uring_params
	ring, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&params)), 0)
	if e != 0 {
		return fmt.Errorf("io_uring_setup: %w", e)
	}
	defer unix.Close(int(ring))
	sq, cq := params[10:20], params[20:30] // struct io_sqring_offsets, io_cqring_offsets
	const offSQEs = 0x10000000
	rings, err := unix.Mmap(int(ring), 0, int(max(sq[6]+params[0]*4, cq[5]+params[1]*16)),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() { _ = unix.Munmap(rings) }()
	sqes, err := unix.Mmap(int(ring), offSQEs, int(params[0])*64, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() { _ = unix.Munmap(sqes) }()
	u32 := func(at uint32) *uint32 { return (*uint32)(unsafe.Pointer(&rings[at])) }
	submit := func(op uint8, fd int32, off, addr uint64, length uint32) (int32, error) {
		tail := *u32(sq[1])
		slot := tail & *u32(sq[2])
		sqe := sqes[slot*64 : (slot+1)*64]
		clear(sqe)
		sqe[0] = op
		binary.NativeEndian.PutUint32(sqe[4:], uint32(fd))
		binary.NativeEndian.PutUint64(sqe[8:], off)
		binary.NativeEndian.PutUint64(sqe[16:], addr)
		binary.NativeEndian.PutUint32(sqe[24:], length)
		*u32(sq[6] + slot*4) = slot
		*u32(sq[1]) = tail + 1
		const getEvents = 1
		if _, _, e := unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, 1, 1, getEvents, 0, 0); e != 0 {
			return 0, fmt.Errorf("io_uring_enter: %w", e)
		}
		head := *u32(cq[0])
		result := int32(*u32(cq[5] + head&*u32(cq[2])*16 + 8))
		*u32(cq[0]) = head + 1
		if result < 0 {
			return 0, fmt.Errorf("operation %d: %w", op, syscall.Errno(-result))
		}
		return result, nil
	}
	fd, err := submit(opSocket, unix.AF_PACKET, unix.SOCK_RAW, 0, 0)
	if err != nil {
		return err
	}
	defer unix.Close(int(fd))
	if err := unix.Bind(int(fd), &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_IP), Ifindex: index}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	// Not on the stack, which moves.
	buffer, err := unix.Mmap(-1, 0, 1<<16, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() { _ = unix.Munmap(buffer) }()
	for _, packet := range packets {
		n := copy(buffer, l.Frame(packet))
		if _, err := submit(opSend, fd, 0, uint64(uintptr(unsafe.Pointer(&buffer[0]))), uint32(n)); err != nil {
			return err
		}
	}
	return nil
}

// tun sends packets that the kernel takes for received packets, and forwards.
func tun(l Link, packets [][]byte) error {
	file, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	req, err := unix.NewIfreq(l.Device)
	if err != nil {
		return err
	}
	// A blocking descriptor, as TUNSETIFF comes too late for the poller.
	fd := int(file.Fd())
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(s)
	req.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("SIOCSIFFLAGS: %w", err)
	}
	for _, packet := range packets {
		if _, err := unix.Write(fd, packet); err != nil {
			return fmt.Errorf("write: %w", err)
		}
	}
	return nil
}

// rds makes the kernel connect, when the kernel gets to it (net/rds/tcp_connect.c). Only
// the addresses of a packet matter.
func rds(_ Link, packets [][]byte) error {
	const family, port = 21, 16385
	fd, err := unix.Socket(family, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	for i, packet := range packets {
		to := [4]byte(packet[16:20])
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: 4000 + i, Addr: [4]byte(packet[12:16])}); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		if err := unix.Sendto(fd, []byte("hello"), unix.MSG_DONTWAIT, &unix.SockaddrInet4{Port: 4000, Addr: to}); err != nil {
			return fmt.Errorf("sendto: %w", err)
		}
		connecting := fmt.Sprintf(" %08X:%04X ", binary.NativeEndian.Uint32(to[:]), port)
		if !eventually(func() bool {
			table, err := os.ReadFile("/proc/net/tcp")
			return err == nil && strings.Contains(string(table), connecting)
		}) {
			return fmt.Errorf("connect: %w", unix.ETIMEDOUT)
		}
	}
	return nil
}
