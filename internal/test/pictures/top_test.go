package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSVG(t *testing.T) {
	for screen, want := range map[string]string{
		"a  b ":                           `<text x="14" y="29" textLength="9">a</text>|<text x="41" y="29" textLength="9">b</text>`,
		"a\x1b[31m \x1b[39m\x1b[0mb":      `<text x="14" y="29" textLength="9">a</text>|<text x="32" y="29" textLength="9">b</text>`,
		"\x1b[4ma\x1b[4m b":               `<text x="14" y="29" textLength="27" text-decoration="underline">a` + "\u00a0" + `b</text>`,
		"\n <&'>":                         `<text x="23" y="48" textLength="36">&lt;&amp;&#39;&gt;</text>`,
		"a\x1b[1;31mb":                    `<text x="14" y="29" textLength="9">a</text>|<text x="23" y="29" textLength="9" fill="#ff7b72" font-weight="bold">b</text>`,
		"\x1b[2;4;93ma\n\x1b[22;24;39mb":  `<text x="14" y="29" textLength="9" fill="#e3b341" fill-opacity="0.6" text-decoration="underline">a</text>|<text x="14" y="48" textLength="9">b</text>`,
		"\x1b[7ma\x1b[27;44mb\x1b[0;100m": `<rect x="14" y="14" width="9" height="19" fill="#e6edf3"/>|<text x="14" y="29" textLength="9" fill="#161b22">a</text>|<rect x="23" y="14" width="9" height="19" fill="#58a6ff"/>|<text x="23" y="29" textLength="9">b</text>`,
		"\x1b[7;31m \x1b[m ":              `<rect x="14" y="14" width="9" height="19" fill="#ff7b72"/>`,
		"日e\u0301x":                       `<text x="14" y="29" textLength="18">日</text>|<text x="32" y="29" textLength="18">` + "e\u0301" + `x</text>`,
		strings.Repeat("\n", lines-1):     "",
	} {
		drawn, err := svg(screen)
		check(t, err)
		_, got, _ := strings.Cut(drawn, "<g ")
		_, got, _ = strings.Cut(got, ">\n")
		got = strings.ReplaceAll(strings.TrimSuffix(strings.TrimSuffix(got, "</g>\n</svg>\n"), "\n"), "\n", "|")
		if got != want {
			t.Errorf("%q: got\n%s\nwant\n%s", screen, got, want)
		}
	}
	for _, screen := range []string{
		"\x1b[3m", "\x1b[4:3m", "\x1b[38;5;1m", "\x1b[?1m", "\x1b[1", "\x1b[2J", "\x1b]0;title\a", "\x0e", "\x1b(0", "\t", "\r", "\x7f", "\xff", "\u0085",
		strings.Repeat("x", columns+1), strings.Repeat("x", columns-1) + "日", strings.Repeat("\n", lines) + "x",
	} {
		if drawn, err := svg("a" + screen); err == nil {
			t.Errorf("%q is drawn as\n%s", screen, drawn)
		}
	}
}

// Two drawings are the same, and show what the page shows.
func TestTop(t *testing.T) {
	var all [2]map[string]string
	for i := range all {
		dir := t.TempDir()
		check(t, drawTop(t.Context(), dir))
		all[i] = map[string]string{}
		for _, name := range []string{"top", "top-details"} {
			b, err := os.ReadFile(filepath.Join(dir, name+".svg"))
			check(t, err)
			all[i][name] = string(b)
			if all[0][name] != all[i][name] {
				t.Errorf("%s is not the same again:\n%s\n%s", name, all[0][name], b)
			}
		}
	}
	want := map[string][]string{"top": {"NOW/S", "3.0", "168.63.129.16:80"}, "top-details": {id(0), "tcpdump[4299],", "socket_families", "[fd00:ec2::254]:80/tcp"}}
	for _, c := range containers {
		want["top"] = append(want["top"], c.name)
	}
	for name, texts := range want {
		for _, text := range texts {
			if !strings.Contains(all[0][name], text+"</text>") {
				t.Errorf("%s: %q is missing in\n%s", name, text, all[0][name])
			}
		}
	}
}
