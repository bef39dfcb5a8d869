package loader

import (
	"fmt"
	"strings"
)

// tryStep is the prefix of a step in which an attach finds out whether the kernel supports
// a defence. If the step fails, the attach goes on, and keeps what an earlier attach has
// put in force.
const tryStep = "try "

// found is what an attach found out about the kernel. It is stored with the programs: to
// find it out again, Status would have to load and attach what the kernel refused.
type found struct {
	// Missing says which hooks and defences the attach left out, and why.
	Missing map[string]string `json:"missing,omitempty"`
	// Ingress is whether the host side uses filters at devices (ingress.go).
	Ingress bool `json:"ingress,omitempty"`
	// Tunnels is whether the kernel lists the ports of the host's tunnels.
	Tunnels bool `json:"tunnels,omitempty"`

	// version is the version of an attach that stored no reasons, if it is not this
	// version.
	version string
}

// longestReason keeps all reasons within documentSpare.
const longestReason = 500

// note notes why a hook or a defence is missing; it does nothing if err is nil.
func (f *found) note(name string, err error) {
	if err == nil {
		return
	}
	reason := strings.ReplaceAll(err.Error(), "\n", "; ")
	if len(reason) > longestReason {
		reason = strings.ToValidUTF8(reason[:longestReason], "") + "…"
	}
	if f.Missing == nil {
		f.Missing = map[string]string{}
	}
	f.Missing[name] = reason
}

// interrupted is the reason for something that is missing although the last attach attached
// it.
const interrupted = "it was detached or unpinned, its cgroup was removed, or an attach was interrupted; attach again"

// why returns why the last attach left out a hook or a defence; interrupted if it stored no
// reason.
func (f *found) why(name string) string {
	switch {
	case f == nil:
		return interrupted
	case f.Missing[name] != "":
		return f.Missing[name]
	case f.version != "":
		return fmt.Sprintf("version %s attached without it; attach again", f.version)
	}
	return interrupted
}

// foundBy returns what the attach found whose programs police these cgroups; nil if no
// attach has come that far.
func foundBy(all []*policed) *found {
	for _, p := range all {
		if p.doc != nil && p.doc.Found != nil {
			return p.doc.Found
		}
		if p.doc != nil && p.doc.Version != Version() {
			return &found{version: p.doc.Version}
		}
	}
	return nil
}

// cannot is the reason why the kernel cannot have something that the filter works without.
type cannot struct{ error }

func (c cannot) Unwrap() error { return c.error }
