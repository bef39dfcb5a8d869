package iptables

import (
	"cmp"
	"errors"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// Result is what became of the rules.
type Result struct {
	Config policy.Config
	// Comments are for [policy.Config.YAML]: they name the rules that each entry comes
	// from.
	Comments map[string][]string
	Notes    []Note // in the order of sources and lines
	Carried  int    // number of rules

	rules map[position]bool // those carried over
}

// ErrNothing means that nothing was carried over. The notes of the result say why.
var ErrNothing = errors.New("no rule stops containers from reaching a destination or limits their mail")

// Translate reads dumps that are in force together, and returns the policy that does the
// same with what containers send. The error is that of a dump that cannot be read, or
// [ErrNothing].
func Translate(sources ...Source) (*Result, error) {
	tr, err := translate(sources...)
	if err != nil {
		return nil, err
	}
	if len(tr.carried) == 0 {
		return &tr.result, ErrNothing
	}
	return &tr.result, nil
}

// translation is a result with what it was made from.
type translation struct {
	tables   []*table
	families []*family
	ledger
	result Result
}

// translate joins the phases. Each phase is a function of the rules and of the results of
// the phases that it is given, and changes none of them. Notes on one rule are in the order
// of the reports.
func translate(sources ...Source) (*translation, error) {
	var tables []*table
	var names order
	for _, s := range sources {
		more, err := parse(s)
		if err != nil {
			return nil, err
		}
		tables, names = append(tables, more...), append(names, s.Name)
	}
	host := learn(tables)
	laid, err := layOut(tables, host)
	if err != nil {
		return nil, err
	}
	kept := setAside(laid.families)
	families := kept.families

	mail := limitMail(families, laid.lists)
	blocked := block(families)
	allowed := allow(families, blocked, join(mail.report, blocked.report))

	p := policy.Default()
	p.Presets = []string{policy.None}
	p.SMTP, p.Block, p.Allow = mail.smtp, blocked.entries, allowed.entries
	exempted := exempt(families, mail, p, join(mail.report, blocked.report, allowed.report))
	p.SMTP.Exempt = exempted.destinations

	made := []report{laid.report, kept.report, mail.report, blocked.report, allowed.report, exempted.report}
	made = append(made, account(tables, host, families, join(made...)))
	told := join(made...)
	made = append(made, compare(families, p, mail, blocked, names, told))
	made = append(made, conclude(families, p, mail, blocked, len(told.carried) > 0))

	tr := &translation{tables: tables, families: families, ledger: join(made...)}
	tr.result = Result{
		Config:   policy.Config{Cgroups: []string{}, Policy: p},
		Comments: commentsOf(names, made),
		Notes:    names.sorted(tr.notes),
		Carried:  len(tr.carried),
		rules:    map[position]bool{},
	}
	for r := range tr.carried {
		tr.result.rules[r.at] = true
	}
	return tr, nil
}

// commentsOf returns the comments of a config file by key, without duplicates.
func commentsOf(names order, reports []report) map[string][]string {
	all := map[string][]string{"": {"Made by egressbpf import iptables of " + strings.Join(names, ", ") + "."}}
	for _, r := range reports {
		for _, c := range r.comments {
			if !slices.Contains(all[c.key], c.line) {
				all[c.key] = append(all[c.key], c.line)
			}
		}
	}
	return all
}

// order is the names of the sources in their order.
type order []string

// index returns the position of a source. Notes on the rules as a whole come last.
func (o order) index(source string) int {
	if source == "" {
		return len(o)
	}
	return slices.Index(o, source)
}

func (o order) compare(a, b position) int {
	return cmp.Or(cmp.Compare(o.index(a.source), o.index(b.source)), cmp.Compare(a.line, b.line))
}

// sorted returns the notes ordered by source and line. Notes on one line keep their order.
func (o order) sorted(notes []Note) []Note {
	return slices.SortedStableFunc(slices.Values(notes), func(a, b Note) int {
		return o.compare(position{a.Source, a.Line}, position{b.Source, b.Line})
	})
}
