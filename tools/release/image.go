package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	source     = "https://github.com/egressbpf/egressbpf"
	repository = "ghcr.io/egressbpf/egressbpf"
	summary    = "Keeps containers from cloud metadata services and from sending spam"
	licenses   = "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)" // the latter for the BPF programs
)

// images writes an image for each architecture that `docker load` reads, and one of all for
// registries. It returns the digest of the latter. Names are PREFIX-ARCH.tar and PREFIX.oci.tar.
func (b *build) images(binaries map[string]string, work, prefix string) (v1.Hash, error) {
	b.progress("images")
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range architectures {
		notices, err := b.thirdParty(arch, work)
		if err != nil {
			return v1.Hash{}, err
		}
		image, err := b.image(binaries[arch], notices, arch)
		if err != nil {
			return v1.Hash{}, fmt.Errorf("image for %s: %w", arch, err)
		}
		platform := v1.Platform{OS: "linux", Architecture: arch}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &platform}})
		if err := b.dockerArchive(image, platform, fmt.Sprintf("%s-%s.tar", prefix, arch)); err != nil {
			return v1.Hash{}, fmt.Errorf("image for %s: %w", arch, err)
		}
	}
	index = mutate.Annotations(index, b.labels()).(v1.ImageIndex)
	err := b.layoutArchive(prefix+".oci.tar", func(to layout.Path) error {
		return to.AppendIndex(index, layout.WithAnnotations(b.names()))
	})
	if err != nil {
		return v1.Hash{}, err
	}
	return index.Digest()
}

// labels are the labels of the images, and the annotations of their manifests: registries show
// the latter.
func (b *build) labels() map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":         "egressbpf",
		"org.opencontainers.image.description":   summary,
		"org.opencontainers.image.source":        source,
		"org.opencontainers.image.url":           source,
		"org.opencontainers.image.documentation": source + "#readme",
		"org.opencontainers.image.vendor":        "egressbpf",
		"org.opencontainers.image.version":       b.number(),
		"org.opencontainers.image.revision":      b.revision(),
		"org.opencontainers.image.licenses":      licenses,
		"org.opencontainers.image.created":       b.time.Format("2006-01-02T15:04:05Z"),
	}
}

// names say in an OCI layout how an image is called: to skopeo and Podman, and to containerd.
func (b *build) names() map[string]string {
	return map[string]string{
		"org.opencontainers.image.ref.name": b.number(),
		"io.containerd.image.name":          repository + ":" + b.number(),
	}
}

// image makes the image of a binary: nothing else is in it but the licences. It runs as root,
// which loading BPF programs needs.
func (b *build) image(binary, notices, arch string) (v1.Image, error) {
	var files bytes.Buffer
	if err := b.tar(&files, []file{
		{name: "LICENSE", from: "LICENSE", mode: 0o644},
		{name: "third-party", from: notices, mode: 0o644},
		{name: "egressbpf", from: binary, mode: 0o755},
	}); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(files.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching, tarball.WithCompressionLevel(gzip.DefaultCompression))
	if err != nil {
		return nil, err
	}
	created := v1.Time{Time: b.time}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		Architecture: arch,
		OS:           "linux",
		Created:      created,
		RootFS:       v1.RootFS{Type: "layers"},
		Config: v1.Config{
			Entrypoint: []string{"/egressbpf"},
			User:       "0:0",
			WorkingDir: "/",
			Env:        []string{"PATH=/"}, // docker exec NAME egressbpf status
			Labels:     b.labels(),
		},
	})
	if err != nil {
		return nil, err
	}
	image, err = mutate.Append(image, mutate.Addendum{
		Layer:     layer,
		MediaType: types.OCILayer,
		History:   v1.History{Created: created, CreatedBy: "make image", Comment: source},
	})
	if err != nil {
		return nil, err
	}
	return mutate.Annotations(image, b.labels()).(v1.Image), nil
}

// dockerArchive writes an image as docker save does: an OCI layout that has Docker's manifest.json
// as well, which Docker's own image store needs.
func (b *build) dockerArchive(image v1.Image, platform v1.Platform, to string) error {
	return b.layoutArchive(to, func(dir layout.Path) error {
		if err := dir.AppendImage(image, layout.WithPlatform(platform), layout.WithAnnotations(b.names())); err != nil {
			return err
		}
		manifest, err := image.Manifest()
		if err != nil {
			return err
		}
		blob := func(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }
		entry := struct {
			Config   string
			RepoTags []string
			Layers   []string
		}{blob(manifest.Config.Digest), []string{repository + ":" + b.number()}, nil}
		for _, layer := range manifest.Layers {
			entry.Layers = append(entry.Layers, blob(layer.Digest))
		}
		text, err := json.Marshal([]any{entry})
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(string(dir), "manifest.json"), text, 0o644)
	})
}

// layoutArchive writes an OCI layout as a tar archive.
func (b *build) layoutArchive(to string, fill func(layout.Path) error) error {
	dir, err := os.MkdirTemp(filepath.Dir(to), "layout-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	if err := fill(path); err != nil {
		return err
	}
	return writeFile(to, func(w io.Writer) error { return b.tarDirectory(w, dir) })
}

// file is a file of an archive.
type file struct {
	name string // in the archive
	from string // on disk
	mode int64
}

// tar writes an archive whose bytes depend on names, modes and contents alone. Directories of
// the files come before them.
func (b *build) tar(w io.Writer, files []file) error {
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.name, b.name) })
	out := tar.NewWriter(w)
	made := map[string]bool{}
	for _, f := range files {
		for at, c := range f.name {
			if c != '/' || made[f.name[:at]] {
				continue
			}
			made[f.name[:at]] = true
			if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: f.name[:at+1], Mode: 0o755, ModTime: b.time}); err != nil {
				return err
			}
		}
		content, err := os.ReadFile(f.from)
		if err != nil {
			return err
		}
		if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: f.mode, Size: int64(len(content)), ModTime: b.time}); err != nil {
			return err
		}
		if _, err := out.Write(content); err != nil {
			return err
		}
	}
	return out.Close()
}

// tarDirectory writes the files of a directory as an archive.
func (b *build) tarDirectory(w io.Writer, dir string) error {
	var files []file
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		files = append(files, file{name: name, from: path, mode: 0o644})
		return err
	})
	if err != nil {
		return err
	}
	return b.tar(w, files)
}

// writeFile makes a file. It is not there unless it is complete.
func writeFile(name string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
