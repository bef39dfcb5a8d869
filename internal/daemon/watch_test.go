package daemon

import (
	"os"
	"path/filepath"
	"testing"
)

// TestWatchVolume changes a file as a kubelet changes those of a ConfigMap or a Secret: the file is a
// link to one in ..data, which is itself a link, to a directory that nobody writes to after that.
// Another link takes its place.
func TestWatchVolume(t *testing.T) {
	volume := t.TempDir()
	publish := func(version, config string) {
		t.Helper()
		dir := filepath.Join(volume, "..2026_01_01_00_00_"+version)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(config), 0o644); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Readlink(filepath.Join(volume, "..data"))
		if err := os.Symlink(filepath.Base(dir), filepath.Join(volume, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(volume, "..data_tmp"), filepath.Join(volume, "..data")); err != nil {
			t.Fatal(err)
		}
		if before != "" {
			if err := os.RemoveAll(filepath.Join(volume, before)); err != nil {
				t.Fatal(err)
			}
		}
	}
	publish("1", "mode: enforce\n")
	file := filepath.Join(volume, "config.yaml")
	if err := os.Symlink("..data/config.yaml", file); err != nil {
		t.Fatal(err)
	}
	w := newWatched(file)
	for range 2 {
		if w.changed() {
			t.Fatal("changed, but is the same")
		}
	}
	for _, version := range []string{"2", "3"} {
		publish(version, "mode: enforce\n") // as long as before
		w.changed()                         // the first look waits for the file to stay the same
		if !w.changed() {
			t.Errorf("version %s was not seen", version)
		}
		if w.changed() {
			t.Errorf("version %s was seen twice", version)
		}
	}
}
