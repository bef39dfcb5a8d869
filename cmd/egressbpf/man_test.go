package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// TestMan checks that each command gets a page, and that writing the pages again gives the
// same pages.
func TestMan(t *testing.T) {
	dirs := [2]string{filepath.Join(t.TempDir(), "made", "man8"), t.TempDir()}
	for _, dir := range dirs {
		var stderr bytes.Buffer
		if code := run(t.Context(), []string{"man", dir}, new(bytes.Buffer), &stderr); code != exitDone {
			t.Fatalf("exit code %d: %s", code, stderr.String())
		}
	}
	var check func(*cobra.Command)
	check = func(cmd *cobra.Command) {
		name := strings.ReplaceAll(cmd.CommandPath(), " ", "-") + ".8"
		page, err := os.ReadFile(filepath.Join(dirs[0], name))
		if err != nil {
			t.Error(err)
			return
		}
		if !bytes.Contains(page, []byte(cmd.Short)) || bytes.Contains(page, []byte("0001")) {
			t.Errorf("%s: does not say what the command does, or has no date:\n%s", name, page)
		}
		if again, _ := os.ReadFile(filepath.Join(dirs[1], name)); !bytes.Equal(page, again) {
			t.Errorf("%s differs from one time to the next", name)
		}
		for _, sub := range cmd.Commands() {
			check(sub)
		}
	}
	check(newRoot(new(globals)))
	var stderr bytes.Buffer
	if code := run(t.Context(), []string{"man"}, new(bytes.Buffer), &stderr); code != exitUsage {
		t.Errorf("without a directory: exit code %d", code)
	}
}
