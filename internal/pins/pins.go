// Package pins knows what is pinned for the filter, and changes it.
//
// Below the pin path:
//
//	containers stateless totals the state, kept from version to version
//	retired
//	tickets admitted permitted mails devices tunnels
//	                            what is on its way between hooks; created anew if a
//	                            version changes its layout
//	readers buffers tellings    events: who reads them, what was told of each container, and
//	callers seen                whose processes they are; what mode audit has let through
//	udp_tunnels                 a file that lists the UDP ports of the host's tunnels
//	recognise keep release      the links that follow containers as they come and go
//	host_*                      the links of the host side
//	cgroup-<id>/<hook>          the links of a policed cgroup
//	service                     a directory that a service keeps locked while it runs
//
// The policy is not pinned: it is loaded with the programs and goes with them.
//
// A link that cannot be updated is replaced by a new link, which is pinned with the suffix
// -next until it takes the place of the old one. A kept map that is replaced stays pinned
// with the suffix -before until its counts are carried over, and so do the links that follow
// containers in it; -swap is that of a map while it changes places with the one before. Every
// change of an attach goes through a [Change], which undoes it after an error.
package pins

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
)

// ErrForeignPins means that the pins at the pin path are not egressbpf's.
var ErrForeignPins = errors.New("it holds pins, but none that egressbpf has made")

// Path is the directory below which everything is pinned.
type Path string

// At returns the Path that a user has named, independent of the working directory.
func At(path string) Path {
	abs, err := filepath.Abs(path)
	if err != nil {
		// The working directory is gone: nothing is there.
		abs = filepath.Clean(path)
	}
	return Path(abs)
}

// Pin returns the pin of something that belongs to the whole host.
func (p Path) Pin(name string) string { return filepath.Join(string(p), name) }

const (
	cgroupPrefix = "cgroup-"
	nextSuffix   = "-next"
)

// Cgroup returns the directory with the links of a policed cgroup.
func (p Path) Cgroup(id uint64) string { return p.Pin(fmt.Sprint(cgroupPrefix, id)) }

// Families is the link in the directory of a policed cgroup that refuses sockets. The
// kernel decides which type of link it is.
const Families = "socket_create"

// Tunnels is a file that lists the UDP ports of the host's tunnels (bpf/tunnels.bpf.c).
const Tunnels = "udp_tunnels"

// The links of the host side.
const (
	HostForward4 = "host_forward4"
	HostForward6 = "host_forward6"
	HostDeliver4 = "host_deliver4"
	HostDeliver6 = "host_deliver6"
	HostAnswer6  = "host_answer6"
)

// cgroupLinks are the links in the directory of each policed cgroup. They are updated in
// place.
var cgroupLinks = []string{
	bpf.EgressProgEgress, bpf.EgressProgConnect4, bpf.EgressProgConnect6, bpf.EgressProgSendmsg4, bpf.EgressProgSendmsg6,
}

// hostLinks are the links at the pin path itself. They are replaced by new links.
var hostLinks = []string{
	bpf.CgroupsProgRecognise, bpf.CgroupsProgKeep, bpf.CgroupsProgRelease,
	HostForward4, HostForward6, HostDeliver4, HostDeliver6, HostAnswer6,
	Tunnels,
}

// formerMaps are maps that earlier versions have pinned and that this one does not use.
var formerMaps = []string{"overflow"}

// lasting are the pins that every version knows and can take over, besides those of policed
// cgroups.
var lasting = []string{
	bpf.EgressMapContainers, bpf.EgressMapTotals, bpf.EgressMapRetired,
	bpf.CgroupsProgRecognise, bpf.CgroupsProgKeep, bpf.CgroupsProgRelease,
	HostForward4, HostForward6, HostDeliver4, HostDeliver6,
}

// IsNext says whether a name is that of a link that is about to replace the link with the
// other name.
func IsNext(name, of string) bool { return name == of+nextSuffix }

// Lasting says whether every version knows the pin with this name at the pin path.
func Lasting(name string) bool {
	return slices.Contains(lasting, name) || strings.HasPrefix(name, cgroupPrefix)
}

// known says whether this version may have made the pin at rel, below the pin path.
func known(rel string) bool {
	dir, name := filepath.Split(rel)
	if digits, ok := strings.CutPrefix(dir, cgroupPrefix); ok {
		_, err := strconv.ParseUint(strings.TrimSuffix(digits, "/"), 10, 64)
		return err == nil && (name == Families || IsNext(name, Families) || slices.Contains(cgroupLinks, name))
	}
	return slices.Contains(formerMaps, rel) || slices.ContainsFunc(hostLinks, func(name string) bool {
		return rel == name || rel == name+nextSuffix || slices.Contains(keptPins(name), rel)
	})
}

