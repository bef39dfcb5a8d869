package notify

import (
	"cmp"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

const (
	mask = "***"
	// shortest is the length of a part of a URL below which it is not taken out of texts: it
	// would be found everywhere.
	shortest = 4
	// piece is the same for the letters and digits between other characters, which services
	// put together in another way.
	piece = 6
	// longest bounds the text of an error, of which servers choose a part.
	longest = 300
)

// scrub makes a line of a text that says what went wrong with a URL, without what may be
// secret in the URL: everything but the service and the host.
func scrub(raw, text string) string {
	secrets, hopeless := secretsOf(raw)
	if hopeless {
		return "refused (its password is too short to tell why without showing it)"
	}
	for _, secret := range secrets {
		text = strings.ReplaceAll(text, secret, mask)
	}
	text = strings.Join(strings.FieldsFunc(text, func(r rune) bool { return unicode.IsSpace(r) }), " ")
	text = strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, text)
	if runes := []rune(text); len(runes) > longest {
		text = string(runes[:longest]) + "..."
	}
	return text
}

// secretsOf returns what may be secret in a URL, in every spelling, the longest first. hopeless
// means that a password is so short that it cannot be taken out of a text.
func secretsOf(raw string) (secrets []string, hopeless bool) {
	u, s, err := split(raw)
	_, rest, _ := strings.Cut(raw, "://")
	// The host is told anyway, but for a password that happens to be the same.
	host := ""
	if err == nil && s.host {
		host = u.Host
	}
	found := map[string]bool{}
	add := func(parts ...string) {
		for _, part := range parts {
			if len(part) < shortest {
				continue
			}
			quoted := strconv.Quote(part)
			for _, spelling := range []string{part, url.QueryEscape(part), url.PathEscape(part), quoted[1 : len(quoted)-1]} {
				found[spelling] = true
			}
			for _, p := range strings.FieldsFunc(part, func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) }) {
				if len(p) >= piece && !strings.Contains(host, p) {
					found[p] = true
				}
			}
		}
	}
	add(raw, rest)
	if err != nil {
		return sorted(found), false
	}
	if u.User != nil {
		password, _ := u.User.Password()
		hopeless = password != "" && len(password) < shortest
		before, _, _ := strings.Cut(rest, "@")
		// Telegram's and Slack's tokens are in both.
		add(before, u.User.String(), u.User.Username()+":"+password, u.User.Username(), password)
	}
	if !s.host {
		add(u.Host)
	}
	add(u.Path, u.EscapedPath(), u.RawQuery, u.Fragment)
	add(strings.Split(u.Path, "/")...)
	for _, values := range u.Query() {
		add(values...)
	}
	// These are in URLs of Slack and Telegram, and in those of their servers.
	for _, word := range []string{s.scheme, "hook", "webhook"} {
		delete(found, word)
	}
	return sorted(found), hopeless
}

func sorted(found map[string]bool) (all []string) {
	for s := range found {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b string) int { return cmp.Or(cmp.Compare(len(b), len(a)), strings.Compare(a, b)) })
	return all
}
