package events

import (
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestDocs holds the keys in docs/events.md against the code.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile("../../docs/events.md")
	check(t, err)
	var documented []string
	for _, row := range regexp.MustCompile("(?m)^\\| (`[a-z0-9_.]+`(?:, `[a-z0-9_.]+`)*) \\|.*\\|.*\\|$").FindAllStringSubmatch(string(page), -1) {
		for key := range strings.SplitSeq(row[1], ", ") {
			documented = append(documented, strings.Trim(key, "`"))
		}
	}
	if want := Keys(); !slices.Equal(documented, want) {
		t.Errorf("docs/events.md explains the keys\n%s, want\n%s", documented, want)
	}
	for _, word := range []string{
		Start, Refusal, Suppressed, Lost, HookConnect, HookSendmsg, HookPacket, HookSocket, HookHost,
		ReasonMalformed, ReasonBlocked, ReasonRateLimited, ReasonNoBucket, ReasonFamily, StageKernel, StageReader,
	} {
		if !strings.Contains(string(page), "`"+word+"`") {
			t.Errorf("docs/events.md does not mention `%s`", word)
		}
	}
	example := strings.Join(regexp.MustCompile(`(?m)^\{"type":.*$`).FindAllString(string(page), -1), "\n")
	records, _, err := readAll(t, strings.NewReader(example))
	if err != io.EOF || len(records) != 4 {
		t.Errorf("the example has %d records: %v", len(records), err)
	}
}
