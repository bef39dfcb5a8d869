package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/google/uuid"
)

// sbom writes a list of all that is linked into the binaries: all architectures link the same
// modules.
func (b *build) sbom(to string) error {
	b.progress("SBOM")
	tool, err := b.output("go", "tool", "-modfile=tools/go.mod", "-n", "cyclonedx-gomod")
	if err != nil {
		return err
	}
	raw := to + ".raw"
	defer os.Remove(raw)
	if _, err := b.output(strings.TrimSpace(tool), "app", "-json", "-licenses", "-std", "-short-purls", "-noserial", "-notimestamp",
		"-main", "cmd/egressbpf", "-output", raw, "."); err != nil {
		return err
	}
	in, err := os.Open(raw)
	if err != nil {
		return err
	}
	defer in.Close()
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(in, cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		return fmt.Errorf("SBOM: %w", err)
	}
	// The hashes of the tool depend on where it was built.
	for i := range *bom.Metadata.Tools.Tools { //nolint:staticcheck // what this tool writes
		(*bom.Metadata.Tools.Tools)[i].Hashes = nil //nolint:staticcheck
	}
	bom.Metadata.Timestamp = b.time.Format("2006-01-02T15:04:05Z")
	bom.SerialNumber = uuid.NewSHA1(uuid.NameSpaceURL, []byte(source+"/releases/"+b.version+"/"+b.revision())).URN()

	egressbpf := bom.Metadata.Component
	ref := egressbpf.BOMRef
	egressbpf.Version = b.version
	egressbpf.PackageURL = "pkg:golang/github.com/egressbpf/egressbpf@" + b.version + "#cmd/egressbpf"
	egressbpf.BOMRef = egressbpf.PackageURL
	egressbpf.Licenses = &cdx.Licenses{{Expression: licenses}}
	egressbpf.Evidence = nil // it sees the Go part alone
	for i, d := range *bom.Dependencies {
		if d.Ref == ref {
			(*bom.Dependencies)[i].Ref = egressbpf.BOMRef
		}
	}
	if egressbpf.Properties != nil {
		*egressbpf.Properties = slices.DeleteFunc(*egressbpf.Properties, func(p cdx.Property) bool {
			return p.Name == "cdx:gomod:build:env:GOARCH"
		})
	}
	for i := range *bom.Components {
		if c := &(*bom.Components)[i]; c.Name == "std" {
			c.Licenses = &cdx.Licenses{{License: &cdx.License{ID: "BSD-3-Clause"}}} // not in the module cache
		}
	}
	return writeFile(to, func(w io.Writer) error {
		return cdx.NewBOMEncoder(w, cdx.BOMFileFormatJSON).SetPretty(true).SetEscapeHTML(false).EncodeVersion(&bom, cdx.SpecVersion1_6)
	})
}
