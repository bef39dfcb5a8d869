package cgroup

import (
	"os"
	"path/filepath"
	"testing"
)

// A container can make some files of /proc as long as it likes.
func TestReadFirst(t *testing.T) {
	const most = 1 << 16
	path := filepath.Join(t.TempDir(), "long")
	for _, size := range []int{0, 1, 512, 1024, most, 10 * most} {
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		if text, err := readFirst(path, most); err != nil || len(text) < min(size, most) || len(text) > min(size, 2*most) {
			t.Errorf("of %d bytes: got %d, %v", size, len(text), err)
		}
		if text, err := read(path); err != nil || len(text) != size {
			t.Errorf("all of %d bytes: got %d, %v", size, len(text), err)
		}
	}
}
