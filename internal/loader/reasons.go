package loader

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
)

// found is what an attach has found out about the kernel. It is kept with the programs: to
// find it out again, Status would have to load and attach what the kernel has refused.
type found struct {
	// Missing says why the attach did without hooks and defences, by their names.
	Missing map[string]string `json:"missing,omitempty"`
	// Ingress is whether the host side is that of devices (host_tc.go).
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

// keep adds what was found to the document of a program that is loaded.
func (f *found) keep(prog *ebpf.Program, doc document) error {
	doc.Found = f
	info, err := prog.Info()
	if err != nil {
		return err
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return fmt.Errorf("open map %d: %w", id, err)
		}
		err = doc.write(m)
		m.Close()
		if !errors.Is(err, errNoDocument) {
			return err
		}
	}
	return errNoDocument
}

var errNoDocument = errors.New("no document")

// documentSpare is what a document may grow by, in bytes.
const documentSpare = 8 << 10

// write replaces the document in a map, which is filled up with spaces.
func (d *document) write(m *ebpf.Map) error {
	info, err := m.Info()
	if err != nil {
		return err
	}
	if info.Name != documentMap {
		return errNoDocument
	}
	text, err := json.Marshal(d)
	if err != nil {
		return err
	}
	if len(text) > int(info.ValueSize) {
		return fmt.Errorf("document of %d bytes, in %d", len(text), info.ValueSize)
	}
	return m.Put(uint32(0), padded(text, int(info.ValueSize)))
}

func padded(text []byte, size int) []byte {
	return append(text, strings.Repeat(" ", size-len(text))...)
}
