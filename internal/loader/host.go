package loader

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// host is the layer of the host side, which judges packets from containers again in the
// network namespace of this process.
type host struct {
	site
	tunnels tunnels
	// netfilter is the strategy for kernels since 6.4, and ingress the one for all
	// others.
	netfilter *netfilter
	ingress   *ingress
}

// A hostWay is a strategy for judging packets from containers.
type hostWay interface {
	// attach puts the strategy in force for devices. If the kernel cannot have its
	// programs, the error is a cannot. That wraps ebpf.ErrNotSupported if the next
	// strategy may work.
	attach(a *attachment, devices []policy.Device) error
	// read adds the hooks to a status.
	read(r *reading) hostInForce
	// whyNot says why there are no hooks, if the last attach used this strategy, or
	// that it has nothing to judge yet.
	whyNot(r *reading) (active bool, reason string)
	// detach removes the hooks.
	detach(change *pins.Change) error
}

// hostInForce is the part of the host side that is in force.
type hostInForce struct {
	// complete is whether no hook is missing. reason says why one is, or what is
	// special.
	complete bool
	reason   string
	programs []ebpf.ProgramID
	// doc is the document of the programs; nil if there are none.
	doc *document
}

// ways are the strategies, the best first.
func (h host) ways() []hostWay { return []hostWay{h.netfilter, h.ingress} }

// wayOf returns the strategy that an attach used.
func (h host) wayOf(found *found) hostWay {
	if found != nil && found.Ingress {
		return h.ingress
	}
	return h.netfilter
}

// attach puts the host side in force as the policy says.
func (h host) attach(a *attachment) error {
	do := h.attachAny
	if a.policy.HostSide == policy.Off {
		do = h.turnOff
	}
	if err := do(a); err != nil {
		return err
	}
	return forgetDevices(a.state)
}

// attachAny attaches the first strategy that this kernel supports. If it supports none, the
// filter works without the host side, and what an earlier attach has put in force stays.
func (h host) attachAny(a *attachment) error {
	devices := h.podDevices(a.targets, a.policy)
	names, err := h.findDevices(a.targets, a.policy, devices)
	if err != nil {
		return err
	}
	if err := h.tunnels.attach(a); err != nil {
		return err
	}
	devices = withFound(devices, names)
	if err := a.change.Step(tryStep + HostSide); err != nil {
		a.found.note(HostSide, err)
		return nil
	}
	var why cannot
	for _, way := range h.ways() {
		if err := way.attach(a, devices); !errors.As(err, &why) {
			return err
		}
		if !errors.Is(why, ebpf.ErrNotSupported) {
			break
		}
	}
	a.found.note(HostSide, errors.New(firstLine(why)))
	return nil
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// turnOff removes what an earlier attach has put in force.
func (h host) turnOff(a *attachment) error {
	if err := h.tunnels.set(nil, a); err != nil {
		return err
	}
	return h.detach(a.change)
}

// detach detaches both strategies, whichever is in force, and what finds tunnels.
func (h host) detach(change *pins.Change) error {
	for _, detach := range []func(*pins.Change) error{h.netfilter.detach, h.tunnels.detach, h.ingress.detach} {
		if err := detach(change); err != nil {
			return err
		}
	}
	return nil
}

// read adds the defence and its hooks to a status.
func (h host) read(r *reading) { r.Defences = append(r.Defences, h.defence(r)) }

func (h host) defence(r *reading) Defence {
	var in hostInForce
	for _, way := range h.ways() {
		if in = way.read(r); len(in.programs) > 0 || in.reason != "" {
			break
		}
	}
	if in.doc != nil {
		r.HostDevices = in.doc.Devices
	}
	d := Defence{Name: HostSide, Active: in.complete && in.doc != nil, Reason: in.reason}
	if !d.Active {
		if d.Reason == "" {
			d.Active, d.Reason = h.whyNot(r)
		}
		return d
	}
	if r.olderThanFilter(in.programs) {
		d = r.keptBy(d, in.doc, in.programs)
	}
	if reason, remark := judgesElsewhere(in.doc.Network); !remark {
		d.Active, d.Reason = false, reason
		return d
	} else if d.Reason == "" {
		d.Reason = reason
	}
	h.tunnels.read(&d, r.found)
	h.findUnjudged(&d, r, in.doc)
	if d.Active {
		h.findPassing(&d, r, in.doc)
	}
	return d
}

// whyNot says why there is no host side, or that it has nothing to judge yet.
func (h host) whyNot(r *reading) (active bool, reason string) {
	const open = ": packets that do not come from a container's own IP socket pass"
	switch {
	case r.Policy != nil && r.Policy.HostSide == policy.Off:
		return false, "turned off by the policy" + open
	case r.found != nil && r.found.Missing[HostSide] != "":
		return false, r.found.Missing[HostSide] + open
	}
	return h.wayOf(r.found).whyNot(r)
}

// judgesElsewhere says in which network namespace the host side judges packets, if that is
// not the host's. remark is whether the host side still counts as active.
func judgesElsewhere(network uint64) (reason string, remark bool) {
	switch host := hostsNetwork(); {
	case network == 0 || network == host:
		return "", true
	case network == netNamespace("self") && host == 0:
		return "", true
	case network == netNamespace("self"):
		return "only in this network namespace, which is not the host's", true
	case host != 0:
		return "it judges packets in a network namespace that is not the host's: attach from the host's", false
	}
	return "not known: it judges packets in another network namespace, and this process cannot see whether that is the host's", false
}

// findUnjudged looks for devices through which containers reach the host and which the host
// side does not judge.
func (h host) findUnjudged(d *Defence, r *reading, doc *document) {
	var targets []*target
	for _, p := range r.policed {
		if !p.gone && p.rel != "" {
			targets = append(targets, &target{rel: p.rel})
		}
	}
	names, err := h.findDevices(targets, doc.Policy, doc.Devices)
	if err != nil {
		d.Active, d.Reason = false, err.Error()
	}
	if len(names) > 0 && d.Active {
		r.Unjudged = append(r.Unjudged, names...)
		verb := "is"
		if len(names) > 1 {
			verb = "are"
		}
		d.Active, d.Reason = false, fmt.Sprintf("containers reach the host through %s, which %s not judged: attach again, or name it with --host-devices", few(names), verb)
	}
}

// few names the first of some devices, and counts the rest.
func few(names []string) string {
	const shown = 3
	var text strings.Builder
	for i, name := range names {
		switch rest := len(names) - i; {
		case i == shown:
			fmt.Fprintf(&text, " and %d more", rest)
			return text.String()
		case i > 0 && rest == 1:
			text.WriteString(" and ")
		case i > 0:
			text.WriteString(", ")
		}
		text.WriteString(strconv.Quote(name))
	}
	return text.String()
}

// hostDocument returns the document of the host side's programs.
func (l *loaded) hostDocument(devices []policy.Device) document {
	return document{Version: Version(), Policy: l.policy, Devices: devices, Network: netNamespace("self")}
}
