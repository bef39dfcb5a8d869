// Package release_test builds a release twice, in clones of this repository at different paths, and
// looks at what is in it.
package release_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The version is one of which the changelog says nothing, so the notes are of what is unreleased.
const (
	version = "v0.0.0-releasetest.1"
	number  = "0.0.0-releasetest.1"
	image   = "ghcr.io/egressbpf/egressbpf"
)

var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

func TestRelease(t *testing.T) {
	source := workTree(t)
	// Another path, another umask, another time zone, other settings of Go.
	one, other := clone(t, source, "022", "one"), clone(t, source, "077", "another/place")
	t.Run("refused", func(t *testing.T) { testRefused(t, one) })

	var wg sync.WaitGroup
	for _, c := range []checkout{one, other} {
		wg.Go(func() {
			if out, err := c.make(t, "release", "VERSION="+version); err != nil {
				t.Errorf("%s: make release: %v\n%s", c.dir, err, out)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	r := release{t: t, dir: filepath.Join(one.dir, "bin/release"), commit: one.commit}
	sums := r.sums(r.dir)
	t.Run("reproducible", func(t *testing.T) {
		again := r.sums(filepath.Join(other.dir, "bin/release"))
		for name := range union(sums, again) {
			if sums[name] != again[name] {
				t.Errorf("%s: %q in one clone, %q in another", name, sums[name], again[name])
			}
		}
	})
	t.Run("checksums", func(t *testing.T) { r.with(t).testChecksums(sums) })
	t.Run("archives", func(t *testing.T) { r.with(t).testArchives(one) })
	t.Run("binaries", func(t *testing.T) { r.with(t).testBinaries() })
	t.Run("packages", func(t *testing.T) { r.with(t).testPackages() })
	t.Run("images", func(t *testing.T) { r.with(t).testImages() })
	t.Run("SBOM", func(t *testing.T) { r.with(t).testSBOM() })
	t.Run("provenance", func(t *testing.T) { r.with(t).testProvenance() })
	t.Run("notes", func(t *testing.T) { r.with(t).testNotes() })
}

// testRefused tries what make release must not build.
func testRefused(t *testing.T, c checkout) {
	refused := func(want string, args ...string) {
		t.Helper()
		out, err := c.make(t, append([]string{"release"}, args...)...)
		if err == nil || !strings.Contains(out, want) {
			t.Errorf("make release %s: %v, want a refusal that says %q\n%s", strings.Join(args, " "), err, want, out)
		}
		if _, err := os.Stat(filepath.Join(c.dir, "bin/release")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("make release %s has written files (%v)", strings.Join(args, " "), err)
		}
	}
	refused("the commit has no tag v")
	refused("want a version such as v1.2.3", "VERSION=1.2")
	refused("want a version such as v1.2.3", "VERSION=v1.2.3+build")
	c.git(t, "tag", "v987.6.5")
	refused("CHANGELOG.md says nothing about v987.6.5")
	c.git(t, "tag", "-d", "v987.6.5")
	untracked := filepath.Join(c.dir, "untracked")
	if err := os.WriteFile(untracked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("the work tree is not what is committed")
	if err := os.Remove(untracked); err != nil {
		t.Fatal(err)
	}
}

// checkout is a clone of the repository.
type checkout struct {
	dir, commit, umask string
}

// workTree returns the repository's folder and a commit of what is in the work tree, but for
// untracked files.
func workTree(t *testing.T) checkout {
	t.Helper()
	dir, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	c := checkout{dir: dir}
	if c.commit = c.git(t, "stash", "create"); c.commit == "" {
		c.commit = c.git(t, "rev-parse", "HEAD")
	}
	return c
}

func clone(t *testing.T, from checkout, umask, name string) checkout {
	t.Helper()
	c := checkout{dir: filepath.Join(t.TempDir(), name), commit: from.commit, umask: umask}
	script := `umask "$1" && git clone -q --no-checkout "$2" "$3" && git -C "$3" checkout -q --detach "$4"`
	if out, err := exec.Command("sh", "-c", script, "sh", umask, from.dir, c.dir, c.commit).CombinedOutput(); err != nil {
		t.Fatalf("clone: %v\n%s", err, out)
	}
	return c
}

func (c checkout) git(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-C", c.dir}, args...)...)
	cmd.Env = append(os.Environ(), "GIT_AUTHOR_NAME=test", "GIT_AUTHOR_EMAIL=test@example.com",
		"GIT_COMMITTER_NAME=test", "GIT_COMMITTER_EMAIL=test@example.com")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("git %s: %v", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out))
}

// make runs make, and returns what it prints. Nothing of it outlives the test.
func (c checkout) make(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx := t.Context()
	if deadline, ok := t.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline.Add(-10*time.Second))
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", `umask "$0" && exec make "$@"`, c.umask}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Dir = c.dir
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains([]string{"VERSION", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}, name)
	})
	if c.umask != "022" {
		cmd.Env = append(cmd.Env, "TZ=Asia/Tokyo", "LC_ALL=C", "GOAMD64=v2", "GOARM64=v9.0", "GOFLAGS=-tags=other", "SOURCE_DATE_EPOCH=1")
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// release is what is looked at.
type release struct {
	t           *testing.T
	dir, commit string
}

func (r release) with(t *testing.T) release { return release{t, r.dir, r.commit} }

func (r release) read(name string) []byte {
	r.t.Helper()
	content, err := os.ReadFile(filepath.Join(r.dir, name))
	if err != nil {
		r.t.Fatal(err)
	}
	return content
}

func (r release) sums(dir string) map[string]string {
	r.t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		r.t.Fatal(err)
	}
	sums := map[string]string{}
	for _, entry := range entries {
		content, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			r.t.Fatal(err)
		}
		sums[entry.Name()] = sum(content)
	}
	return sums
}

func sum(content []byte) string {
	h := sha256.Sum256(content)
	return hex.EncodeToString(h[:])
}

func union[V any](a, b map[string]V) map[string]V {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

// files are the files of a release for which there are checksums.
func files() []string {
	return []string{
		"egressbpf-" + number + "-1.aarch64.rpm",
		"egressbpf-" + number + "-1.x86_64.rpm",
		"egressbpf-" + number + "-image-amd64.tar",
		"egressbpf-" + number + "-image-arm64.tar",
		"egressbpf-" + number + "-image.oci.tar",
		"egressbpf-" + number + "-linux-amd64.tar.gz",
		"egressbpf-" + number + "-linux-arm64.tar.gz",
		"egressbpf-" + number + ".cdx.json",
		"egressbpf_" + number + "-1_amd64.deb",
		"egressbpf_" + number + "-1_arm64.deb",
	}
}

// listed are the lines of SHA256SUMS.
func (r release) listed() map[string]string {
	r.t.Helper()
	listed := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(r.read("SHA256SUMS")))
	for lines.Scan() {
		digest, name, ok := strings.Cut(lines.Text(), "  ")
		if !ok {
			r.t.Errorf("SHA256SUMS: %q", lines.Text())
		}
		listed[name] = digest
	}
	return listed
}

func (r release) testChecksums(sums map[string]string) {
	listed := r.listed()
	if got := slices.Sorted(maps.Keys(listed)); !slices.Equal(got, files()) {
		r.t.Errorf("SHA256SUMS lists\n%q, want\n%q", got, files())
	}
	for name, digest := range listed {
		if sums[name] != digest {
			r.t.Errorf("SHA256SUMS says %s of %s, which has %s", digest, name, sums[name])
		}
	}
	want := slices.Sorted(slices.Values(append(files(), "SHA256SUMS", "egressbpf-"+number+".provenance.json", "notes.md")))
	if got := slices.Sorted(maps.Keys(sums)); !slices.Equal(got, want) {
		r.t.Errorf("the release has\n%q, want\n%q", got, want)
	}
}

// entry is a file of an archive.
type entry struct {
	mode    int64
	content []byte
}

// untar returns the files of an archive, and checks what all of them have in common.
func untar(t *testing.T, in io.Reader) map[string]entry {
	t.Helper()
	found := map[string]entry{}
	archive := tar.NewReader(in)
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.Uid != 0 || header.Gid != 0 {
			t.Errorf("%s belongs to %d:%d", header.Name, header.Uid, header.Gid)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		switch header.Typeflag {
		case tar.TypeReg:
			found[strings.TrimPrefix(header.Name, "./")] = entry{header.Mode, content}
		case tar.TypeDir:
			if header.Mode != 0o755 {
				t.Errorf("directory %s has mode %o", header.Name, header.Mode)
			}
		default:
			t.Errorf("%s is of type %c", header.Name, header.Typeflag)
		}
	}
}

func (r release) archive(arch string) map[string]entry {
	r.t.Helper()
	unpacked, err := gzip.NewReader(bytes.NewReader(r.read("egressbpf-" + number + "-linux-" + arch + ".tar.gz")))
	if err != nil {
		r.t.Fatal(err)
	}
	found := map[string]entry{}
	for name, e := range untar(r.t, unpacked) {
		inside, ok := strings.CutPrefix(name, "egressbpf-"+number+"-linux-"+arch+"/")
		if !ok {
			r.t.Errorf("%s is outside of the archive's folder", name)
		}
		found[inside] = e
	}
	return found
}

func (r release) binary(arch string) []byte {
	r.t.Helper()
	binary := r.archive(arch)["sbin/egressbpf"]
	if binary.mode != 0o755 {
		r.t.Errorf("sbin/egressbpf for %s has mode %o", arch, binary.mode)
	}
	return binary.content
}

// testArchives compares the archives with what make install installs.
func (r release) testArchives(c checkout) {
	installed := r.t.TempDir()
	// The command itself is there already.
	if out, err := c.make(r.t, "-o", "build", "install", "DESTDIR="+installed, "SUDO="); err != nil {
		r.t.Fatalf("make install: %v\n%s", err, out)
	}
	want := map[string][]byte{}
	err := filepath.WalkDir(installed, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		want[strings.TrimPrefix(path, installed+"/usr/local/")] = content
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	for to, from := range map[string]string{
		"share/doc/egressbpf/LICENSE":              "LICENSE",
		"share/doc/egressbpf/LICENSE.BSD-2-Clause": "bpf/LICENSE.BSD-2-Clause",
		"share/doc/egressbpf/LICENSE.GPL-2.0":      "bpf/LICENSE.GPL-2.0",
		"share/doc/egressbpf/README.md":            "README.md",
		"share/doc/egressbpf/CHANGELOG.md":         "CHANGELOG.md",
	} {
		if want[to], err = os.ReadFile(filepath.Join(c.dir, from)); err != nil {
			r.t.Fatal(err)
		}
	}
	// Of these, what they begin with.
	for name, begin := range map[string]string{
		"share/bash-completion/completions/egressbpf":    "# bash completion V2 for egressbpf",
		"share/fish/vendor_completions.d/egressbpf.fish": "# fish completion for egressbpf",
		"share/zsh/site-functions/_egressbpf":            "#compdef egressbpf",
		"share/doc/egressbpf/third-party":                "Go\n\n",
		"sbin/egressbpf":                                 "\x7fELF",
	} {
		want[name] = []byte(begin)
	}
	for arch := range machines {
		found := r.archive(arch)
		for name := range union(keys(want), keys(found)) {
			e, ok := found[name]
			content, wanted := want[name]
			switch {
			case !wanted:
				r.t.Errorf("%s: %s should not be there", arch, name)
			case !ok:
				r.t.Errorf("%s: %s is missing", arch, name)
			case !bytes.HasPrefix(e.content, content):
				r.t.Errorf("%s: %s is not what is installed", arch, name)
			case name != "sbin/egressbpf" && e.mode != 0o644:
				r.t.Errorf("%s: %s has mode %o", arch, name, e.mode)
			}
		}
	}
}

func keys[V any](m map[string]V) map[string]bool {
	set := map[string]bool{}
	for k := range m {
		set[k] = true
	}
	return set
}

func (r release) testBinaries() {
	for arch, machine := range machines {
		content := r.binary(arch)
		binary, err := elf.NewFile(bytes.NewReader(content))
		if err != nil {
			r.t.Fatal(err)
		}
		if binary.Machine != machine {
			r.t.Errorf("the binary for %s is for %v", arch, binary.Machine)
		}
		for _, p := range binary.Progs {
			if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
				r.t.Errorf("the binary for %s is not static: it has %v", arch, p.Type)
			}
		}
		info, err := buildinfo.Read(bytes.NewReader(content))
		if err != nil {
			r.t.Fatal(err)
		}
		settings := map[string]string{}
		for _, s := range info.Settings {
			settings[s.Key] = s.Value
		}
		for key, want := range map[string]string{
			"GOARCH": arch, "GOOS": "linux", "CGO_ENABLED": "0", "-trimpath": "true", "-tags": "",
			"vcs.revision": r.commit, "vcs.modified": "false",
		} {
			if settings[key] != want {
				r.t.Errorf("the binary for %s was built with %s=%q, want %q", arch, key, settings[key], want)
			}
		}
		// What cannot run here at least has it.
		if !bytes.Contains(content, []byte(version)) {
			r.t.Errorf("the binary for %s does not know its version", arch)
		}
		if arch != runtime.GOARCH {
			continue
		}
		path := filepath.Join(r.t.TempDir(), "egressbpf")
		if err := os.WriteFile(path, content, 0o755); err != nil {
			r.t.Fatal(err)
		}
		out, err := exec.Command(path, "version").CombinedOutput()
		if want := fmt.Sprintf("egressbpf %s (%s, linux/%s)\n", version, info.GoVersion, arch); err != nil || string(out) != want {
			r.t.Errorf("version: %v, %q, want %q", err, out, want)
		}
	}
}

// testPackages looks for the archives' binaries in the packages.
func (r release) testPackages() {
	for arch, of := range map[string]string{"amd64": "x86_64", "arm64": "aarch64"} {
		deb := "egressbpf_" + number + "-1_" + arch + ".deb"
		content, err := exec.Command("dpkg-deb", "--fsys-tarfile", filepath.Join(r.dir, deb)).Output()
		if err != nil {
			r.t.Fatalf("%s: %v", deb, err)
		}
		want := sum(r.binary(arch))
		if got := sum(untar(r.t, bytes.NewReader(content))["usr/sbin/egressbpf"].content); got != want {
			r.t.Errorf("%s has a binary of its own", deb)
		}
		// The header has the checksums of the files, in hex.
		rpm := "egressbpf-" + number + "-1." + of + ".rpm"
		if !bytes.Contains(r.read(rpm), []byte(want)) {
			r.t.Errorf("%s has a binary of its own", rpm)
		}
	}
}

// descriptor is one of OCI's.
type descriptor struct {
	MediaType   string
	Digest      string
	Size        int
	Platform    struct{ OS, Architecture string }
	Annotations map[string]string
}

// manifest is an OCI manifest or index.
type manifest struct {
	MediaType   string
	Config      descriptor
	Layers      []descriptor
	Manifests   []descriptor
	Annotations map[string]string
}

// blob returns what a descriptor describes.
func (r release) blob(files map[string]entry, d descriptor) []byte {
	r.t.Helper()
	algorithm, digest, _ := strings.Cut(d.Digest, ":")
	content := files["blobs/"+algorithm+"/"+digest].content
	if algorithm != "sha256" || sum(content) != digest || len(content) != d.Size {
		r.t.Errorf("%s is not what its descriptor says", d.Digest)
	}
	return content
}

func (r release) json(content []byte, to any) {
	r.t.Helper()
	if err := json.Unmarshal(content, to); err != nil {
		r.t.Fatalf("%v\n%s", err, content)
	}
}

// testImages looks at the image of both architectures, and compares those for docker load with it.
func (r release) testImages() {
	files := untar(r.t, bytes.NewReader(r.read("egressbpf-"+number+"-image.oci.tar")))
	if got := string(files["oci-layout"].content); !strings.Contains(got, `"imageLayoutVersion": "1.0.0"`) {
		r.t.Errorf("oci-layout: %s", got)
	}
	var top, index manifest
	r.json(files["index.json"].content, &top)
	if len(top.Manifests) != 1 || top.Manifests[0].Annotations["org.opencontainers.image.ref.name"] != number {
		r.t.Fatalf("index.json: %s", files["index.json"].content)
	}
	r.json(r.blob(files, top.Manifests[0]), &index)
	if "sha256:"+r.imageDigest() != top.Manifests[0].Digest {
		r.t.Errorf("provenance says %s of the image, which is %s", r.imageDigest(), top.Manifests[0].Digest)
	}
	r.labels("index", index.Annotations)
	platforms := map[string]descriptor{}
	for _, d := range index.Manifests {
		platforms[d.Platform.OS+"/"+d.Platform.Architecture] = d
	}
	if len(platforms) != 2 || len(index.Manifests) != 2 {
		r.t.Fatalf("the image has the platforms %v", slices.Sorted(maps.Keys(platforms)))
	}
	for arch := range machines {
		d, ok := platforms["linux/"+arch]
		if !ok {
			r.t.Fatalf("the image has no platform linux/%s", arch)
		}
		r.image(arch, files, d)

		single := untar(r.t, bytes.NewReader(r.read("egressbpf-"+number+"-image-"+arch+".tar")))
		var own manifest
		r.json(single["index.json"].content, &own)
		if len(own.Manifests) != 1 || own.Manifests[0].Digest != d.Digest {
			r.t.Errorf("the image for docker load on %s is another one: %s", arch, single["index.json"].content)
		}
		var m manifest
		r.json(r.blob(single, d), &m)
		var docker []struct {
			Config           string
			RepoTags, Layers []string
		}
		r.json(single["manifest.json"].content, &docker)
		path := func(d descriptor) string { return "blobs/" + strings.Replace(d.Digest, ":", "/", 1) }
		if len(docker) != 1 || docker[0].Config != path(m.Config) || !slices.Equal(docker[0].RepoTags, []string{image + ":" + number}) ||
			len(m.Layers) != 1 || !slices.Equal(docker[0].Layers, []string{path(m.Layers[0])}) {
			r.t.Errorf("manifest.json for %s: %s", arch, single["manifest.json"].content)
		}
		r.blob(single, m.Config)
		r.blob(single, m.Layers[0])
	}
}

// image looks at the image of an architecture.
func (r release) image(arch string, files map[string]entry, d descriptor) {
	r.t.Helper()
	var m manifest
	r.json(r.blob(files, d), &m)
	r.labels("manifest for "+arch, m.Annotations)
	var config struct {
		OS, Architecture, Created string
		Config                    struct {
			Entrypoint, Cmd, Env []string
			User                 string
			Labels               map[string]string
		}
	}
	r.json(r.blob(files, m.Config), &config)
	if config.OS != "linux" || config.Architecture != arch || !slices.Equal(config.Config.Entrypoint, []string{"/egressbpf"}) ||
		config.Config.Cmd != nil || config.Config.User != "0:0" || config.Created != config.Config.Labels["org.opencontainers.image.created"] {
		r.t.Errorf("config of the image for %s: %+v", arch, config)
	}
	r.labels("config for "+arch, config.Config.Labels)
	if len(m.Layers) != 1 {
		r.t.Fatalf("the image for %s has %d layers", arch, len(m.Layers))
	}
	layer, err := gzip.NewReader(bytes.NewReader(r.blob(files, m.Layers[0])))
	if err != nil {
		r.t.Fatal(err)
	}
	content := untar(r.t, layer)
	if got, want := slices.Sorted(maps.Keys(content)), []string{"LICENSE", "egressbpf", "third-party"}; !slices.Equal(got, want) {
		r.t.Errorf("the image for %s has %q, want %q", arch, got, want)
	}
	if content["egressbpf"].mode != 0o755 || sum(content["egressbpf"].content) != sum(r.binary(arch)) {
		r.t.Errorf("the image for %s has a binary of its own", arch)
	}
}

func (r release) labels(where string, labels map[string]string) {
	r.t.Helper()
	for name, want := range map[string]string{
		"title":       "egressbpf",
		"description": "Keeps containers from cloud metadata services and from sending spam",
		"source":      "https://github.com/egressbpf/egressbpf",
		"version":     number,
		"revision":    r.commit,
		"licenses":    "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)",
	} {
		if got := labels["org.opencontainers.image."+name]; got != want {
			r.t.Errorf("%s: label %s is %q, want %q", where, name, got, want)
		}
	}
	if labels["org.opencontainers.image.created"] == "" {
		r.t.Errorf("%s: no label created", where)
	}
}

// testSBOM compares the SBOM with what Go says of the binaries.
func (r release) testSBOM() {
	var bom struct {
		BOMFormat, SpecVersion, SerialNumber string
		Metadata                             struct {
			Component struct{ Name, Version string }
		}
		Components []struct {
			Name, Version, PURL string
			Licenses            []any
			Evidence            struct{ Licenses []any }
		}
	}
	r.json(r.read("egressbpf-"+number+".cdx.json"), &bom)
	if bom.BOMFormat != "CycloneDX" || bom.Metadata.Component.Name != "github.com/egressbpf/egressbpf" || bom.Metadata.Component.Version != version {
		r.t.Errorf("SBOM: %s %s of %+v", bom.BOMFormat, bom.SpecVersion, bom.Metadata.Component)
	}
	listed := map[string]string{}
	for _, c := range bom.Components {
		listed[c.Name] = c.Version
		if len(c.Licenses)+len(c.Evidence.Licenses) == 0 {
			r.t.Errorf("SBOM: %s has no licence", c.Name)
		}
		if !strings.HasPrefix(c.PURL, "pkg:golang/") {
			r.t.Errorf("SBOM: %s is %q", c.Name, c.PURL)
		}
	}
	for arch := range machines {
		info, err := buildinfo.Read(bytes.NewReader(r.binary(arch)))
		if err != nil {
			r.t.Fatal(err)
		}
		linked := map[string]string{"std": info.GoVersion}
		for _, dep := range info.Deps {
			linked[dep.Path] = dep.Version
		}
		for name := range union(linked, listed) {
			if linked[name] != listed[name] {
				r.t.Errorf("SBOM: %s %q, and the binary for %s has %q", name, listed[name], arch, linked[name])
			}
		}
	}
}

type statement struct {
	Type          string `json:"_type"`
	PredicateType string
	Subject       []struct {
		Name   string
		Digest map[string]string
	}
	Predicate struct {
		BuildDefinition struct {
			BuildType            string
			ExternalParameters   map[string]string
			ResolvedDependencies []struct {
				URI    string
				Digest map[string]string
			}
		}
		RunDetails struct{ Builder struct{ ID string } }
	}
}

func (r release) statement() (s statement) {
	r.t.Helper()
	r.json(r.read("egressbpf-"+number+".provenance.json"), &s)
	return s
}

// imageDigest is what the provenance says of the image.
func (r release) imageDigest() string {
	for _, subject := range r.statement().Subject {
		if subject.Name == image {
			return subject.Digest["sha256"]
		}
	}
	return ""
}

func (r release) testProvenance() {
	s := r.statement()
	if s.Type != "https://in-toto.io/Statement/v1" || s.PredicateType != "https://slsa.dev/provenance/v1" {
		r.t.Errorf("provenance: a %s of a %s", s.Type, s.PredicateType)
	}
	want := r.listed()
	want[image] = r.imageDigest()
	got := map[string]string{}
	for _, subject := range s.Subject {
		got[subject.Name] = subject.Digest["sha256"]
	}
	if !maps.Equal(got, want) || len(s.Subject) != len(want) {
		r.t.Errorf("the subjects of the provenance are\n%v, want\n%v", got, want)
	}
	definition := s.Predicate.BuildDefinition
	if definition.BuildType == "" || s.Predicate.RunDetails.Builder.ID == "" || definition.ExternalParameters["version"] != version {
		r.t.Errorf("provenance: %+v", s.Predicate)
	}
	if len(definition.ResolvedDependencies) == 0 || definition.ResolvedDependencies[0].Digest["gitCommit"] != r.commit {
		r.t.Errorf("provenance: built from %+v, want commit %s", definition.ResolvedDependencies, r.commit)
	}
}

func (r release) testNotes() {
	notes := string(r.read("notes.md"))
	for _, want := range []string{"### Added", "@sha256:" + r.imageDigest()} {
		if !strings.Contains(notes, want) {
			r.t.Errorf("the notes do not have %q", want)
		}
	}
	for _, not := range []string{"](docs/", "## Unreleased"} {
		if strings.Contains(notes, not) {
			r.t.Errorf("the notes have %q", not)
		}
	}
}
