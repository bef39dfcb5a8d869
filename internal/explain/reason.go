package explain

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// question is a packet of a container, with all that decides what happens to it.
type question struct {
	policy.Policy
	dst        policy.Rule
	match      policy.Match
	container  *container.Container
	entry      maps.Container
	stateless  bool
	tunnels    map[uint16]bool
	incomplete bool
	// rule is the index of the rule for single containers that matches; -1 if none does.
	rule int
}

func newQuestion(r *loader.Rehearsal, dst policy.Rule, c *container.Container) (*question, error) {
	entry, ok, err := r.Entry()
	if err != nil {
		return nil, err
	}
	tunnels, err := r.Tunnels()
	if err != nil {
		return nil, err
	}
	q := &question{
		Policy: r.Policy, dst: dst, match: r.Policy.Match(dst.Prefix.Addr(), dst.Proto, dst.Port),
		container: c, entry: entry, stateless: !ok, tunnels: tunnels, incomplete: r.Incomplete, rule: -1,
	}
	// Rules match nothing that no source knows.
	if c != nil && c.Source != "" {
		q.rule = policy.RuleIndex(r.Policy.Containers, c.Subject())
	}
	return q, nil
}

// finding is what the policy says about a question.
type finding struct {
	reason bpf.EgressReason
	// admitted says that it is a mail connection that passes for a token, or would if there
	// were a limit.
	admitted bool
	// close says that the tokens are so close to one that rounding decides.
	close bool
	// rule is the entry that decides; empty if none does.
	rule string
}

// agrees says whether the program has decided the same.
func (f finding) agrees(got loader.Outcome) bool {
	if f.close {
		return got.Admitted != (got.Reason == bpf.EgressReasonREASON_RATE_LIMITED)
	}
	return f.reason == got.Reason && f.admitted == got.Admitted
}

// judge says what the policy says at a time, in nanoseconds of CLOCK_MONOTONIC. The order is
// that of docs/semantics.md.
func (q *question) judge(now uint64) finding {
	refused := func(reason bpf.EgressReason, rule string) finding { return finding{reason: reason, rule: rule} }
	passes := finding{reason: bpf.EgressReasonREASON_NONE}
	switch m := q.match; {
	case len(m.Allow) > 0 && len(m.Block)+len(m.Presets) > 0:
		passes.rule = m.Allow[0].String()
	case len(m.Block) > 0:
		return refused(bpf.EgressReasonREASON_BLOCKED, m.Block[0].String())
	case m.Blocked() && q.stateless, m.Blocked() && q.entry.Flags&maps.MayReachMetadata == 0:
		return refused(bpf.EgressReasonREASON_BLOCKED, m.Presets[0].String())
	case m.Blocked():
		passes.rule = q.metadataRule()
	}
	if !q.match.Blocked() && q.loopback() && q.forTunnel() {
		return refused(bpf.EgressReasonREASON_BLOCKED, "tunnel of the host")
	}
	switch {
	case !q.mail() || q.loopback():
		return passes
	case len(q.match.Exempt) > 0:
		passes.rule = q.match.Exempt[0].String()
		return passes
	case q.stateless:
		return refused(bpf.EgressReasonREASON_NO_BUCKET, "")
	}
	limit, from := q.limit()
	passes.admitted, passes.rule = true, q.limitText(from)
	if limit.Count == 0 {
		return passes
	}
	tokens := maps.Tokens(q.entry.Bucket, limit, now)
	if q.entry.Bucket.Closed != 0 {
		tokens = 0
	}
	// A bucket that was used under another limit is converted in 65,536ths of a token.
	const rounding = 1.0 / (1 << 14)
	if tokens >= 1 {
		passes.close = tokens < 1+rounding
		return passes
	}
	f := refused(bpf.EgressReasonREASON_RATE_LIMITED, passes.rule)
	f.close = tokens > 1-rounding
	return f
}

// loopback says whether the packet leaves by the loopback device.
func (q *question) loopback() bool { return q.dst.Prefix.Addr().IsLoopback() }

// mail says whether the packet opens a mail connection.
func (q *question) mail() bool {
	return q.dst.Proto == protoTCP && slices.Contains(q.SMTP.Ports, q.dst.Port)
}

// forTunnel says whether a tunnel of the host would unpack the packet.
func (q *question) forTunnel() bool {
	switch q.dst.Proto {
	case 4, 41, 47, 97, 108, 115, 137, 143: // see tunnel_protocol() in bpf/tunnels.h
		return true
	case protoUDP, protoUDPLite:
		return q.tunnels[q.dst.Port]
	}
	return false
}

// limit returns the limit that holds for the container, and where it comes from.
func (q *question) limit() (limit bpf.EgressLimit, from string) {
	switch {
	case q.entry.Limit.Burst == 0:
		return maps.LimitOf(q.SMTP.Limit()), FromPolicy
	case q.entry.Flags&maps.LimitSetByHand != 0:
		return q.entry.Limit, FromHand
	}
	return q.entry.Limit, FromRule
}

// ruleFor returns the rule for single containers that matches the container; zero if none
// does.
func (q *question) ruleFor() policy.ContainerRule {
	if q.rule < 0 {
		return policy.ContainerRule{}
	}
	return q.Containers[q.rule]
}

