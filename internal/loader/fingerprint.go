package loader

import (
	"fmt"
	"strings"

	"github.com/egressbpf/egressbpf/internal/pins"
)

// Fingerprint changes whenever a part of the filter is attached, replaced, detached or
// unpinned, by anyone. It costs some system calls for each pin.
func (f *Filter) Fingerprint() string {
	var b strings.Builder
	all, err := f.pins.All()
	for _, pin := range all {
		fmt.Fprintln(&b, pin)
		if pins.OfState(pin) {
			continue
		}
		info, err := pins.Info(pin)
		if err != nil {
			fmt.Fprintln(&b, err)
			continue
		}
		fmt.Fprintln(&b, info.ID, info.Program)
		if c := info.Cgroup(); c != nil {
			fmt.Fprintln(&b, c.CgroupId)
		}
	}
	return fmt.Sprint(b.String(), err)
}
