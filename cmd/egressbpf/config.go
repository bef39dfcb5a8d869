package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/pflag"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// configOptions are the flags that set the configuration.
type configOptions struct {
	cgroups []string
	config  string
	policy  policyFlags
	// exposed is set by read: whether the file has secrets and any user may read it.
	exposed bool
}

func (o *configOptions) register(flags *pflag.FlagSet) {
	flags.StringArrayVar(&o.cgroups, "cgroup", nil, "directory of a cgroup to police; may be repeated (default: those that are policed already, else the root)")
	flags.StringVar(&o.config, "config", o.config, "YAML file with the policy")
	o.policy.register(flags)
}

// maxConfig bounds a config file: tens of thousands of prefixes fit.
const maxConfig = 16 << 20

var errTooLarge = errors.New("too large")

// readAtMost reads all of in, which is called name in errors. The error wraps errTooLarge if
// there are more than most bytes.
func readAtMost(in io.Reader, name string, most int64) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(in, most+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(text)) > most {
		return nil, fmt.Errorf("%s: %w: more than %d bytes", name, errTooLarge, most)
	}
	return text, nil
}

// exposedRemedy is what to do about a file for which exposed is set.
func (o *configOptions) exposedRemedy() string {
	return fmt.Sprintf("every user can read the secrets in %s: run `chmod o-rwx` on it", o.config)
}

// read returns the configuration of the file and the flags.
func (o *configOptions) read(flags *pflag.FlagSet) (policy.Config, error) {
	config := policy.Config{Policy: policy.Default()}
	o.exposed = false
	if o.config != "" {
		f, err := os.Open(o.config)
		if err != nil {
			return config, fmt.Errorf("--config: %w", err)
		}
		defer f.Close()
		text, err := readAtMost(f, o.config, maxConfig)
		if err != nil {
			return config, fmt.Errorf("--config: %w", err)
		}
		if config, err = policy.ParseConfig(o.config, text); err != nil {
			return config, err
		}
		info, err := f.Stat()
		if err != nil {
			return config, fmt.Errorf("--config: %w", err)
		}
		o.exposed = len(config.Notify) > 0 && info.Mode().Perm()&0o004 != 0
	}
	if flags.Changed("cgroup") {
		config.Cgroups = o.cgroups
	}
	if err := o.policy.apply(flags, &config.Policy); err != nil {
		return config, err
	}
	return config, config.Policy.Validate()
}
