package iptables

import (
	"fmt"
	"slices"
	"strings"
)

// Kind says what a note is about.
type Kind string

const (
	// NotCarried: the policy has no counterpart of the rule.
	NotCarried Kind = "not carried over"
	// Unknown: the rule was not understood, so the policy has no counterpart of it.
	Unknown Kind = "not understood"
	// Weaker: the policy lets through what the rule stops.
	Weaker Kind = "weaker"
	// Stricter: the policy stops what the rules let through.
	Stricter Kind = "stricter"
	// Differs: something else is different.
	Differs Kind = "differs"
)

// Note is something that a user should know about a rule.
type Note struct {
	Source string // "" for a note about the rules as a whole
	Line   int
	Kind   Kind
	Rule   string
	Text   string
}

func (n Note) String() string {
	var s strings.Builder
	if n.Source != "" {
		fmt.Fprintf(&s, "%s:%d: ", n.Source, n.Line)
	}
	fmt.Fprintf(&s, "%s: %s", n.Kind, n.Text)
	if n.Rule != "" {
		fmt.Fprintf(&s, "\n    %s", n.Rule)
	}
	return s.String()
}

// report is what one phase notes about the rules, in the phase's order. Only that phase
// adds to it.
type report struct {
	remarks  []remark
	comments []comment
}

type remark struct {
	rule    *rule // nil for a remark about the rules as a whole
	kind    Kind  // "" if the rule is carried over
	refusal bool  // from refuse
	text    string
}

// comment is a line above a key of the config file.
type comment struct{ key, line string }

func (r *report) note(about *rule, kind Kind, format string, args ...any) {
	r.remarks = append(r.remarks, remark{rule: about, kind: kind, text: fmt.Sprintf(format, args...)})
}

// carry notes that a rule is carried over.
func (r *report) carry(about *rule) {
	r.remarks = append(r.remarks, remark{rule: about})
}

// refuse notes why a rule is not carried over. A packet can meet a rule in several places:
// only the first reason counts, and none if the rule is carried over from another place
// before.
func (r *report) refuse(about *rule, why string) {
	r.remarks = append(r.remarks, remark{rule: about, kind: NotCarried, refusal: true, text: why})
}

// comment writes a rule above the key of the config file that comes from the rule.
func (r *report) comment(key string, from *rule) {
	r.comments = append(r.comments, comment{key, from.at.String() + ": " + from.text})
}

// ledger joins several reports, without duplicates. It does not change once it is made.
type ledger struct {
	notes   []Note
	noted   map[*rule][]Kind
	carried map[*rule]bool
}

func join(reports ...report) ledger {
	l := ledger{noted: map[*rule][]Kind{}, carried: map[*rule]bool{}}
	said := map[Note]bool{}
	for _, r := range reports {
		for _, m := range r.remarks {
			if m.kind == "" {
				l.carried[m.rule] = true
				continue
			}
			if m.refusal && (l.carried[m.rule] || l.has(m.rule, NotCarried, Unknown)) {
				continue
			}
			n := Note{Kind: m.kind, Text: m.text}
			if m.rule != nil {
				n.Source, n.Line, n.Rule = m.rule.at.source, m.rule.at.line, m.rule.text
				l.noted[m.rule] = append(l.noted[m.rule], m.kind)
			}
			if !said[n] {
				said[n] = true
				l.notes = append(l.notes, n)
			}
		}
	}
	return l
}

// has reports whether a rule has a note of one of these kinds.
func (l ledger) has(r *rule, kinds ...Kind) bool {
	return slices.ContainsFunc(l.noted[r], func(k Kind) bool { return slices.Contains(kinds, k) })
}
