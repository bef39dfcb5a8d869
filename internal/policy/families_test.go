package policy

import (
	"math"
	"testing"
)

func TestFamilies(t *testing.T) {
	const restrict = 1<<1 | 1<<2 | 1<<10 | 1<<16 | 1<<38
	for _, tt := range []struct {
		in   string
		want Families
		mask uint64
	}{
		{"restrict", Restrict, restrict},
		{"any", AnyFamily, math.MaxUint64},
		{"vsock", "vsock", restrict | 1<<40},
		{"xdp, packet,xdp", "packet,xdp", restrict | 1<<17 | 1<<44},
	} {
		got, err := ParseFamilies(tt.in)
		if err != nil || got != tt.want || got.Mask() != tt.mask {
			t.Errorf("%q: got %q with mask %#x, %v, want %q with %#x", tt.in, got, got.Mask(), err, tt.want, tt.mask)
		}
	}
	for _, in := range []string{"", "unix", "inet", "17", "PACKET", "any,packet", "packet,", "packet;xdp"} {
		if got, err := ParseFamilies(in); err == nil {
			t.Errorf("%q: got %q, want an error", in, got)
		}
	}
}

func TestDevice(t *testing.T) {
	for _, tt := range []struct {
		in, name string
		matches  bool
	}{
		{"podman0", "podman0", true},
		{"podman0", "podman01", false},
		{"podman*", "podman", true},
		{"podman*", "podman12", true},
		{"podman*", "podma", false},
		{"fifteen-letters", "fifteen-letters", true},
	} {
		d, err := ParseDevice(tt.in)
		if err != nil || d.Matches(tt.name) != tt.matches {
			t.Errorf("%q matches %q: got %v, %v", tt.in, tt.name, d.Matches(tt.name), err)
		}
	}
	for _, in := range []string{"", "*", "a*b", "sixteen-letters-", "a/b", "a b", "..", "a:1"} {
		if _, err := ParseDevice(in); err == nil {
			t.Errorf("%q: want an error", in)
		}
	}
}
