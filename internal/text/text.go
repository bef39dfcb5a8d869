// Package text makes what containers and engines say safe to print: they choose names, and a terminal
// obeys what names could contain.
package text

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Visible replaces a character that a terminal would obey, but for newlines and tabs. It is
// for strings.Map, which also replaces bytes that are not UTF-8.
func Visible(r rune) rune {
	if !strconv.IsPrint(r) && r != '\n' && r != '\t' {
		return utf8.RuneError
	}
	return r
}

// Printable returns a name as it is, or quoted as in Go if it is empty, is not UTF-8 or has
// characters that a terminal would obey.
func Printable(s string) string {
	if s == "" || !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

// longest limits names and similar texts, in bytes; engines themselves have no limit.
const longest = 1024

// Clean returns s, or "" if s is too long for a name or has characters that could control a
// terminal.
func Clean(s string) string {
	if len(s) > longest || strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return ""
	}
	return s
}

// Tame makes an error safe to show whose text an engine may have written. It wraps err.
func Tame(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		// Libraries say more, such as an address in escaped form.
		return fmt.Errorf("no answer in time: %w", context.DeadlineExceeded)
	}
	const shown = 300
	text := strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, err.Error())
	if len(text) > shown {
		text = strings.ToValidUTF8(text[:shown], "") + "…"
	}
	return &tamed{text, err}
}

type tamed struct {
	text string
	error
}

func (t *tamed) Error() string { return t.text }
func (t *tamed) Unwrap() error { return t.error }