// All returns all pins.
func (p Path) All() (pins []string, err error) {
	err = filepath.WalkDir(string(p), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !d.IsDir() {
			pins = append(pins, path)
		}
		return err
	})
	return pins, err
}

// Stamp changes whenever something is pinned at the pin path itself, or a pin there is renamed
// or removed. So maps of the state that were opened since are still the same if Stamp is.
func (p Path) Stamp() (string, error) {
	var b strings.Builder
	var dir unix.Stat_t
	if err := unix.Stat(string(p), &dir); err != nil {
		return "", &fs.PathError{Op: "stat", Path: string(p), Err: err}
	}
	fmt.Fprintln(&b, dir.Dev, dir.Ino)
	entries, err := os.ReadDir(string(p))
	if err != nil {
		return "", err
	}
	for _, entry := range entries {
		// A bpf filesystem gives each pin another number.
		var pin unix.Stat_t
		err := unix.Lstat(p.Pin(entry.Name()), &pin)
		fmt.Fprintln(&b, entry.Name(), pin.Ino, err)
	}
	return b.String(), nil
}

// Links returns all pins except those of maps of the state.
func (p Path) Links() ([]string, error) {
	pins, err := p.All()
	return slices.DeleteFunc(pins, OfState), err
}

// Unknown returns the pins that this version does not know.
func (p Path) Unknown() (unknown []string, err error) {
	pins, err := p.Links()
	for _, pin := range pins {
		rel, err := filepath.Rel(string(p), pin)
		if err != nil {
			return nil, err
		}
		if !known(rel) {
			unknown = append(unknown, pin)
		}
	}
	return unknown, err
}

// UnknownLinks returns the unknown pins that may be in force, with a policy of their own:
// all except maps, which another version keeps at the pin path.
func (p Path) UnknownLinks() ([]string, error) {
	unknown, err := p.Unknown()
	return slices.DeleteFunc(unknown, func(pin string) bool { return filepath.Dir(pin) == string(p) && IsMap(pin) }), err
}

// Unpinned returns the names of the maps of the state that are not pinned.
func (p Path) Unpinned() (names []string) {
	for _, name := range maps.StateNames() {
		if _, err := os.Lstat(p.Pin(name)); errors.Is(err, fs.ErrNotExist) {
			names = append(names, name)
		}
	}
	return names
}

// Cgroups returns the ids of the policed cgroups, including those of other versions; none
// if nothing is at the pin path.
func (p Path) Cgroups() (ids []uint64, err error) {
	entries, err := os.ReadDir(string(p))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, entry := range entries {
		digits, ok := strings.CutPrefix(entry.Name(), cgroupPrefix)
		id, err := strconv.ParseUint(digits, 10, 64)
		if ok && err == nil {
			ids = append(ids, id)
		}
	}
	return ids, err
}

// Check returns ErrForeignPins if there are pins and no version of egressbpf has made any
// of them: the directory belongs to another program then.
func (p Path) Check() error {
	pins, err := p.All()
	for {
		if err != nil || len(pins) == 0 {
			return err
		}
		var unknown error
		for _, pin := range pins {
			ours, err := madeByUs(pin)
			if ours {
				return nil
			}
			if maps.Inconclusive(err) && unknown == nil {
				unknown = fmt.Errorf("open %s: %w", pin, err)
			}
		}
		if unknown != nil {
			return unknown
		}
		// A process that detaches meanwhile may have removed the pins before they
		// were looked at.
		var again []string
		if again, err = p.All(); err == nil && slices.Equal(pins, again) {
			return fmt.Errorf("%s: %w: %s", p, ErrForeignPins, pins[0])
		}
		pins = again
	}
}

// Ours says whether the pin path can hold pins of egressbpf, and so something to remove. It
// returns ErrForeignPins as Check does.
func (p Path) Ours() (bool, error) {
	if _, err := os.Stat(string(p)); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	if !p.OnBPFFS() {
		return false, nil
	}
	err := p.Check()
	return err == nil, err
}

// RemoveAll removes everything that is left at the pin path, including pins of other
// versions, and the directory.
func (p Path) RemoveAll() error {
	pins, err := os.ReadDir(string(p))
	if err != nil {
		return err
	}
	for _, pin := range pins {
		if err := os.RemoveAll(p.Pin(pin.Name())); err != nil {
			return err
		}
	}
	return os.Remove(string(p))
}

// RemoveFormer removes the pins of maps that this version does not use any more.
func (p Path) RemoveFormer() error {
	for _, name := range formerMaps {
		if err := Remove(p.Pin(name)); err != nil {
			return err
		}
	}
	return nil
}
