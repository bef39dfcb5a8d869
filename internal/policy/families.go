package policy

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Families are the socket families that containers may use: Restrict, AnyFamily, or the
// names of families to add to Restrict, in order and separated by commas.
type Families string

const (
	// Restrict allows unix, inet, inet6, netlink and alg: the packets of such sockets pass
	// the filter, or the sockets send none.
	Restrict Families = "restrict"
	// AnyFamily allows all families.
	AnyFamily Families = "any"
)

// always are the families that Restrict allows, by number (AF_UNIX and so on in
// include/linux/socket.h).
var always = []uint{1, 2, 10, 16, 38}

// families are those that can be allowed in addition, by number.
var families = map[string]uint{
	"ax25": 3, "ipx": 4, "appletalk": 5, "netrom": 6, "x25": 9, "rose": 11, "key": 15, "packet": 17,
	"rds": 21, "pppox": 24, "llc": 26, "ib": 27, "mpls": 28, "can": 29, "tipc": 30, "bluetooth": 31,
	"iucv": 32, "rxrpc": 33, "isdn": 34, "phonet": 35, "ieee802154": 36, "caif": 37, "nfc": 39,
	"vsock": 40, "kcm": 41, "qipcrtr": 42, "smc": 43, "xdp": 44, "mctp": 45,
}

// ParseFamilies reads restrict, any, or names of families separated by commas.
func ParseFamilies(s string) (Families, error) {
	if f := Families(s); f == Restrict || f == AnyFamily {
		return f, nil
	}
	names := strings.Split(s, ",")
	for i, name := range names {
		name = strings.TrimSpace(name)
		if _, ok := families[name]; !ok {
			known := slices.Sorted(maps.Keys(families))
			return "", fmt.Errorf("%q: no such family%s; want restrict, any, or more families to let containers use: %s",
				name, suggest(name, known), strings.Join(known, ", "))
		}
		names[i] = name
	}
	slices.Sort(names)
	return Families(strings.Join(slices.Compact(names), ",")), nil
}

// FamilyNumbers returns the numbers of the families that can be allowed in addition to
// Restrict, in ascending order.
func FamilyNumbers() []uint { return slices.Sorted(maps.Values(families)) }

// FamilyName returns the name of a family, or its number if it has none here.
func FamilyName(number uint) string {
	for name, n := range families {
		if n == number {
			return name
		}
	}
	return strconv.FormatUint(uint64(number), 10)
}

// FamiliesOf returns the Families that allow, in addition to Restrict, the given numbers of
// FamilyNumbers, in any order.
func FamiliesOf(numbers []uint) Families {
	switch len(numbers) {
	case 0:
		return Restrict
	case len(families):
		return AnyFamily
	}
	var names []string
	for name, n := range families {
		if slices.Contains(numbers, n) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return Families(strings.Join(names, ","))
}

// Allows says whether containers may open sockets of a family, given by its name.
func (f Families) Allows(name string) bool { return f.Mask()>>families[name]&1 != 0 }

// UnmarshalText is [ParseFamilies].
func (f *Families) UnmarshalText(text []byte) (err error) {
	*f, err = ParseFamilies(string(text))
	return err
}

// Mask returns the families as bits: 1 << number.
func (f Families) Mask() uint64 {
	if f == AnyFamily {
		return math.MaxUint64
	}
	var mask uint64
	for _, n := range always {
		mask |= 1 << n
	}
	if f != Restrict {
		for name := range strings.SplitSeq(string(f), ",") {
			mask |= 1 << families[name]
		}
	}
	return mask
}

// Switch turns a defence on or off.
type Switch string

const (
	On  Switch = "on"
	Off Switch = "off"
)

// ParseSwitch reads on or off.
func ParseSwitch(s string) (Switch, error) { return oneOf(s, On, Off) }

// UnmarshalText is [ParseSwitch].
func (s *Switch) UnmarshalText(text []byte) (err error) {
	*s, err = ParseSwitch(string(text))
	return err
}

// Device is the name of a network device or, with a star at its end, a prefix of names.
type Device string

// ParseDevice reads a Device.
func ParseDevice(s string) (Device, error) {
	const longest = 15 // IFNAMSIZ, less a NUL
	name, _ := strings.CutSuffix(s, "*")
	if name == "" || len(name) > longest || strings.ContainsAny(name, "*/: \t\n\x00") || name == "." || name == ".." {
		return "", fmt.Errorf("%q: want the name of a network device, or the beginning of one and a *", s)
	}
	return Device(s), nil
}

// UnmarshalText is [ParseDevice].
func (d *Device) UnmarshalText(text []byte) (err error) {
	*d, err = ParseDevice(string(text))
	return err
}

// Matches says whether d matches the name of a device.
func (d Device) Matches(name string) bool {
	if begin, ok := strings.CutSuffix(string(d), "*"); ok {
		return strings.HasPrefix(name, begin)
	}
	return string(d) == name
}
