package maps

import (
	"errors"
	"fmt"
	"reflect"
	"unsafe"

	"github.com/cilium/ebpf"
)

// decode returns the beginning of a value, which may be longer or shorter than V: a version
// of another format may have made its map. What is missing is 0.
func decode[V any](value []byte) (v V) {
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&v)), unsafe.Sizeof(v)), value)
	return v
}

// eachEntry calls fn with all entries of a hash map, many of which it reads at a time, until
// fn returns an error. fn must not keep the value.
func eachEntry[K any](m *ebpf.Map, fn func(key K, value []byte) error) error {
	// The kernel fills whole hash buckets, which have room in any chunk of this
	// size, and never skips an entry because its neighbour is deleted meanwhile.
	const chunk = 1024
	size := int(m.ValueSize())
	var (
		cursor ebpf.MapBatchCursor
		keys   = make([]K, chunk)
		values = reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(size, reflect.TypeFor[byte]())), chunk, chunk)
		bytes  = unsafe.Slice((*byte)(values.UnsafePointer()), chunk*size)
	)
	for {
		n, err := m.BatchLookup(&cursor, keys, values.Interface(), nil)
		for i := range n {
			if err := fn(keys[i], bytes[i*size:(i+1)*size]); err != nil {
				return err
			}
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read map %v: %w", m, err)
		}
	}
}
