// Package journal writes log lines to systemd's journal, with fields to search for.
package journal

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"strings"

	"github.com/coreos/go-systemd/v22/journal"
)

// MessageID is the key of an attribute that becomes the field MESSAGE_ID: 128 bits in
// hexadecimal that tell lines of one kind from all others.
const MessageID = "message_id"

// prefix begins the fields of attributes: name is EGRESSBPF_NAME.
const prefix = "EGRESSBPF_"

// longest bounds a field, of which containers can choose a part, and longestMessage the text of
// all.
const longest, longestMessage = 1024, 8192

// Enabled says whether what this process writes to its standard error goes to the journal,
// and the journal takes lines with fields.
func Enabled() bool {
	ok, err := journal.StderrIsJournalStream()
	return ok && err == nil && journal.Enabled()
}

// Handler is a [slog.Handler] that sends each line to the journal. The field MESSAGE is the
// line as text; each attribute has a field of its own.
type Handler struct {
	// instead takes what the journal does not.
	instead slog.Handler
	fields  map[string]string
	group   string
	// with repeats the calls of WithAttrs and WithGroup.
	with func(slog.Handler) slog.Handler
}

// New returns a Handler. Lines that the journal does not take, as while it restarts, go to
// instead.
func New(instead slog.Handler) *Handler {
	return &Handler{instead: instead, with: func(h slog.Handler) slog.Handler { return h }}
}

// Enabled implements [slog.Handler].
func (h *Handler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.instead.Enabled(ctx, level)
}

// WithAttrs implements [slog.Handler].
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	fields := maps.Clone(h.fields)
	if fields == nil {
		fields = map[string]string{}
	}
	for _, a := range attrs {
		add(fields, h.group, a)
	}
	return &Handler{h.instead.WithAttrs(attrs), fields, h.group, func(to slog.Handler) slog.Handler {
		return h.with(to).WithAttrs(attrs)
	}}
}

// WithGroup implements [slog.Handler].
func (h *Handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	return &Handler{h.instead.WithGroup(name), h.fields, h.group + name + "_", func(to slog.Handler) slog.Handler {
		return h.with(to).WithGroup(name)
	}}
}

// Handle implements [slog.Handler].
func (h *Handler) Handle(ctx context.Context, r slog.Record) error {
	fields := maps.Clone(h.fields)
	if fields == nil {
		fields = map[string]string{}
	}
	r.Attrs(func(a slog.Attr) bool {
		if len(h.group) == 0 && a.Key == MessageID {
			fields["MESSAGE_ID"] = a.Value.String()
		} else {
			add(fields, h.group, a)
		}
		return true
	})
	fields["SYSLOG_IDENTIFIER"] = "egressbpf"
	text, err := h.text(ctx, r)
	if err == nil {
		err = journal.Send(text, priority(r.Level), fields)
	}
	if err != nil {
		return h.instead.Handle(ctx, r)
	}
	return nil
}

// text returns the message and its attributes in the form of [slog.TextHandler], which quotes
// what others have chosen.
func (h *Handler) text(ctx context.Context, r slog.Record) (string, error) {
	var b bytes.Buffer
	to := h.with(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: r.Level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 {
			switch a.Key {
			case slog.TimeKey, slog.LevelKey, slog.MessageKey, MessageID:
				return slog.Attr{}
			}
		}
		return a
	}}))
	if err := to.Handle(ctx, r); err != nil {
		return "", err
	}
	return cut(strings.TrimSpace(r.Message+" "+strings.TrimSpace(b.String())), longestMessage), nil
}

// add adds the field of an attribute, or those of a group.
func add(fields map[string]string, group string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			group += a.Key + "_"
		}
		for _, inner := range v.Group() {
			add(fields, group, inner)
		}
		return
	}
	if a.Key == "" {
		return
	}
	fields[prefix+name(group+a.Key)] = cut(v.String(), longest)
}

func cut(s string, length int) string {
	return strings.ToValidUTF8(s[:min(len(s), length)], "\uFFFD")
}

// name makes the name of a field: the journal ignores others than of these characters.
func name(key string) string {
	key = strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToUpper(key))
	return key[:min(len(key), 64-len(prefix))]
}

// priority is that of syslog(3).
func priority(level slog.Level) journal.Priority {
	switch {
	case level >= slog.LevelError:
		return journal.PriErr
	case level >= slog.LevelWarn:
		return journal.PriWarning
	case level >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}
