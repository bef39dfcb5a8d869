// Package explain says what would happen to a packet of a container, and why. The program
// decides, on a copy of the state; the reason is found in the policy, and has to fit what the
// program decided.
package explain

import (
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Verdict is what would happen.
type Verdict string

const (
	Passes  Verdict = "passes"
	Refused Verdict = "refused"
	// Unknown means that program and policy do not agree, or that something else decides.
	Unknown Verdict = "unknown"
)

// Answer is what would happen to the first packet to a destination, and why.
type Answer struct {
	Destination Destination `json:"destination"`
	// Container is nil for a new container that no rule matches.
	Container *container.Identity `json:"container"`
	// Policed is false if the container is not policed; then no program judges it.
	Policed bool        `json:"policed"`
	Mode    policy.Mode `json:"mode"`
	Verdict Verdict     `json:"verdict"`
	// Reason is why the packet is refused, or would be if Mode were enforce, by the names
	// that other commands use; empty if it is not.
	Reason string `json:"reason"`
	// WouldBlock says that there is a Reason, and Blocked that Mode is enforce besides.
	WouldBlock bool `json:"would_block"`
	Blocked    bool `json:"blocked"`
	// Rule is the entry that decides, as in `preset aws`; empty if none does.
	Rule string `json:"rule"`
	// Entries are all entries that hold for the destination, those that win first.
	Entries []Entry `json:"entries"`
	// Early says that connect() or sendmsg() already fails.
	Early bool `json:"refused_early"`
	// SMTP is nil unless the packet would open a mail connection.
	SMTP  *Mail    `json:"smtp"`
	Notes []string `json:"notes"`
}

// Destination is where the packet goes.
type Destination struct {
	Address netip.Addr `json:"address"`
	// Port is 0 if none was given; then no entry with a port holds.
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"`
}

// Entry is an entry of the policy.
type Entry struct {
	List  string `json:"list"`
	Entry string `json:"entry"`
	// Destination is what the entry is for.
	Destination string `json:"destination"`
	// Clouds are the clouds for which a preset has it.
	Clouds []string `json:"clouds,omitempty"`
}

// Mail is the limit on a mail connection.
type Mail struct {
	// Tokens is the number of tokens left; nil if the rate is unlimited or the container has
	// no bucket.
	Tokens *float64    `json:"tokens"`
	Rate   policy.Rate `json:"rate"`
	Burst  uint32      `json:"burst"`
	// From says where the limit comes from: policy, rule or hand.
	From string `json:"from"`
	// TakesToken says whether the connection takes a token; not over the loopback device,
	// to an exempt destination or at an unlimited rate.
	TakesToken bool `json:"takes_token"`
	Loopback   bool `json:"loopback"`
	// Exempt is the entry that exempts the destination; empty if there is none.
	Exempt string `json:"exempt"`
	// Wait is how long it takes until there is a token, in seconds.
	Wait      float64          `json:"wait_seconds"`
	OverLimit policy.OverLimit `json:"over_limit"`
}

// The values of Mail.From.
const (
	FromPolicy = "policy"
	FromRule   = "rule"
	FromHand   = "hand"
)

// Explain says what would happen to the first packet that a container sends to a destination
// of [policy.ParseDestination]: a SYN for TCP, which is the protocol if dst has none. c is nil for a new
// container. Nothing is counted, no token is taken and nothing is attached. The error can wrap
// those of [loader.Filter.Rehearse].
func Explain(f *loader.Filter, dst policy.Rule, c *container.Container) (*Answer, error) {
	var rel string
	var id uint64
	if c != nil {
		rel, id = c.Cgroup, c.CgroupID
	}
	r, err := f.Rehearse(rel, id)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return answer(r, dst, c)
}

// Unpoliced says what would happen to a packet of a container that is not policed. Only the
// host side may judge it, which does as it would with a new container's.
func Unpoliced(f *loader.Filter, dst policy.Rule, c *container.Container) (*Answer, error) {
	a, err := Explain(f, dst, nil)
	if err != nil {
		return nil, err
	}
	status, err := f.Status()
	if err != nil {
		return nil, err
	}
	a.Container, a.Policed, a.Early = &c.Identity, false, false
	mail := a.SMTP != nil && a.SMTP.TakesToken
	a.Notes = []string{"the container is not policed: see `egressbpf status`"}
	if !status.HasDefence(loader.HostSide) || a.Mode == policy.Audit || a.Verdict == Passes && !mail {
		a.Verdict, a.Reason, a.Rule, a.WouldBlock, a.Blocked, a.SMTP, a.Entries = Passes, "", "", false, false, nil, []Entry{}
		return a, nil
	}
	// Nothing tells whether the container's packets come to the host over a device of
	// containers.
	a.Verdict, a.Blocked = Unknown, false
	a.Notes = append(a.Notes, "the host drops the packet if it comes over a bridge of containers and is for a blocked destination, or is mail without a token of that bridge; otherwise the packet passes")
	return a, nil
}

// answer has the program judge the packet, and looks for the reason.
func answer(r *loader.Rehearsal, dst policy.Rule, c *container.Container) (*Answer, error) {
	if dst.Proto == 0 {
		dst.Proto = protoTCP
	}
	q, err := newQuestion(r, dst, c)
	if err != nil {
		return nil, err
	}
	p, err := newProbe(&r.Policy, dst)
	if err != nil {
		return nil, err
	}
	before, err := maps.Now()
	if err != nil {
		return nil, err
	}
	got, err := r.Send(p.etherType, p.packet, p.device)
	if err != nil {
		return nil, err
	}
	after, err := maps.Now()
	if err != nil {
		return nil, err
	}
	found := q.judge(before)
	a := q.answer(found, before)
	a.apply(got)
	// A token may have come back in between.
	if !found.agrees(got) && !q.judge(after).agrees(got) {
		a.Verdict = Unknown
		a.Notes = append(a.Notes, fmt.Sprintf("the program and the policy do not agree: by the policy, %s; please report it", orPasses(found.reason)))
		return a, nil
	}
	if passed := got.Reason == bpf.EgressReasonREASON_NONE || r.Policy.Mode == policy.Audit; passed != got.Passed {
		a.Verdict = Unknown
		a.Notes = append(a.Notes, "the program does not do what the mode of the policy says; please report it")
	}
	return a, nil
}

func orPasses(reason bpf.EgressReason) string {
	if reason == bpf.EgressReasonREASON_NONE {
		return "it passes"
	}
	return "it is refused, " + reasonName(reason)
}

// reasonName returns the name that other commands use.
func reasonName(r bpf.EgressReason) string {
	switch r {
	case bpf.EgressReasonREASON_MALFORMED:
		return "malformed"
	case bpf.EgressReasonREASON_BLOCKED:
		return "blocked"
	case bpf.EgressReasonREASON_RATE_LIMITED:
		return "rate_limited"
	case bpf.EgressReasonREASON_NO_BUCKET:
		return "no_bucket"
	case bpf.EgressReasonREASON_NONE:
		return ""
	}
	return fmt.Sprint("reason ", uint32(r))
}

// apply enters what the program decided.
func (a *Answer) apply(got loader.Outcome) {
	a.Verdict = Refused
	if got.Passed {
		a.Verdict = Passes
	}
	a.Reason = reasonName(got.Reason)
	a.WouldBlock = a.Reason != ""
	a.Blocked = a.WouldBlock && !got.Passed
}

var errNoDevice = errors.New("this network namespace has no device but the loopback: run it on the host")

// round keeps three digits, and rounds down.
func round(n float64) float64 { return math.Floor(n*1000) / 1000 }
