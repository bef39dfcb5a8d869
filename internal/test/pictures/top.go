package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/charmbracelet/x/ansi"

	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/top"
	"github.com/egressbpf/egressbpf/internal/web"
)

// topArg has this program show the screen of `egressbpf top`.
const topArg = "-top"

// runTop shows the screen after two readings that are a second apart. No more follow, so that it
// stays as it is.
func runTop(ctx context.Context) error {
	at := now.Add(-2 * time.Second)
	all := told(records())
	return top.Run(ctx, top.Options{
		Read: func(ctx context.Context) (top.Reading, error) {
			if at == now {
				<-ctx.Done()
				return top.Reading{}, ctx.Err()
			}
			at = at.Add(time.Second)
			return top.Reading{Time: at, Stats: counted(at), Enforcing: true}, nil
		},
		Interval: time.Millisecond, Events: &all, Color: true, Output: os.Stdout,
		Title: page().Node + ", egressbpf " + page().Version,
	})
}

// told are records that are told one after the other.
type told []events.Record

// Next implements [events.Source].
func (t *told) Next(ctx context.Context) (r events.Record, err error) {
	if len(*t) == 0 {
		<-ctx.Done()
		return r, ctx.Err()
	}
	r, *t = (*t)[0], (*t)[1:]
	return r, nil
}

// counted are the counters at a time: those on the page, without what records tell of later.
func counted(at time.Time) *stats.Stats {
	p := page()
	for _, r := range records() {
		for i := range p.Rows {
			if r.Type != events.Refusal || !r.Time.After(at) || p.Rows[i].ID != r.Container.ID {
				continue
			}
			for _, c := range []*web.Counts{&p.Total, &p.Rows[i].Counts} {
				if r.Reason == events.ReasonRateLimited {
					c.MailRefused--
				} else {
					c.Blocked--
				}
			}
		}
	}
	t := row(p.Total)
	s := &stats.Stats{Mode: policy.Enforce, Total: stats.Total{Families: t.Families, HostSide: t.HostSide, HostReasons: t.HostReasons, Refused: t.Refused}}
	for i, of := range p.Rows {
		c := row(of.Counts)
		c.Identity = container.Identity{ID: of.ID, Name: of.Name, Cgroup: "/docker/" + of.ID, CgroupID: cgroupID(i)}
		c.SMTP.Tokens, c.SMTP.Rate, c.SMTP.Burst = of.Tokens, policy.Rate{Count: 5, Period: time.Minute}, 5
		s.Containers = append(s.Containers, c)
	}
	return s
}

// row has the counters that the page shows as c.
func row(c web.Counts) stats.Container {
	packets := func(n uint64) stats.Traffic { return stats.Traffic{Packets: n} }
	return stats.Container{
		Families: stats.Denied{Denied: c.Sockets},
		HostSide: packets(c.Host), HostReasons: stats.Reasons{Blocked: packets(c.Host)},
		SMTP: stats.Bucket{SMTP: stats.SMTP{Allowed: c.MailAllowed}},
		Refused: stats.Refusals{
			Blocked: stats.Blocked{Connects: c.Blocked}, Malformed: stats.Blocked{Traffic: packets(c.Malformed)},
			RateLimited: stats.Blocked{Traffic: packets(c.MailRefused)},
		},
	}
}

// drawTop writes top.svg and top-details.svg.
func drawTop(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	private, err := os.MkdirTemp("", "top")
	if err != nil {
		return err
	}
	defer os.RemoveAll(private)
	tmux := func(ctx context.Context, args ...string) (string, error) {
		out, err := exec.CommandContext(ctx, "tmux", append([]string{"-u", "-S", filepath.Join(private, "tmux"), "-f", os.DevNull}, args...)...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("tmux %s: %w: %s", args[0], err, out)
		}
		return string(out), err
	}
	if _, err := tmux(ctx, "new-session", "-d", "-x", fmt.Sprint(columns), "-y", fmt.Sprint(lines), self, topArg); err != nil {
		return err
	}
	defer func() { _, _ = tmux(context.WithoutCancel(ctx), "kill-server") }()
	for _, picture := range []struct {
		name, key string
		shows     *regexp.Regexp
	}{
		{"top", "", regexp.MustCompile(`(?s)ci-runner-3 +3\.0 .* 168\.63\.129\.16:80 .*enter details`)},
		{"top-details", "Enter", regexp.MustCompile(`(?s)REASON .*168\.63\.129\.16:80.*esc back`)},
	} {
		if picture.key != "" {
			if _, err := tmux(ctx, "send-keys", picture.key); err != nil {
				return err
			}
		}
		screen, err := settled(ctx, picture.shows, func() (string, error) { return tmux(ctx, "capture-pane", "-e", "-p", "-N") })
		if err != nil {
			return fmt.Errorf("%s: %w", picture.name, err)
		}
		drawn, err := svg(strings.TrimSuffix(screen, "\n"))
		if err != nil {
			return fmt.Errorf("%s: %w", picture.name, err)
		}
		if err := os.WriteFile(filepath.Join(dir, picture.name+".svg"), []byte(drawn), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// settled waits until a screen shows something and does not change: it is drawn bit by bit.
func settled(ctx context.Context, shows *regexp.Regexp, capture func() (string, error)) (string, error) {
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	before := ""
	for {
		screen, err := capture()
		if err != nil || screen == before && shows.MatchString(ansi.Strip(screen)) {
			return screen, err
		}
		before = screen
		select {
		case <-again.C:
		case <-ctx.Done():
			return "", fmt.Errorf("%w: the screen is\n%s", ctx.Err(), screen)
		}
	}
}
