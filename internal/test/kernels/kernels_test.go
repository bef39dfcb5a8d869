package main

import (
	"bytes"
	"maps"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/test/kernels/facts"
)

// TestPage compares the committed page with what the committed facts make.
func TestPage(t *testing.T) {
	all, err := readDocumented("../../../" + documented)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../../" + page)
	if err != nil {
		t.Fatal(err)
	}
	if string(text) != render(all) {
		t.Errorf("%s is not what %s makes: run `make kernels`", page, documented)
	}
	known := map[string]bool{}
	for _, name := range programs {
		known[name] = true
	}
	for name, f := range all {
		for program := range f.Programs {
			if !known[program] {
				t.Errorf("%s: the page has no program %s", name, program)
			}
		}
	}
}

func example() *facts.Facts {
	return &facts.Facts{
		Release: "6.12.1", Arch: "amd64", PageSize: 4096,
		Defences: map[string]string{facts.Egress: "yes", facts.Families: "lsm_cgroup", facts.Connect: "ECONNREFUSED"},
		Programs: map[string]int{"egress": 50_000},
	}
}

func TestCompare(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*facts.Facts)
		want   string // in the problem; empty if there is none
	}{
		"the same":             {func(*facts.Facts) {}, ""},
		"another release":      {func(f *facts.Facts) { f.Release = "6.12.2" }, ""},
		"a defence is gone":    {func(f *facts.Facts) { delete(f.Defences, facts.Families) }, `socket_families is "", and documented as "lsm_cgroup"`},
		"another way":          {func(f *facts.Facts) { f.Defences[facts.Families] = "fmod_ret" }, `"fmod_ret"`},
		"another error":        {func(f *facts.Facts) { f.Defences[facts.Connect] = "EPERM" }, `"EPERM"`},
		"one more defence":     {func(f *facts.Facts) { f.Defences[facts.HostSide] = "tc" }, `host_side is "tc"`},
		"within the drift":     {func(f *facts.Facts) { f.Programs["egress"] = 55_000 }, ""},
		"beyond the drift":     {func(f *facts.Facts) { f.Programs["egress"] = 55_001 }, "55001 instructions"},
		"below the drift":      {func(f *facts.Facts) { f.Programs["egress"] = 44_999 }, "44999 instructions"},
		"a program is gone":    {func(f *facts.Facts) { clear(f.Programs) }, "not loaded"},
		"one more program":     {func(f *facts.Facts) { f.Programs["more"] = 1 }, "program more"},
		"another size of page": {func(f *facts.Facts) { f.PageSize = 16384 }, "16384"},
	} {
		t.Run(name, func(t *testing.T) {
			now := example()
			now.Defences, now.Programs = maps.Clone(now.Defences), maps.Clone(now.Programs)
			tt.change(now)
			expect(t, less(kernels{"k": example()}, kernels{"k": now}), tt.want)
		})
	}
	expect(t, less(kernels{}, kernels{"k": example()}), "not documented")
	expect(t, less(kernels{"k": example(), "other": example()}, kernels{"k": example()}), "")
}

func expect(t *testing.T, problems []string, want string) {
	t.Helper()
	if (len(problems) > 0) != (want != "") || !strings.Contains(strings.Join(problems, "\n"), want) {
		t.Errorf("got %q, want %q", problems, want)
	}
}

func TestCeiling(t *testing.T) {
	f := example()
	f.Programs["egress"] = facts.Ceiling
	expect(t, tooLarge(kernels{"k": f}), "")
	f.Programs["egress"]++
	expect(t, tooLarge(kernels{"k": f}), "more than 100000")
}

func TestFacts(t *testing.T) {
	var out bytes.Buffer
	out.WriteString("=== RUN\n")
	if err := example().Write(&out); err != nil {
		t.Fatal(err)
	}
	out.WriteString("PASS\n")
	got, err := facts.Read(&out)
	if err != nil || !reflect.DeepEqual(got, example()) {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := facts.Read(strings.NewReader("PASS\n")); err == nil {
		t.Error("output without facts is read")
	}
}

func TestThousands(t *testing.T) {
	for n, want := range map[int]string{7: "7", 999: "999", 1000: "1,000", 1_002_003: "1,002,003"} {
		if got := thousands(n); got != want {
			t.Errorf("%d: got %s", n, got)
		}
	}
}
