package report

import (
	"bytes"
	"path/filepath"
	"testing"

	"github.com/egressbpf/egressbpf/internal/test/bench/results"
)

// TestPage checks docs/performance.md and its plots against the results they come from.
func TestPage(t *testing.T) {
	const docs = "../../../../docs"
	r, err := results.Read(filepath.Join(docs, folder, "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := generate(r, notes(docs))
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := write(want, docs); err != nil {
			t.Fatal(err)
		}
	}
	got, err := written(docs)
	if err != nil {
		t.Fatal(err)
	}
	const remedy = "go test ./internal/test/bench/report -run TestPage -update"
	for name, text := range want {
		if old, ok := got[name]; !ok {
			t.Errorf("docs/%s is missing: %s", name, remedy)
		} else if !bytes.Equal(old, text) {
			t.Errorf("docs/%s does not match docs/performance/results.json: %s", name, remedy)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("docs/%s has no data in docs/performance/results.json: %s", name, remedy)
		}
	}
}
