package loader

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// document describes the policy that the programs were made from. It is in a map that is
// bound to the egress program, so that status cannot show anything else than what the
// kernel runs.
type document struct {
	Version string        `json:"version"`
	Cgroup  string        `json:"cgroup"`
	Policy  policy.Policy `json:"policy"`
	// Devices are the devices that the host side judges besides Docker's.
	Devices []policy.Device `json:"devices,omitempty"`
	// Network is the number of the network namespace in which the host side judges
	// packets.
	Network uint64 `json:"network,omitempty"`
	// Attach is the number of the attach that loaded the program; 0 if its version
	// wrote none.
	Attach uint64 `json:"attach,omitempty"`
	// Found is nil until the attach is done.
	Found *found `json:"found,omitempty"`
}

// documentMap is the name of the map that holds a document.
const documentMap = "policy"

// documentSpare is how many bytes a document may grow by.
const documentSpare = 8 << 10

// newMap creates a map that holds the document. The caller closes it.
func (d document) newMap() (*ebpf.Map, error) {
	text, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name:       documentMap,
		Type:       ebpf.Array,
		KeySize:    4,
		ValueSize:  uint32(len(text) + documentSpare),
		MaxEntries: 1,
		Contents:   []ebpf.MapKV{{Key: uint32(0), Value: padded(text, len(text)+documentSpare)}},
	})
	if err != nil {
		return nil, fmt.Errorf("create map %s: %w", documentMap, err)
	}
	if err := maps.CheckName(m, documentMap); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// bind binds the document to a program.
func (d document) bind(prog *ebpf.Program) error {
	m, err := d.newMap()
	if err != nil {
		return err
	}
	defer m.Close()
	return prog.BindMap(m)
}

// write replaces the document in the map, and fills the map up with spaces.
func (d document) write(m *ebpf.Map) error {
	text, err := json.Marshal(d)
	if err != nil {
		return err
	}
	if len(text) > int(m.ValueSize()) {
		return fmt.Errorf("document of %d bytes does not fit into %d", len(text), m.ValueSize())
	}
	return m.Put(uint32(0), padded(text, int(m.ValueSize())))
}

func padded(text []byte, size int) []byte {
	return append(text, strings.Repeat(" ", size-len(text))...)
}

// readDocument returns the document of a program, and when the program was loaded. The
// document is nil if the program has none.
func readDocument(id ebpf.ProgramID) (*document, time.Time, error) {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("open program %d: %w", id, err)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return nil, time.Time{}, err
	}
	var since time.Time
	if age, ok := info.LoadTime(); ok {
		since = bootTime().Add(age)
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		doc, err := readDocumentMap(id)
		if doc != nil || err != nil {
			return doc, since, err
		}
	}
	return nil, since, nil
}

// loadTime returns when a program was loaded, in nanoseconds since boot.
func loadTime(id ebpf.ProgramID) (time.Duration, error) {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return 0, err
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return 0, err
	}
	age, ok := info.LoadTime()
	if !ok {
		return 0, ebpf.ErrNotSupported
	}
	return age, nil
}

func readDocumentMap(id ebpf.MapID) (*document, error) {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return nil, fmt.Errorf("open map %d: %w", id, err)
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil || info.Name != documentMap {
		return nil, err
	}
	var text []byte
	if err := m.Lookup(uint32(0), &text); err != nil {
		return nil, fmt.Errorf("read map %s: %w", documentMap, err)
	}
	doc := new(document)
	if err := json.Unmarshal(text, doc); err != nil {
		return nil, fmt.Errorf("%w: policy: %w", ErrOtherVersion, err)
	}
	return doc, nil
}

// bootTime is the time from which the kernel counts load times.
func bootTime() time.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(ts.Nano()))
}
