package iptables

import (
	"cmp"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// hashlimit collects the options of the matches limit, hashlimit and recent until the rule
// has been read, since the options come one by one.
type hashlimit struct {
	module string
	limit  limit
	rated  bool
	action string // of recent: set, update, rcheck or remove
	not    bool
}

func (h *hashlimit) option(name string, values []string, not bool) error {
	one := ""
	if len(values) == 1 {
		one = values[0]
	}
	l := &h.limit
	switch h.module + " " + name {
	case "limit --limit", "hashlimit --hashlimit-upto", "hashlimit --hashlimit-above":
		rate, ok := parseRate(one)
		if !ok || h.rated {
			return errUnknown
		}
		l.rate, h.rated = rate, true
		l.over = (name == "--hashlimit-above") != not
		return nil
	case "limit --limit-burst", "hashlimit --hashlimit-burst":
		n, err := strconv.ParseUint(one, 10, 32)
		if err != nil || n == 0 || not {
			return errUnknown
		}
		l.burst = uint32(n)
		return nil
	case "hashlimit --hashlimit-mode":
		l.per = strings.Split(one, ",")
		return nil
	case "hashlimit --hashlimit-srcmask":
		n, err := strconv.Atoi(one)
		if err != nil {
			return errUnknown
		}
		l.mask = n
		return nil
	case "hashlimit --hashlimit-name", "hashlimit --hashlimit-htable-size", "hashlimit --hashlimit-htable-max",
		"hashlimit --hashlimit-htable-gcinterval", "hashlimit --hashlimit-dstmask":
		return nil
	case "hashlimit --hashlimit-htable-expire":
		n, err := strconv.ParseUint(one, 10, 32)
		if err != nil {
			return errUnknown
		}
		l.expire = time.Duration(n) * time.Millisecond
		return nil
	case "recent --set", "recent --update", "recent --rcheck", "recent --remove":
		if h.action != "" {
			return errUnknown
		}
		h.action, h.not = name, not
		return nil
	case "recent --name":
		l.recent = one
		return nil
	case "recent --seconds", "recent --hitcount":
		n, err := strconv.ParseUint(one, 10, 32)
		if err != nil || n == 0 {
			return errUnknown
		}
		if name == "--seconds" {
			l.window = n
		} else {
			l.hits = n
		}
		return nil
	case "recent --rsource":
		l.per = []string{"srcip"}
		return nil
	case "recent --rdest":
		l.per = []string{"dstip"}
		return nil
	case "recent --mask":
		if p, err := network("0.0.0.0/" + one); err == nil && p.Bits() < 32 {
			l.mask = p.Bits()
		}
		return nil
	case "recent --rttl", "recent --reap":
		return nil
	}
	return errUnknown
}

// finish writes what was collected into the match.
func (h *hashlimit) finish(m *match) {
	l := h.limit
	l.module = h.module
	if l.burst == 0 {
		l.burst = 5 // the default of libxt_limit and libxt_hashlimit
	}
	switch h.module {
	case "":
		return
	case "recent":
		l.recent = cmp.Or(l.recent, "DEFAULT")
		if l.per == nil {
			l.per = []string{"srcip"}
		}
		if h.action == "--set" && !h.not {
			m.sets = l.recent // it always matches
			return
		}
		if (h.action != "--update" && h.action != "--rcheck") || l.window == 0 {
			m.others = append(m.others, condition{"-m recent " + h.action, h.not})
			return
		}
		l.over = !h.not
		l.hits = max(l.hits, 1)
		m.limit = &l
	default:
		if !h.rated {
			m.others = append(m.others, condition{text: "-m " + h.module})
			return
		}
		m.limit = &l
	}
}

// settle turns hits in a window into a rate and a burst, if that is possible. counted is
// whether the packet itself is already on the list when it is looked up there.
func (l limit) settle(counted bool) (limit, bool) {
	n := l.hits
	if counted {
		n--
	}
	if n == 0 || n > 1_000_000 {
		return l, false
	}
	l.burst = uint32(n)
	for _, period := range []time.Duration{time.Second, time.Minute, time.Hour, 24 * time.Hour} {
		if count := n * uint64(period/time.Second); count%l.window == 0 || period == 24*time.Hour {
			l.rate = policy.Rate{Count: count / l.window, Period: period}
			return l, l.rate.Count > 0 && l.rate.Validate() == nil
		}
	}
	return l, false
}

// together returns what several limits amount to if a packet meets them one after another.
// A packet that has to be within each limit is within the strictest. A packet that has to
// be over each limit can also use the tokens of each. Limits of both kinds do not amount to
// one.
func together(limits []*limit) (limit, bool) {
	all := *limits[0]
	for _, l := range limits[1:] {
		if l.over != all.over {
			return limit{}, false
		}
		if l.over {
			all.rate, all.burst = sum(all.rate, l.rate), all.burst+l.burst
		} else {
			all.burst = min(all.burst, l.burst)
			if slower(l.rate, all.rate) < 0 {
				all.rate = l.rate
			}
		}
		if !l.perContainer() {
			all.per, all.mask = l.per, l.mask
		}
	}
	return all, true
}

// sum adds two rates, in the longer of their periods.
func sum(a, b policy.Rate) policy.Rate {
	if a.Period < b.Period {
		a, b = b, a
	}
	return policy.Rate{Count: a.Count + b.Count*uint64(a.Period/b.Period), Period: a.Period}
}

// slower compares two rates.
func slower(a, b policy.Rate) int {
	hiA, loA := bits.Mul64(a.Count, uint64(b.Period))
	hiB, loB := bits.Mul64(b.Count, uint64(a.Period))
	return cmp.Or(cmp.Compare(hiA, hiB), cmp.Compare(loA, loB))
}

// parseRate reads N, N/s, N/min and so on, as the kernel's tools do. The unit may be any
// beginning of its name.
func parseRate(s string) (policy.Rate, bool) {
	count, unit, ok := strings.Cut(s, "/")
	if !ok {
		unit = "second"
	}
	n, err := strconv.ParseUint(count, 10, 64)
	if err != nil || n == 0 || unit == "" {
		return policy.Rate{}, false
	}
	for _, u := range []struct {
		name   string
		period time.Duration
	}{{"second", time.Second}, {"minute", time.Minute}, {"hour", time.Hour}, {"day", 24 * time.Hour}} {
		if strings.HasPrefix(u.name, strings.ToLower(unit)) {
			r := policy.Rate{Count: n, Period: u.period}
			return r, r.Validate() == nil
		}
	}
	return policy.Rate{}, false
}

// refill returns how long it takes to refill an empty bucket.
func (l *limit) refill() time.Duration {
	if l.rate.Count == 0 {
		return 0
	}
	return time.Duration(float64(l.burst) * float64(l.rate.Period) / float64(l.rate.Count))
}

// perContainer reports whether each source address has a limit of its own.
func (l *limit) perContainer() bool { return slices.Contains(l.per, "srcip") && l.mask < 0 }
