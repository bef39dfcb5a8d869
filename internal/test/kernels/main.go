// Kernels compares what the filter does on the kernels of vmtest with what is documented, and
// writes docs/kernels.md.
//
//	kernels check DIR   fail if a kernel does less than docs/kernels.json says
//	kernels write DIR   write docs/kernels.json, and docs/kernels.md from it
//
// DIR has the output of TestKernel (internal/loader) on each kernel, in a file with the kernel's
// name in vmtest. What DIR does not have is left alone.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/test/kernels/facts"
)

const (
	documented = "docs/kernels.json"
	page       = "docs/kernels.md"
)

func main() {
	if len(os.Args) != 3 || os.Args[1] != "check" && os.Args[1] != "write" {
		fmt.Fprintln(os.Stderr, "usage: kernels check|write DIR")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

func run(command, dir string) error {
	was, err := readDocumented(documented)
	if err != nil {
		return err
	}
	is, err := readOutputs(dir)
	if err != nil {
		return err
	}
	problems := tooLarge(is)
	if command == "check" {
		problems = append(problems, less(was, is)...)
	} else if err := write(merge(was, is)); err != nil {
		return err
	}
	for _, p := range problems {
		fmt.Fprintln(os.Stderr, p)
	}
	if len(problems) > 0 {
		return fmt.Errorf("this is not as it should be; `make kernels` writes %s anew", page)
	}
	return nil
}

// kernels are facts by the name of the kernel in vmtest.
type kernels map[string]*facts.Facts

func readDocumented(path string) (kernels, error) {
	all := kernels{}
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return all, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &all); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return all, nil
}

func readOutputs(dir string) (kernels, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	all := kernels{}
	for _, e := range entries {
		file, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		f, err := facts.Read(file)
		file.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.Name(), err)
		}
		all[e.Name()] = f
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s is empty", dir)
	}
	return all, nil
}

func merge(was, is kernels) kernels {
	all := kernels{}
	for _, from := range []kernels{was, is} {
		for name, f := range from {
			all[name] = f
		}
	}
	return all
}

func write(all kernels) error {
	text, err := json.MarshalIndent(all, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(documented, append(text, '\n'), 0o644); err != nil {
		return err
	}
	return os.WriteFile(page, []byte(render(all)), 0o644)
}

func tooLarge(is kernels) (problems []string) {
	for _, name := range is.names() {
		for _, program := range sorted(is[name].Programs) {
			if n := is[name].Programs[program]; n > facts.Ceiling {
				problems = append(problems, fmt.Sprintf("%s: program %s: the verifier processes %d instructions, more than %d", name, program, n, facts.Ceiling))
			}
		}
	}
	return problems
}

// drift is by how many percent the number of instructions may differ from the documented one:
// it differs between releases of one series.
const drift = 10

// less says what kernels do otherwise than documented. Something better fails too, so that it is
// documented, and cannot get lost again.
func less(was, is kernels) (problems []string) {
	for _, name := range is.names() {
		before, now := was[name], is[name]
		if before == nil {
			problems = append(problems, fmt.Sprintf("%s: not documented", name))
			continue
		}
		for _, d := range defences {
			if b, n := before.Defences[d], now.Defences[d]; b != n {
				problems = append(problems, fmt.Sprintf("%s (%s): %s is %q, and documented as %q", name, now.Release, d, n, b))
			}
		}
		for _, program := range sorted(before.Programs) {
			if _, ok := now.Programs[program]; !ok {
				problems = append(problems, fmt.Sprintf("%s (%s): program %s is documented, and not loaded", name, now.Release, program))
			}
		}
		for _, program := range sorted(now.Programs) {
			b, n := before.Programs[program], now.Programs[program]
			if 100*n > (100+drift)*b || 100*n < (100-drift)*b {
				problems = append(problems, fmt.Sprintf("%s (%s): program %s: the verifier processes %d instructions, and %d are documented (%s)",
					name, now.Release, program, n, b, before.Release))
			}
		}
		if before.PageSize != now.PageSize {
			problems = append(problems, fmt.Sprintf("%s (%s): pages of %d bytes, and %d are documented", name, now.Release, now.PageSize, before.PageSize))
		}
	}
	return problems
}

// names returns the names of the kernels, by architecture, the oldest first.
func (all kernels) names() []string {
	names := sorted(all)
	slices.SortStableFunc(names, func(a, b string) int {
		if c := strings.Compare(all[a].Arch, all[b].Arch); c != 0 {
			return c
		}
		if c := compareReleases(all[a].Release, all[b].Release); c != 0 {
			return c
		}
		return all[a].PageSize - all[b].PageSize
	})
	return names
}

// compareReleases compares the first two numbers.
func compareReleases(a, b string) int {
	var x, y [2]int
	_, _ = fmt.Sscanf(a, "%d.%d", &x[0], &x[1])
	_, _ = fmt.Sscanf(b, "%d.%d", &y[0], &y[1])
	return slices.Compare(x[:], y[:])
}

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
