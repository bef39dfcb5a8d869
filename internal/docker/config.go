package docker

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
)

// ConfigFile is the usual path of the daemon's configuration.
const ConfigFile = "/etc/docker/daemon.json"

// Config is what the daemon's configuration file says. It does not include options on
// dockerd's command line; the daemon refuses to start if an option is in both.
type Config struct {
	// CgroupParent is the parent of containers that name no parent: a path, or a slice
	// of systemd; empty for the driver's own parent.
	CgroupParent string
	// CgroupDriver is cgroupfs or systemd; empty if the daemon chooses.
	CgroupDriver string
	// Hosts are the addresses at which the daemon listens; empty for the usual socket,
	// or if the command line names them.
	Hosts []string
	// DNS are the name servers of containers; empty if containers use the host's.
	DNS []string
}

// ReadConfig reads a configuration file of the daemon, whether or not the daemon runs. A
// missing file counts as an empty one, as it does for the daemon. Errors name the file.
func ReadConfig(path string) (Config, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Config{}, nil
	}
	if err != nil {
		return Config{}, err
	}
	defer f.Close()
	const longest = 1 << 20
	text, err := io.ReadAll(io.LimitReader(f, longest+1))
	if err != nil {
		return Config{}, err
	}
	if len(text) > longest {
		return Config{}, fmt.Errorf("%s: more than %d bytes", path, longest)
	}
	c, err := parseConfig(text)
	if err != nil {
		return Config{}, fmt.Errorf("%s%w", path, err)
	}
	return c, nil
}

// parseConfig returns errors that begin with a colon, followed by the line if it is known.
func parseConfig(text []byte) (Config, error) {
	text = bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))
	if len(bytes.TrimSpace(text)) == 0 {
		return Config{}, nil
	}
	var keys struct {
		CgroupParent string   `json:"cgroup-parent"`
		ExecOpts     []string `json:"exec-opts"`
		Hosts        []string `json:"hosts"`
		DNS          []string `json:"dns"`
	}
	if err := json.Unmarshal(text, &keys); err != nil {
		offset := int64(-1)
		if e := (*json.SyntaxError)(nil); errors.As(err, &e) {
			offset = e.Offset
		} else if e := (*json.UnmarshalTypeError)(nil); errors.As(err, &e) {
			offset = e.Offset
		}
		if offset < 0 || offset > int64(len(text)) {
			return Config{}, fmt.Errorf(": %w", err)
		}
		return Config{}, fmt.Errorf(":%d: %w", 1+bytes.Count(text[:offset], []byte("\n")), err)
	}
	c := Config{CgroupParent: keys.CgroupParent, Hosts: keys.Hosts, DNS: keys.DNS}
	for _, option := range keys.ExecOpts {
		key, value, ok := strings.Cut(option, "=")
		if strings.EqualFold(strings.TrimSpace(key), "native.cgroupdriver") {
			value = strings.TrimSpace(value)
			if !ok || value != "cgroupfs" && value != "systemd" {
				return Config{}, fmt.Errorf(": exec-opts: %q: want native.cgroupdriver=cgroupfs or systemd", option)
			}
			c.CgroupDriver = value
		}
	}
	return c, nil
}
