package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// architectures are those of a release, in the order in which they are listed.
var architectures = []string{"amd64", "arm64"}

// build is what a release is made from.
type build struct {
	version  string    // as in the tag: v1.2.3
	commit   string    // 40 hex digits
	modified bool      // the work tree is not that commit
	time     time.Time // of the commit
	env      []string
}

// newBuild looks at the repository in the working directory.
func newBuild(version string) (*build, error) {
	b := &build{version: version}
	var err error
	if b.commit, err = git("rev-parse", "HEAD"); err != nil {
		return nil, err
	}
	changes, err := git("status", "--porcelain")
	if err != nil {
		return nil, err
	}
	b.modified = changes != ""
	seconds, err := git("log", "-1", "--format=%ct")
	if err != nil {
		return nil, err
	}
	unix, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("time of commit %s: %w", b.commit, err)
	}
	b.time = time.Unix(unix, 0).UTC()
	b.env = environment(os.Environ(), b.epoch())
	return b, nil
}

// epoch is the time of the commit, as SOURCE_DATE_EPOCH has it.
func (b *build) epoch() string { return strconv.FormatInt(b.time.Unix(), 10) }

// kept are the settings of Go that say where things come from and go to. All others, set by
// whoever builds, would change the result.
var kept = []string{
	"GOCACHE", "GOMODCACHE", "GOPATH", "GOPROXY", "GONOPROXY", "GOSUMDB", "GONOSUMDB", "GOPRIVATE", "GOINSECURE", "GOAUTH",
	"GOVCS", "GOTMPDIR", "GOMAXPROCS", "GOMEMLIMIT", "GOTELEMETRYDIR",
}

// environment returns the variables for the commands of a build. runtime.Version is that of
// this program, which the Makefile builds with the toolchain of go.mod.
func environment(env []string, seconds string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return strings.HasPrefix(name, "GO") && !slices.Contains(kept, name) ||
			slices.Contains([]string{"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "GNUMAKEFLAGS"}, name)
	})
	return append(env, "SOURCE_DATE_EPOCH="+seconds, "TZ=UTC", "LC_ALL=C.UTF-8",
		"CGO_ENABLED=0", "GOOS=linux", "GOAMD64=v1", "GOARM64=v8.0", "GOWORK=off", "GOEXPERIMENT=", "GOFIPS140=off",
		"GOFLAGS=-buildvcs=true -trimpath", "GOTOOLCHAIN="+runtime.Version())
}

// git returns what a git command prints.
func git(args ...string) (string, error) {
	out, err := (&build{env: os.Environ()}).output("git", args...)
	return strings.TrimSpace(out), err
}

// output returns what a command prints.
func (b *build) output(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = b.env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return string(out), nil
}

// compile builds the command for an architecture.
func (b *build) compile(arch, to string) error {
	b.progress("build for linux/%s", arch)
	with := *b
	with.env = append(slices.Clone(b.env), "GOARCH="+arch)
	_, err := with.output("go", "build",
		"-ldflags", "-s -w -X github.com/egressbpf/egressbpf/internal/loader.version="+b.version, "-o", to, "./cmd/egressbpf")
	return err
}

// compileAll builds the command for each architecture into a directory.
func (b *build) compileAll(dir string) (map[string]string, error) {
	binaries := map[string]string{}
	for _, arch := range architectures {
		binaries[arch] = filepath.Join(dir, "egressbpf-"+arch)
		if err := b.compile(arch, binaries[arch]); err != nil {
			return nil, err
		}
	}
	return binaries, nil
}

// revision is the commit, marked if the work tree is another.
func (b *build) revision() string {
	if b.modified {
		return b.commit + "-dirty"
	}
	return b.commit
}

// number is the version as packages and images spell it: 1.2.3.
func (b *build) number() string { return strings.TrimPrefix(b.version, "v") }

func (b *build) progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}

// release is a version that a release may have. It has no build metadata (+…), which cannot be in
// an image's tag.
var release = regexp.MustCompile(`^v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z]+(\.[0-9A-Za-z]+)*)?$`)

// releaseVersion returns the version to release: the given one, or the tag of the commit.
func releaseVersion(given string) (string, error) {
	if given != "" {
		if !release.MatchString(given) {
			return "", usageError{fmt.Errorf("VERSION=%s: want a version such as v1.2.3 or v1.2.3-rc.1", given)}
		}
		return given, nil
	}
	changes, err := git("status", "--porcelain")
	if err != nil {
		return "", err
	}
	if changes != "" {
		return "", fmt.Errorf("the work tree is not what is committed; commit or remove, or give a version for a trial (make release VERSION=v0.0.0-trial):\n%s", changes)
	}
	tag, err := git("describe", "--exact-match", "--tags", "--match", "v[0-9]*")
	if err != nil {
		return "", fmt.Errorf("the commit has no tag v…; tag it, or give a version for a trial (make release VERSION=v0.0.0-trial): %w", err)
	}
	if !release.MatchString(tag) {
		return "", fmt.Errorf("tag %s: want a version such as v1.2.3 or v1.2.3-rc.1", tag)
	}
	return tag, nil
}
