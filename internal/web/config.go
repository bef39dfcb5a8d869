package web

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	toolkit "github.com/prometheus/exporter-toolkit/web"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
)

// settings is a web config file with everything in it that it refers to, since the process that
// serves cannot open files.
type settings struct {
	text []byte
	// tls is whether connections are encrypted, and known whether who asks has to prove who
	// it is.
	tls, known bool
}

// files are the keys of tls_server_config that name files, and the keys that take their text.
var files = map[string]string{"cert_file": "cert", "key_file": "key", "client_ca_file": "client_ca"}

// readSettings reads and checks a web config file; path is empty if there is none.
func readSettings(path string) (s settings, err error) {
	if path == "" {
		return s, nil
	}
	wrong := func(err error) error { return UsageError{fmt.Errorf("web config file %s: %w", path, err)} }
	if err := toolkit.Validate(path); err != nil {
		return s, wrong(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return s, wrong(err)
	}
	var config map[string]any
	if err := yaml.Unmarshal(text, &config); err != nil {
		return s, wrong(err)
	}
	tls, _ := config["tls_server_config"].(map[string]any)
	for key, of := range files {
		name, _ := tls[key].(string)
		if name == "" {
			continue
		}
		if !filepath.IsAbs(name) {
			name = filepath.Join(filepath.Dir(path), name)
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return s, wrong(err)
		}
		delete(tls, key)
		tls[of] = string(text)
	}
	if s.text, err = yaml.Marshal(config); err != nil {
		return s, wrong(err)
	}
	// What is read now may be newer than what was checked.
	file, err := s.open()
	if err != nil {
		return s, err
	}
	defer file.Close()
	if err := toolkit.Validate(fmt.Sprintf("/proc/self/fd/%d", file.Fd())); err != nil {
		return s, wrong(err)
	}
	var checked toolkit.Config
	if err := yaml.Unmarshal(s.text, &checked); err != nil {
		return s, wrong(err)
	}
	// Some keys of tls_server_config turn nothing on; and of client_auth_type, only one value
	// keeps out who has no certificate, or one that nobody has signed.
	s.tls = checked.TLSConfig.IsEnabled()
	s.known = len(checked.Users) > 0 || checked.TLSConfig.ClientAuth == "RequireAndVerifyClientCert"
	return s, nil
}

// open returns the settings as a file that nobody can change.
func (s settings) open() (*os.File, error) {
	fd, err := unix.MemfdCreate("web-config", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("web config file: %w", err)
	}
	file := os.NewFile(uintptr(fd), "web-config")
	if _, err := file.Write(s.text); err != nil {
		file.Close()
		return nil, err
	}
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		file.Close()
		return nil, fmt.Errorf("web config file: %w", err)
	}
	return file, nil
}

func (s settings) equal(other settings) bool { return bytes.Equal(s.text, other.text) }

// missing says what keeps others from reading what is served is missing; empty if nothing.
func (s settings) missing() string {
	switch {
	case !s.tls && !s.known:
		return "TLS and no authentication"
	case !s.tls:
		return "TLS"
	case !s.known:
		return "authentication"
	}
	return ""
}