func (q *question) ruleText() string { return fmt.Sprintf("rule %d of containers", q.rule+1) }

// earlier stands for a rule that the container got something from, and that does not hold for
// it any more.
const earlier = "an earlier rule of containers"

// metadataRule names the rule by which the container may reach what the presets block.
func (q *question) metadataRule() string {
	if q.ruleFor().Metadata == policy.Allowed {
		return q.ruleText()
	}
	return earlier
}

// limitText says where a limit comes from.
func (q *question) limitText(from string) string {
	switch from {
	case FromHand:
		return "limit set"
	case FromRule:
		if smtp := q.ruleFor().SMTP; smtp != nil && maps.LimitOf(*smtp) == q.entry.Limit {
			return q.ruleText()
		}
		return earlier
	}
	return "smtp"
}

// answer returns what the policy tells about the question. The verdict is still missing.
func (q *question) answer(f finding, now uint64) *Answer {
	a := &Answer{
		Destination: Destination{q.dst.Prefix.Addr(), q.dst.Port, policy.ProtocolName(q.dst.Proto)},
		Policed:     true, Mode: q.Mode, Rule: f.rule, Entries: []Entry{}, Notes: []string{},
	}
	if q.container != nil {
		a.Container = &q.container.Identity
	}
	for _, list := range [][]policy.Entry{q.match.Allow, q.match.Block, q.match.Presets, q.match.Exempt} {
		for _, e := range list {
			if e.List != policy.ListExempt || q.mail() {
				a.Entries = append(a.Entries, Entry{e.List, e.String(), e.Rule.String(), e.Clouds})
			}
		}
	}
	if q.mail() {
		a.SMTP = q.mailOf(now)
	}
	// The hooks of connect() and sendmsg() know addresses and, on over_limit: reject, limits.
	// They see sockets of these protocols alone.
	if q.Mode == policy.Enforce && (q.dst.Proto == protoTCP || q.dst.Proto == protoUDP) {
		a.Early = f.reason == bpf.EgressReasonREASON_BLOCKED && q.match.Blocked() ||
			f.reason == bpf.EgressReasonREASON_RATE_LIMITED && q.SMTP.OverLimit == policy.Reject
	}
	a.Notes = append(a.Notes, q.notes(f)...)
	return a
}

func (q *question) mailOf(now uint64) *Mail {
	limit, from := q.limit()
	of := maps.PolicyLimit(limit)
	m := &Mail{Rate: of.Rate, Burst: of.Burst, From: from, Loopback: q.loopback(), OverLimit: q.SMTP.OverLimit}
	if len(q.match.Exempt) > 0 {
		m.Exempt = q.match.Exempt[0].String()
	}
	m.TakesToken = !m.Loopback && m.Exempt == "" && limit.Count != 0
	tokens := maps.Tokens(q.entry.Bucket, limit, now)
	if q.stateless || math.IsInf(tokens, 1) {
		return m
	}
	if q.entry.Bucket.Closed != 0 {
		tokens = 0
	}
	if tokens < 1 && q.entry.Bucket.Closed == 0 {
		m.Wait = math.Ceil((1-tokens)*float64(limit.Interval)/1e6) / 1e3
	}
	tokens = round(tokens)
	m.Tokens = &tokens
	return m
}

// notes say what else matters for the question.
func (q *question) notes(f finding) (notes []string) {
	add := func(format string, args ...any) { notes = append(notes, fmt.Sprintf(format, args...)) }
	if q.dst.Port == 0 && policy.HasPorts(q.dst.Proto) {
		if others := q.OtherPorts(q.dst.Prefix.Addr(), q.dst.Proto, q.dst.Port); len(others) > 0 && f.reason == bpf.EgressReasonREASON_NONE {
			add("without a port, no entry with a port holds; blocked at this address: %s", texts(others))
		}
	}
	if f.reason == bpf.EgressReasonREASON_RATE_LIMITED && q.Mode == policy.Enforce {
		if q.SMTP.OverLimit == policy.Drop {
			add("the container's kernel repeats the SYN, which passes once there is a token")
		} else {
			add("connect() does not fail if the container itself listens on that port; then the SYN is dropped")
		}
	}
	if f.reason == bpf.EgressReasonREASON_NO_BUCKET {
		add("there was no room for the container's bucket: see `egressbpf status`")
	}
	switch rule := q.ruleFor(); {
	case q.container == nil && len(q.Containers) > 0:
		add("a rule for single containers may open more to a container or change its limit: ask with --container")
	case q.container == nil || q.rule < 0:
	case (rule.Metadata == policy.Allowed) != (q.entry.Flags&maps.MayReachMetadata != 0),
		rule.SMTP != nil && q.entry.Flags&maps.LimitSetByHand == 0 && q.entry.Limit != maps.LimitOf(*rule.SMTP):
		add("%s matches the container, but was not applied to it: only `egressbpf run` applies rules", q.ruleText())
	}
	if q.incomplete {
		add("a hook of the cgroup is not attached or has an older policy: see `egressbpf status`")
	}
	return notes
}

func texts(entries []policy.Entry) string {
	var all []string
	for _, e := range entries {
		all = append(all, fmt.Sprintf("%s (%s)", e.Rule, e))
	}
	return strings.Join(all, ", ")
}
