package iptables

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/policy"
)

var update = flag.Bool("update", false, "write what is printed now to testdata")

// imported is what a user sees: the config, then the notes.
func imported(t *testing.T, sources ...Source) (*Result, string) {
	t.Helper()
	r, err := Translate(sources...)
	if err != nil && !errors.Is(err, ErrNothing) {
		t.Fatal(err)
	}
	var out strings.Builder
	config := r.Config.YAML(r.Comments)
	if got, perr := policy.ParseConfig("config.yaml", config); perr != nil || !reflect.DeepEqual(got, r.Config) {
		t.Errorf("read back: %+v, %v, want %+v", got, perr, r.Config)
	}
	if err == nil {
		out.Write(config)
	} else {
		out.WriteString(err.Error() + "\n")
	}
	for _, n := range r.Notes {
		out.WriteString("\n" + n.String())
	}
	return r, out.String() + "\n"
}

func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.rules")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".rules")
		t.Run(name, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			r, got := imported(t, Source{Name: name, Text: string(text)})
			accounted(t, string(text), name, r)
			golden := "testdata/" + name + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

// accounted fails if a rule of DOCKER-USER is neither in a comment of the config
// nor in a note, save those that only jump.
func accounted(t *testing.T, text, name string, r *Result) {
	t.Helper()
	chains := map[string]bool{}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) > 0 && strings.HasPrefix(f[0], ":") {
			chains[f[0][1:]] = true
		}
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		at := strings.Index(line, "-A "+user+" ")
		if at < 0 {
			continue
		}
		rule := strings.TrimSpace(line[at:])
		words := strings.Fields(rule)
		if i := len(words) - 2; i > 0 && (words[i] == "-j" || words[i] == "-g") && chains[words[i+1]] {
			continue
		}
		if slices.ContainsFunc(r.Notes, func(n2 Note) bool { return n2.Line == n && n2.Source == name }) {
			continue
		}
		told := position{name, n}.String() + ": " + rule
		found := r.rules[position{name, n}]
		for _, lines := range r.Comments {
			found = found || slices.Contains(lines, told)
		}
		if !found {
			t.Errorf("line %d was passed over: %s", n, rule)
		}
	}
}
