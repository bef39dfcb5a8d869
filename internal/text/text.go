// Package text makes what containers say safe to print: they choose names, and a terminal
// obeys what names could contain.
package text

import (
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
