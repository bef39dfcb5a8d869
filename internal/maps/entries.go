package maps

import (
	"errors"
	"fmt"
	"reflect"
	"unsafe"

	"github.com/cilium/ebpf"
)

// decode returns the beginning of a value as a V. The value may be longer or shorter than
// V, since a version of another format may have created its map. What is missing is 0.
func decode[V any](value []byte) (v V) {
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&v)), unsafe.Sizeof(v)), value)
	return v
}

// eachEntry calls fn for all entries of a hash map until fn returns an error. It reads many
// entries at a time. fn must not keep the value.
func eachEntry[K any](m *ebpf.Map, fn func(key K, value []byte) error) error {
	return eachRaw(m, func(key, value []byte) error { return fn(decode[K](key), value) })
}

// eachRaw does so with keys of any type. fn must not keep them either.
func eachRaw(m *ebpf.Map, fn func(key, value []byte) error) error {
	// The kernel returns whole hash buckets, and each fits into a chunk of this size.
	// It never skips an entry because a neighbour is deleted meanwhile.
	const chunk = 1024
	keys, key := arrays(chunk, int(m.KeySize()))
	values, value := arrays(chunk, int(m.ValueSize()))
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			if err := fn(key(i), value(i)); err != nil {
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

// arrays returns a slice of n arrays of bytes, and a function for the bytes of one of them.
func arrays(n, size int) (slice any, at func(i int) []byte) {
	s := reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(size, reflect.TypeFor[byte]())), n, n)
	all := unsafe.Slice((*byte)(s.UnsafePointer()), n*size)
	return s.Interface(), func(i int) []byte { return all[i*size : (i+1)*size] }
}
