package maps

import (
	"errors"
	"fmt"
	"math/bits"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
)

// Devices returns the indexes of the network devices that have a bucket.
func (s *State) Devices() (indexes []uint32, err error) {
	m := s.byName[bpf.EgressMapDevices]
	if m == nil {
		return nil, nil
	}
	var (
		index uint32
		d     bpf.EgressDevice
	)
	all := m.Iterate()
	for all.Next(&index, &d) {
		indexes = append(indexes, index)
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("read map %s: %w", bpf.EgressMapDevices, err)
	}
	return indexes, nil
}

// ForgetDevice removes the bucket of a network device.
func (s *State) ForgetDevice(index uint32) error {
	m := s.byName[bpf.EgressMapDevices]
	if m == nil {
		return nil
	}
	if err := m.Delete(index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("write map %s: %w", bpf.EgressMapDevices, err)
	}
	return nil
}

// Tunnels returns the UDP ports that are closed to containers. The value is true if a
// socket of the host unpacks packets there, and false if one may do so later.
func (s *State) Tunnels() (map[uint16]bool, error) {
	closed := map[uint16]bool{}
	var (
		port  uint16 // in network byte order
		found uint8
	)
	m := s.byName[bpf.EgressMapTunnels]
	if m == nil {
		return closed, nil
	}
	all := m.Iterate()
	for all.Next(&port, &found) {
		closed[bits.ReverseBytes16(port)] = found != 0
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("read map %s: %w", bpf.EgressMapTunnels, err)
	}
	return closed, nil
}

// MaxTunnels is how many ports can be closed: max_entries of map tunnels (bpf/maps.h).
const MaxTunnels = 4096

// SetTunnels closes these ports to containers, with values as Tunnels returns them, and
// opens all others. There can be at most MaxTunnels.
func (s *State) SetTunnels(ports map[uint16]bool) error {
	m := s.byName[bpf.EgressMapTunnels]
	if m == nil {
		return nil
	}
	before, err := s.Tunnels()
	if err != nil {
		return err
	}
	// First, to make room.
	for port := range before {
		if _, closed := ports[port]; closed {
			continue
		}
		if err := m.Delete(bits.ReverseBytes16(port)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("write map %s: %w", bpf.EgressMapTunnels, err)
		}
	}
	for port, found := range ports {
		value := uint8(0)
		if found {
			value = 1
		}
		if err := m.Put(bits.ReverseBytes16(port), value); err != nil {
			return fmt.Errorf("write map %s: %w", bpf.EgressMapTunnels, err)
		}
	}
	return nil
}
