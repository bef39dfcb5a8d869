package text_test

import (
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/text"
)

func TestPrintable(t *testing.T) {
	for _, tt := range []struct{ in, printable, visible string }{
		{"web", "web", "web"},
		{"", `""`, ""},
		{"日本 é", "日本 é", "日本 é"},
		{"a\x1b[2Jb", `"a\x1b[2Jb"`, "a\uFFFD[2Jb"},
		{"a\nb\tc", `"a\nb\tc"`, "a\nb\tc"},
		// One byte that is CSI to terminals without UTF-8.
		{"a\x9b2J", `"a\x9b2J"`, "a\uFFFD2J"},
		{"a\u009b2J", `"a\u009b2J"`, "a\uFFFD2J"},
		// What follows would be shown from right to left.
		{"a\u202eb", `"a\u202eb"`, "a\uFFFDb"},
	} {
		if got := text.Printable(tt.in); got != tt.printable {
			t.Errorf("Printable(%q) = %s, want %s", tt.in, got, tt.printable)
		}
		if got := strings.Map(text.Visible, tt.in); got != tt.visible {
			t.Errorf("Visible of %q = %q, want %q", tt.in, got, tt.visible)
		}
	}
}
