package main

import (
	"encoding/json"
	"io"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// These are the parts of an in-toto Statement v1 with a SLSA provenance v1 predicate that a
// release has. See https://slsa.dev/spec/v1.0/provenance.
type (
	statement struct {
		Type          string     `json:"_type"`
		Subject       []resource `json:"subject"`
		PredicateType string     `json:"predicateType"`
		Predicate     predicate  `json:"predicate"`
	}
	resource struct {
		Name        string            `json:"name,omitempty"`
		URI         string            `json:"uri,omitempty"`
		Digest      map[string]string `json:"digest,omitempty"`
		Annotations map[string]any    `json:"annotations,omitempty"`
	}
	predicate struct {
		BuildDefinition definition `json:"buildDefinition"`
		RunDetails      details    `json:"runDetails"`
	}
	definition struct {
		BuildType            string         `json:"buildType"`
		ExternalParameters   map[string]any `json:"externalParameters"`
		InternalParameters   map[string]any `json:"internalParameters"`
		ResolvedDependencies []resource     `json:"resolvedDependencies"`
	}
	details struct {
		Builder struct {
			ID string `json:"id"`
		} `json:"builder"`
	}
)

// provenance writes what a release was built from. It is not signed, and says nothing about who
// built it or when, so that whoever builds again gets the same bytes.
func (b *build) provenance(sums map[string]string, image v1.Hash, to string) error {
	s := statement{Type: "https://in-toto.io/Statement/v1", PredicateType: "https://slsa.dev/provenance/v1"}
	for _, name := range slices.Sorted(maps.Keys(sums)) {
		s.Subject = append(s.Subject, resource{Name: name, Digest: map[string]string{"sha256": sums[name]}})
	}
	s.Subject = append(s.Subject, resource{Name: repository, Digest: map[string]string{image.Algorithm: image.Hex}})

	from := resource{URI: "git+" + source, Digest: map[string]string{"gitCommit": b.commit}}
	parameters := map[string]any{"repository": source, "version": b.version}
	if tags, err := git("tag", "--points-at", "HEAD"); err != nil {
		return err
	} else if slices.Contains(strings.Fields(tags), b.version) {
		from.URI += "@refs/tags/" + b.version
		parameters["ref"] = "refs/tags/" + b.version
	}
	if b.modified {
		from.Digest, from.Annotations = nil, map[string]any{"changedSince": b.commit}
	}
	settings := map[string]any{}
	for _, v := range environment(os.Environ(), b.epoch()) {
		if name, value, _ := strings.Cut(v, "="); slices.Contains([]string{"SOURCE_DATE_EPOCH", "CGO_ENABLED", "GOAMD64", "GOARM64", "GOTOOLCHAIN"}, name) {
			settings[name] = value
		}
	}
	s.Predicate.BuildDefinition = definition{
		BuildType:          source + "/blob/main/docs/releasing.md#the-statement",
		ExternalParameters: parameters,
		InternalParameters: map[string]any{"environment": settings},
		ResolvedDependencies: []resource{
			from,
			{Name: "go", URI: "pkg:generic/go@" + strings.TrimPrefix(runtime.Version(), "go")},
		},
	}
	s.Predicate.RunDetails.Builder.ID = source + "/blob/main/docs/releasing.md#make-release"
	return writeFile(to, func(w io.Writer) error {
		out := json.NewEncoder(w)
		out.SetEscapeHTML(false)
		out.SetIndent("", "  ")
		return out.Encode(s)
	})
}
