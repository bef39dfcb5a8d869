package main

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// makeRelease builds everything that a release of a version has.
func makeRelease(given, out string) error {
	version, err := releaseVersion(given)
	if err != nil {
		return err
	}
	b, err := newBuild(version)
	if err != nil {
		return err
	}
	if err := b.checkGo(); err != nil {
		return err
	}
	changelog, err := os.ReadFile("CHANGELOG.md")
	if err != nil {
		return err
	}
	notes, err := releaseNotes(string(changelog), version)
	if err != nil {
		return err
	}
	if b.modified {
		b.progress("warning: the work tree is not commit %s: nobody can rebuild this", b.commit)
	}
	work, err := b.begin(out)
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	base := filepath.Join(out, "egressbpf-"+b.number())

	binaries, err := b.packages(out)
	if err != nil {
		return err
	}
	for _, arch := range architectures {
		if err := b.archive(binaries, arch, work, base+"-linux-"+arch+".tar.gz"); err != nil {
			return err
		}
	}
	digest, err := b.images(binaries, work, base+"-image")
	if err != nil {
		return err
	}
	if err := b.sbom(base + ".cdx.json"); err != nil {
		return err
	}
	sums, err := checksums(out)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(out, "SHA256SUMS"), func(w io.Writer) error {
		for _, name := range slices.Sorted(maps.Keys(sums)) {
			if _, err := fmt.Fprintf(w, "%s  %s\n", sums[name], name); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	if err := b.provenance(sums, digest, base+".provenance.json"); err != nil {
		return err
	}
	return writeFile(filepath.Join(out, "notes.md"), func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s\n\nContainer image: `%s:%s@%s`. [How to verify this release](%s/blob/%s/docs/releasing.md#verifying).\n",
			notes, repository, b.number(), digest, source, version)
		return err
	})
}

// checkGo refuses another version of Go than go.mod's: it would link other binaries.
func (b *build) checkGo() error {
	module, err := os.ReadFile("go.mod")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(module)) {
		if want, ok := strings.CutPrefix(strings.TrimSpace(line), "toolchain "); ok {
			if runtime.Version() != want {
				return fmt.Errorf("go.mod wants releases to be built with %s, and this is %s", want, runtime.Version())
			}
			return nil
		}
	}
	return fmt.Errorf("go.mod names no toolchain")
}

// packages makes the deb and rpm packages, and returns the binaries that are in them: a release
// has one for each architecture.
func (b *build) packages(out string) (map[string]string, error) {
	b.progress("packages")
	if _, err := b.output("make", "--no-print-directory", "packages", "VERSION="+b.version); err != nil {
		return nil, err
	}
	made, err := filepath.Glob("bin/packages/*")
	if err != nil {
		return nil, err
	}
	for _, from := range made {
		// The forge would rename what has a tilde.
		name := strings.ReplaceAll(filepath.Base(from), "~", "-")
		if err := writeFile(filepath.Join(out, name), func(w io.Writer) error {
			content, err := os.ReadFile(from)
			if err == nil {
				_, err = w.Write(content)
			}
			return err
		}); err != nil {
			return nil, err
		}
	}
	binaries := map[string]string{}
	for _, arch := range architectures {
		binaries[arch] = filepath.Join("bin", "linux-"+arch, "egressbpf")
	}
	return binaries, nil
}

// archive writes what make install installs, and completions and licences, to be unpacked in
// /usr/local.
func (b *build) archive(binaries map[string]string, arch, work, to string) error {
	b.progress("archive for linux/%s", arch)
	// This machine's binary writes what all have.
	native := binaries[runtime.GOARCH]
	if native == "" {
		return fmt.Errorf("releases are built on amd64 or arm64, not on %s", runtime.GOARCH)
	}
	manual := filepath.Join(work, "man8")
	if _, err := b.output(native, "man", manual); err != nil {
		return err
	}
	generated := func(name, content string) (string, error) {
		path := filepath.Join(work, name)
		return path, os.WriteFile(path, []byte(content), 0o644)
	}
	unit, err := os.ReadFile("dist/egressbpf.service")
	if err != nil {
		return err
	}
	unitPath, err := generated("egressbpf.service", strings.ReplaceAll(string(unit), "@BINDIR@", "/usr/local/sbin"))
	if err != nil {
		return err
	}
	root := strings.TrimSuffix(filepath.Base(to), ".tar.gz") + "/"
	files := []file{
		{root + "sbin/egressbpf", binaries[arch], 0o755},
		{root + "lib/systemd/system/egressbpf.service", unitPath, 0o644},
		{root + "share/egressbpf/grafana/egressbpf.json", "dist/grafana/egressbpf.json", 0o644},
	}
	for shell, path := range map[string]string{
		"bash": "bash-completion/completions/egressbpf",
		"fish": "fish/vendor_completions.d/egressbpf.fish",
		"zsh":  "zsh/site-functions/_egressbpf",
	} {
		text, err := b.output(native, "completion", shell)
		if err != nil {
			return err
		}
		from, err := generated(shell, text)
		if err != nil {
			return err
		}
		files = append(files, file{root + "share/" + path, from, 0o644})
	}
	notices, err := b.thirdParty(arch, work)
	if err != nil {
		return err
	}
	files = append(files, file{root + "share/doc/egressbpf/third-party", notices, 0o644})
	for pattern, folder := range map[string]string{
		"dist/prometheus/*.yml": "share/egressbpf/prometheus",
		manual + "/*":           "share/man/man8",
		"dist/config.yaml":      "share/doc/egressbpf",
		"LICENSE":               "share/doc/egressbpf",
		"bpf/LICENSE.*":         "share/doc/egressbpf",
		"README.md":             "share/doc/egressbpf",
		"CHANGELOG.md":          "share/doc/egressbpf",
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		if len(found) == 0 {
			return fmt.Errorf("no file is called %s", pattern)
		}
		for _, from := range found {
			files = append(files, file{root + folder + "/" + filepath.Base(from), from, 0o644})
		}
	}
	return writeFile(to, func(w io.Writer) error {
		packed := gzip.NewWriter(w)
		if err := b.tar(packed, files); err != nil {
			return err
		}
		return packed.Close()
	})
}

// thirdParty makes a file of the licences of what is linked into a binary.
func (b *build) thirdParty(arch, work string) (string, error) {
	text, err := b.output("dist/packages/third-party.sh", arch)
	if err != nil {
		return "", err
	}
	path := filepath.Join(work, "third-party-"+arch)
	return path, os.WriteFile(path, []byte(text), 0o644)
}

// checksums returns the SHA-256 of each file of a directory, in hex.
func checksums(dir string) (map[string]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	sums := map[string]string{}
	for _, entry := range entries {
		content, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(content)
		sums[entry.Name()] = hex.EncodeToString(sum[:])
	}
	return sums, nil
}
