package metrics

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/web"
)

// maxNamed is how many uncovered containers the page names.
const maxNamed = 5

// Page returns what the page shows of a reading.
func (r *Reading) Page() web.Page {
	p := web.Page{
		Time: r.at, Version: loader.Version(),
		Why: []string{}, Cgroups: []string{}, Defences: []web.Defence{}, Rows: []web.Row{},
	}
	if !r.successful() {
		p.Error = r.err.Error()
		return p
	}
	s := r.status
	p.Enforcing, p.Mode, p.Cgroups = s.Enforcing, string(s.Mode), s.Cgroups
	p.InForce = s.InForce() && !r.uncertain && (!r.reload.tried || r.reload.successful)
	p.Why = r.why()
	for _, d := range s.Defences {
		p.Defences = append(p.Defences, web.Defence{Name: d.Name, Active: d.Active, Reason: d.Reason})
	}
	if r.stats == nil {
		return p
	}
	t := r.stats.Total
	p.Total = counts(&t.Refused, t.Families, t.HostSide, t.SMTP)
	p.Containers = r.there
	for _, c := range r.containers {
		row := web.Row{
			ID: valid(c.ID), Name: valid(c.name), Image: valid(c.image), Tokens: c.SMTP.Tokens,
			Counts: counts(&c.Refused, c.Families, c.HostSide, c.SMTP.SMTP),
		}
		if c.SMTP.Known() {
			row.Limit = fmt.Sprintf("%s, burst %d", c.SMTP.Rate, c.SMTP.Burst)
		}
		p.Rows = append(p.Rows, row)
	}
	slices.SortStableFunc(p.Rows, func(a, b web.Row) int {
		return cmp.Or(cmp.Compare(b.Refused(), a.Refused()), cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})
	p.Rows = p.Rows[:min(len(p.Rows), web.MaxRows)]
	return p
}

// why says why the filter is not fully in force.
func (r *Reading) why() (why []string) {
	s := r.status
	why = []string{}
	add := func(format string, args ...any) { why = append(why, fmt.Sprintf(format, args...)) }
	if len(s.Cgroups) == 0 {
		add("nothing is attached")
		return why
	}
	if s.Mode == policy.Audit {
		add("in mode audit, what would be dropped is counted and passes")
	}
	for _, h := range s.Hooks {
		if !h.Attached && !s.Optional(h) {
			add("hook %s of %s is not attached: %s", h.Name, cmp.Or(h.Cgroup, "the host"), cmp.Or(h.Reason, "another program may have detached it"))
		}
	}
	for i, c := range s.Uncovered {
		if i == maxNamed {
			add("%d more containers are not policed", len(s.Uncovered)-maxNamed)
			break
		}
		add("container %s is not policed", valid(cmp.Or(c.Name, c.ID, c.Cgroup)))
	}
	if r.uncertain {
		add("an engine does not answer: it may have containers that are not policed")
	}
	if s.Room != nil && s.Room.Without > 0 {
		add("%d containers have no bucket, since the map of containers is full: they cannot send mail", s.Room.Without)
	}
	if r.reload.tried && !r.reload.successful {
		add("the configuration could not be put in force: the policy before it still is")
	}
	return why
}

func counts(refused *stats.Refusals, sockets stats.Denied, host stats.Traffic, mail stats.SMTP) web.Counts {
	sum := func(b stats.Blocked) uint64 { return b.Packets + b.Connects }
	return web.Counts{
		Blocked: sum(refused.Blocked), Malformed: sum(refused.Malformed), Sockets: sockets.Denied, Host: host.Packets,
		MailAllowed: mail.Allowed, MailRefused: mail.RateLimited + mail.NoBucket,
	}
}
