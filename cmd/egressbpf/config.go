package main

import (
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// configOptions are the flags that say what is to be in force.
type configOptions struct {
	cgroups []string
	config  string
	policy  policyFlags
}

func (o *configOptions) register(flags *pflag.FlagSet) {
	flags.StringArrayVar(&o.cgroups, "cgroup", nil, "policed cgroup, by its directory; may be repeated (default: what is policed already, or the root)")
	flags.StringVar(&o.config, "config", o.config, "YAML file with the policy")
	o.policy.register(flags)
}

// read returns what the file and the flags say.
func (o *configOptions) read(flags *pflag.FlagSet) (policy.Config, error) {
	config := policy.Config{Policy: policy.Default()}
	if o.config != "" {
		text, err := os.ReadFile(o.config)
		if err != nil {
			return config, fmt.Errorf("--config: %w", err)
		}
		if config, err = policy.ParseConfig(o.config, text); err != nil {
			return config, err
		}
	}
	if flags.Changed("cgroup") {
		config.Cgroups = o.cgroups
	}
	if err := o.policy.apply(flags, &config.Policy); err != nil {
		return config, err
	}
	return config, config.Policy.Validate()
}
