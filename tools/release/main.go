// Command release builds what a release consists of. The Makefile calls it, in the root of the
// repository.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

// usageError is bad input.
type usageError struct{ error }

func main() {
	err := run(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "release: %v\n", err)
		if errors.As(err, new(usageError)) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("release", flag.ContinueOnError)
	version := flags.String("version", "", "version, such as v1.2.3 (default: the commit's tag)")
	out := flags.String("o", "", "directory to write to")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), "Usage: release [FLAGS] image|release\n")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return usageError{err}
	}
	if flags.NArg() != 1 || *out == "" {
		return usageError{errors.New("want -o and one command; see release -help")}
	}
	switch command := flags.Arg(0); command {
	case "image":
		return image(*version, *out)
	case "release":
		return makeRelease(*version, *out)
	default:
		return usageError{fmt.Errorf("unknown command %q; see release -help", command)}
	}
}

// image builds the images of the work tree, whatever it is.
func image(version, out string) error {
	if version == "" {
		return usageError{errors.New("want -version")}
	}
	b, err := newBuild(version)
	if err != nil {
		return err
	}
	dir, err := b.begin(out)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binaries, err := b.compileAll(dir)
	if err != nil {
		return err
	}
	digest, err := b.images(binaries, dir, filepath.Join(out, "egressbpf-image"))
	if err != nil {
		return err
	}
	fmt.Printf("%s@%s\n", repository, digest)
	return nil
}

// begin empties the directory to write to, and returns one for what comes between, which the caller
// removes.
func (b *build) begin(out string) (string, error) {
	if err := os.RemoveAll(out); err != nil {
		return "", err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return "", err
	}
	return os.MkdirTemp(filepath.Dir(out), "work-")
}
