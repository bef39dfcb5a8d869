package loader

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// Detach removes the filter from the named cgroups, given by path, or from all cgroups if
// none is named. When the last policed cgroup goes, state and pin path go too. It is no
// error if a cgroup is not policed. The error can wrap ErrBusy.
func (f *Filter) Detach(ctx context.Context, cgroups []string) (err error) {
	var unwanted []string
	for _, path := range cgroups {
		rel, err := f.root.Rel(path)
		if err != nil {
			return err
		}
		unwanted = append(unwanted, rel)
	}
	change := pins.OneWay(f.fault)
	defer func() { err = change.End(err) }()
	if _, err := os.Stat(string(f.pins)); errors.Is(err, fs.ErrNotExist) {
		// The filters at devices have no pins.
		return f.host.ingress.detach(change)
	} else if err != nil {
		return err
	}
	if ours, err := f.pins.Ours(); !ours {
		return err
	}
	unlock, _, err := f.pins.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	all, err := f.installed()
	if err != nil {
		return err
	}
	defer closeAll(all)
	left := 0
	for _, p := range all {
		if len(cgroups) > 0 && !slices.Contains(unwanted, p.rel) {
			left++
			continue
		}
		// The boundary goes last, as it came first.
		if err := f.families.detach(change, p); err != nil {
			return err
		}
		if err := f.egress.detach(change, p); err != nil {
			return err
		}
	}
	if left == 0 {
		return f.detachHost(change)
	}
	return f.forgetBelow(unwanted)
}

// forgetBelow removes the state of containers below cgroups that are not policed any more.
func (f *Filter) forgetBelow(rels []string) error {
	err := f.withState(func(state *maps.State) error {
		return f.eachContainer(state, func(id uint64, rel string) error {
			if rel != "" && slices.ContainsFunc(rels, func(of string) bool { return cgroup.Within(rel, of) }) {
				return state.Forget(id)
			}
			return nil
		})
	})
	if errors.Is(err, ErrOtherVersion) {
		return nil
	}
	return err
}

// detachHost detaches the layers of the whole host, and removes the state and whatever another
// version has pinned.
func (f *Filter) detachHost(change *pins.Change) error {
	if err := f.host.detach(change); err != nil {
		return err
	}
	if err := f.recognition.detach(change); err != nil {
		return err
	}
	return f.pins.RemoveAll()
}
