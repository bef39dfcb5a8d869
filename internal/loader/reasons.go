package loader

import (
	"fmt"
	"strings"
)

// tryStep begins the name of a step in which an attach finds out whether the kernel
// can have a defence. It goes on where that fails, with what an earlier attach has
// put in force, if there is any.
const tryStep = "try "

// found is what an attach has found out about the kernel. It is kept with the programs: to
// find it out again, Status would have to load and attach what the kernel has refused.
type found struct {
	// Missing says why the attach did without hooks and defences, by their names.
	Missing map[string]string `json:"missing,omitempty"`
	// Ingress is whether the host side is that of devices (ingress.go).
	Ingress bool `json:"ingress,omitempty"`
	// Tunnels is whether the kernel tells where the host's tunnels end.
	Tunnels bool `json:"tunnels,omitempty"`

	// version is that of an attach that kept no reasons, since it is another one's.
	version string
}

// longestReason keeps all reasons within documentSpare.
const longestReason = 500

// note keeps why there is no hook or defence; nothing if err is nil.
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

// interrupted is why something is missing that no attach has missed.
const interrupted = "it was detached or unpinned, its cgroup was removed, or an attach was interrupted; attach again"

// why returns why the last attach did without a hook or a defence; interrupted if it has
// kept no reason.
func (f *found) why(name string) string {
	switch {
	case f == nil:
		return interrupted
	case f.Missing[name] != "":
		return f.Missing[name]
	case f.version != "":
		return fmt.Sprintf("version %s has attached without it; attach again", f.version)
	}
	return interrupted
}

// foundBy returns what the attach has found whose programs police these cgroups; nil if
// none has come so far.
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

// cannot is why the kernel cannot have something that the filter works without.
type cannot struct{ error }

func (c cannot) Unwrap() error { return c.error }
