package main

import (
	"fmt"
	"regexp"
	"strings"
)

// section is a heading of the changelog for a version: ## 1.2.3 - 2026-12-01, or ## Unreleased.
var section = regexp.MustCompile(`^## \[?v?(\S+?)\]?(?: - \d{4}-\d{2}-\d{2})?$`)

// link is a link into the repository, which means something else on a release's page.
var link = regexp.MustCompile(`\]\(([^):]+)\)`)

// releaseNotes returns the changelog's section of a version. A version before a release
// (v1.2.3-rc.1) can do without: what is unreleased is its section then.
func releaseNotes(changelog, version string) (string, error) {
	sections := map[string]string{}
	current := ""
	for line := range strings.Lines(changelog) {
		if strings.HasPrefix(line, "## ") {
			match := section.FindStringSubmatch(strings.TrimSpace(line))
			if match == nil {
				return "", fmt.Errorf("CHANGELOG.md: %q: want a heading such as ## 1.2.3 - 2026-12-01", strings.TrimSpace(line))
			}
			current = match[1]
			if _, twice := sections[current]; twice {
				return "", fmt.Errorf("CHANGELOG.md: two sections of %s", current)
			}
			sections[current] = ""
			continue
		}
		if current != "" {
			sections[current] += line
		}
	}
	number := strings.TrimPrefix(version, "v")
	text, ok := sections[number]
	if !ok && strings.Contains(number, "-") {
		text, ok = sections["Unreleased"]
	}
	text = strings.TrimSpace(text)
	if !ok || text == "" {
		return "", fmt.Errorf("CHANGELOG.md says nothing about %s: rename the section Unreleased to %s - DATE, and commit", version, number)
	}
	return link.ReplaceAllString(text, "]("+source+"/blob/"+version+"/$1)"), nil
}
