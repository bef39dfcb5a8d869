// Package kubernetes tests the Helm chart and the manifests in dist/kubernetes, without a cluster. Helm
// and what compares objects with schemas take minutes to build, so tests that need them have the build
// tag helm.
package kubernetes

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/egressbpf/egressbpf/internal/policy"
)

const (
	repository = "../../.."
	chart      = repository + "/dist/kubernetes/egressbpf"
	manifests  = repository + "/dist/kubernetes/egressbpf.yaml"
)

// digest returns that of the chart's files.
func digest(t *testing.T) string {
	t.Helper()
	sum := sha256.New()
	err := filepath.WalkDir(chart, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(chart, path)
		if err != nil {
			return err
		}
		of := sha256.Sum256(text)
		_, err = io.WriteString(sum, rel+"\x00"+hex.EncodeToString(of[:])+"\n")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return "sha256:" + hex.EncodeToString(sum.Sum(nil))
}

// TestCommitted looks at the committed manifests: they are made from this chart, and egressbpf's own
// parser reads their config.yaml.
func TestCommitted(t *testing.T) {
	text, err := os.ReadFile(manifests)
	if err != nil {
		t.Fatal(err)
	}
	if want := "digest: " + digest(t) + "\n"; !strings.Contains(string(text), want) {
		t.Errorf("%s is not made from this chart, whose %sRun `make manifests`", manifests, want)
	}
	config, ok := checkConfig(t, parse(t, string(text)))
	if !ok || len(config.Containers) != 1 || config.Containers[0].Namespace != "kube-system" || config.Containers[0].Metadata != policy.Allowed {
		t.Errorf("the rules are %+v", config.Containers)
	}
}

// object is an object of Kubernetes.
type object map[string]any

// at returns what is below keys; nil if nothing is.
func (o object) at(keys ...string) any {
	var v any = map[string]any(o)
	for _, key := range keys {
		m, _ := v.(map[string]any)
		v = m[key]
	}
	return v
}

func (o object) text(keys ...string) string {
	s, _ := o.at(keys...).(string)
	return s
}

// parse returns the objects of a rendering by their kinds, each of which it has once.
func parse(t *testing.T, text string) map[string]object {
	t.Helper()
	objects := map[string]object{}
	for in := yaml.NewDecoder(strings.NewReader(text)); ; {
		var o map[string]any
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return objects
		} else if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if o == nil {
			continue
		}
		kind := object(o).text("kind")
		if objects[kind] != nil {
			t.Errorf("two objects of kind %s", kind)
		}
		objects[kind] = o
	}
}

// checkConfig has the parser of egressbpf read config.yaml.
func checkConfig(t *testing.T, objects map[string]object) (config policy.Config, ok bool) {
	t.Helper()
	text := objects["ConfigMap"].text("data", "config.yaml")
	if text == "" {
		text = objects["Secret"].text("stringData", "config.yaml")
	}
	if text == "" {
		return config, false
	}
	config, err := policy.ParseConfig("config.yaml", []byte(text))
	if err != nil {
		t.Errorf("%v\n%s", err, text)
	}
	return config, err == nil
}
