// Package report writes docs/performance.md and its plots from the raw results of the
// benchmarks. Every number on the page is derived from the results. The same results make the
// same files, byte for byte.
package report

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/egressbpf/egressbpf/internal/test/bench/results"
)

const (
	pageName = "performance.md"
	folder   = "performance"
)

// Run is the command "bench report".
func Run(args []string) error {
	flags := flag.NewFlagSet("bench report", flag.ContinueOnError)
	from := flags.String("results", "docs/performance/results.json", "raw results, as bench run writes them")
	out := flags.String("out", "docs", "folder for performance.md, with its plots in performance/")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("report: unexpected argument %q", flags.Arg(0))
	}
	r, err := results.Read(*from)
	if err != nil {
		return err
	}
	files, err := generate(r, notes(*out))
	if err != nil {
		return fmt.Errorf("report on %s: %w", *from, err)
	}
	return write(files, *out)
}

// notes is the folder of the explanations that are written by hand.
func notes(docs string) fs.FS { return os.DirFS(filepath.Join(docs, folder, "notes")) }

// generate returns the page and its plots, by their paths below docs.
func generate(r results.Results, notes fs.FS) (map[string][]byte, error) {
	d, err := newData(r)
	if err != nil {
		return nil, err
	}
	plots, err := d.plots()
	if err != nil {
		return nil, err
	}
	files, drawn := map[string][]byte{}, map[string]bool{}
	for name, svg := range plots {
		files[filepath.Join(folder, name+".svg")] = svg
		drawn[name] = true
	}
	files[pageName], err = d.markdown(drawn, notes)
	return files, err
}

// write writes the files, and removes plots of earlier results that these do not have.
func write(files map[string][]byte, docs string) error {
	if err := os.MkdirAll(filepath.Join(docs, folder), 0o755); err != nil {
		return err
	}
	old, err := written(docs)
	if err != nil {
		return err
	}
	for name := range old {
		if _, ok := files[name]; !ok {
			if err := os.Remove(filepath.Join(docs, name)); err != nil {
				return err
			}
		}
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(docs, name), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// written reads what an earlier report wrote.
func written(docs string) (map[string][]byte, error) {
	files := map[string][]byte{}
	names, err := filepath.Glob(filepath.Join(docs, folder, "*.svg"))
	if err != nil {
		return nil, err
	}
	for _, path := range append(names, filepath.Join(docs, pageName)) {
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		name, err := filepath.Rel(docs, path)
		if err != nil {
			return nil, err
		}
		files[name] = text
	}
	return files, nil
}
