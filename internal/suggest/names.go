package suggest

import (
	"regexp"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// docker are the names that Docker gives to containers. A star in a name would make it a
// pattern.
var docker = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

var (
	// replica is a name that ends in a number: web-1, project-web-1, project_web_1.
	replica = regexp.MustCompile(`^(.*[a-zA-Z].*[-_.])[0-9]{1,5}$`)
	// random and uuid are names that end in what nobody chose: job-7f3a9c2e,
	// project-web-run-0123456789ab. Such a name does not come back.
	random = regexp.MustCompile(`^(.*[a-zA-Z].*[-_.])([0-9a-f]{8,}|[0-9]{6,})$`)
	uuid   = regexp.MustCompile(`^(.*[a-zA-Z].*[-_.])([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$`)
)

// patternFor returns the pattern for the containers that are started like the one with a name;
// empty if there is none. anew says that each of them has a name that does not come back.
func patternFor(name string) (pattern string, anew bool) {
	for _, r := range []*regexp.Regexp{uuid, random} {
		if m := r.FindStringSubmatch(name); m != nil && strings.ContainsAny(m[2], "0123456789") {
			return m[1] + "*", true
		}
	}
	if m := replica.FindStringSubmatch(name); m != nil {
		return m[1] + "*", false
	}
	return "", false
}

// matchesOther says whether a pattern matches a container that is known and that has none of
// the names.
func (o *Observation) matchesOther(pattern string, names []string) bool {
	rule := policy.ContainerRule{Name: pattern}
	return slices.ContainsFunc(o.containers, func(c *observed) bool {
		return rule.Matches(c.Subject()) && !slices.Contains(names, c.ruleName())
	})
}
