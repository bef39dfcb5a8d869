package main

import (
	"slices"
	"strings"
	"testing"
)

const changelog = `# Changelog

## Unreleased

### Added
- Something new. See [docs/events.md](docs/events.md).

## 1.2.0 - 2026-12-01

Of 1.2.0.

## [v1.1.0] - 2026-11-01

Of 1.1.0, see [elsewhere](https://example.com/).

## 1.0.0 - 2026-10-01
`

func TestNotes(t *testing.T) {
	for _, c := range []struct{ version, want string }{
		{"v1.2.0", "Of 1.2.0."},
		{"v1.1.0", "Of 1.1.0, see [elsewhere](https://example.com/)."},
		{"v1.3.0-rc.1", "### Added\n- Something new. See [docs/events.md](" + source + "/blob/v1.3.0-rc.1/docs/events.md)."},
	} {
		if got, err := releaseNotes(changelog, c.version); err != nil || got != c.want {
			t.Errorf("%s: %v, %q, want %q", c.version, err, got, c.want)
		}
	}
	for version, text := range map[string]string{
		"v1.3.0":      changelog,                          // no section
		"v1.0.0":      changelog,                          // an empty one
		"v1.2.0":      changelog + "\n## 1.2.0\nTwice.",   // two
		"v1.1.0":      changelog + "\n## 1.1.0 (later)",   // a heading that cannot be read
		"v1.3.0-rc.1": "# Changelog\n\n## Unreleased\n\n", // nothing yet
	} {
		if got, err := releaseNotes(text, version); err == nil {
			t.Errorf("%s: got %q, want an error", version, got)
		}
	}
}

func TestReleaseVersion(t *testing.T) {
	for _, good := range []string{"v1.2.3", "v0.0.1", "v1.2.3-rc.1", "v10.20.30-alpha"} {
		if got, err := releaseVersion(good); err != nil || got != good {
			t.Errorf("%s: %v, %q", good, err, got)
		}
	}
	for _, bad := range []string{"1.2.3", "v1.2", "v01.2.3", "v1.2.3+build", "v1.2.3-", "v1.2.3-a b", "v1.2.3;id", "latest"} {
		if got, err := releaseVersion(bad); err == nil {
			t.Errorf("%s: got %q, want an error", bad, got)
		}
	}
}

// What whoever builds has set does not reach the build.
func TestEnvironment(t *testing.T) {
	got := environment([]string{"PATH=/bin", "GOFLAGS=-race", "GOAMD64=v3", "GOPROXY=off", "GODEBUG=x=1", "MAKEFLAGS=w", "CGO_ENABLED=1"}, "7")
	last := map[string]string{}
	for _, v := range got {
		name, value, _ := strings.Cut(v, "=")
		last[name] = value
	}
	for name, want := range map[string]string{
		"PATH": "/bin", "GOPROXY": "off", "GOFLAGS": "-buildvcs=true -trimpath", "GOAMD64": "v1", "CGO_ENABLED": "0", "SOURCE_DATE_EPOCH": "7",
	} {
		if last[name] != want {
			t.Errorf("%s=%s, want %s", name, last[name], want)
		}
	}
	for _, v := range []string{"GODEBUG=x=1", "MAKEFLAGS=w", "GOFLAGS=-race"} {
		if slices.Contains(got, v) {
			t.Errorf("%s is kept", v)
		}
	}
}
