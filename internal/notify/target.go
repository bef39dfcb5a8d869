// Package notify sends messages to the targets that the config file names: mail, Slack, ntfy,
// Telegram and webhooks.
//
// The URL of a target holds passwords and tokens. Nothing but the process that sends sees
// them: a [Target] prints as its service and host, and errors have all of them removed.
package notify

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/nicholas-fedor/shoutrrr/pkg/services/chat/slack"
	"github.com/nicholas-fedor/shoutrrr/pkg/services/chat/telegram"
	"github.com/nicholas-fedor/shoutrrr/pkg/services/email/smtp"
	"github.com/nicholas-fedor/shoutrrr/pkg/services/push/ntfy"
	"github.com/nicholas-fedor/shoutrrr/pkg/services/specialized/generic"
	"github.com/nicholas-fedor/shoutrrr/pkg/types"
)

// MaxTargets is how many targets there may be.
const MaxTargets = 20

// services are those that a URL can name. Only services are here whose markup cannot come from
// a message, and that reach nobody when they are set up.
var services = []service{
	{"generic", func() types.Service { return &generic.Service{} }, true},
	{"ntfy", func() types.Service { return &ntfy.Service{} }, true},
	{"slack", func() types.Service { return &slack.Service{} }, false},
	{"smtp", func() types.Service { return &smtp.Service{} }, true},
	{"telegram", func() types.Service { return &telegram.Service{} }, false},
}

type service struct {
	scheme string
	new    func() types.Service
	// host is whether the URL's host is a host. In others it can be a secret.
	host bool
}

const wanted = "generic+https://, ntfy://, slack://, smtp:// or telegram://"

// Target is where messages go. It has been checked by [Parse].
type Target struct{ url string }

// URL returns the whole URL with its secrets.
func (t Target) URL() string { return t.url }

// String returns the service and its host, without secrets.
func (t Target) String() string {
	u, s, err := split(t.url)
	switch {
	case err != nil:
		return "no target"
	case s.host:
		return s.scheme + "://" + u.Host
	}
	return s.scheme
}

// GoString is String, so that no format shows the secrets.
func (t Target) GoString() string { return t.String() }

// Parse reads a URL of shoutrrr, such as ntfy://ntfy.sh/TOPIC. Errors have no secrets of it.
func Parse(text string) (Target, error) {
	if _, err := open(text); err != nil {
		return Target{}, err
	}
	return Target{text}, nil
}

// split returns a URL and its service.
func split(text string) (*url.URL, service, error) {
	u, err := url.Parse(text)
	if err != nil || !strings.Contains(text, "://") {
		// The library's error shows the URL.
		return nil, service{}, errors.New("not a URL: want one that begins with " + wanted)
	}
	scheme, _, _ := strings.Cut(u.Scheme, "+")
	i := slices.IndexFunc(services, func(s service) bool { return s.scheme == scheme })
	if i < 0 {
		return nil, service{}, fmt.Errorf("unknown service %q: want %s", u.Scheme, wanted)
	}
	return u, services[i], nil
}

// open returns the service of a URL, ready to send.
func open(text string) (types.Service, error) {
	u, s, err := split(text)
	if err != nil {
		return nil, err
	}
	refuse := func(format string, args ...any) (types.Service, error) {
		return nil, fmt.Errorf(s.scheme+": "+format, args...)
	}
	if s.host && u.Hostname() == "" {
		return refuse("want a host after ://")
	}
	// The libraries would use the default port.
	if n, err := strconv.ParseUint(u.Port(), 10, 16); u.Port() != "" && (err != nil || n == 0) {
		return refuse("want a port from 1 to 65535")
	}
	if _, err := url.ParseQuery(u.RawQuery); err != nil {
		return refuse("malformed options after ?: characters such as %% and ; have to be written as %%25 and %%3B")
	}
	if s.scheme == "generic" {
		if t := u.Query().Get("template"); t != "" && !strings.EqualFold(t, "json") {
			return refuse("unknown template: want json, or none to send the text alone")
		}
	}
	opened := s.new()
	if _, custom, ok := strings.Cut(u.Scheme, "+"); ok {
		own, can := opened.(types.CustomURLService)
		if !can || custom != "http" && custom != "https" {
			return refuse("want %s", wanted)
		}
		if u, err = own.GetConfigURLFromCustom(u); err != nil {
			return refuse("%s", scrub(text, err.Error()))
		}
	}
	if err := opened.Initialize(u, nil); err != nil {
		return refuse("%s", scrub(text, err.Error()))
	}
	return opened, nil
}

// Distinct checks and returns the targets of a config file, each once; nil if there are none.
func Distinct(targets []Target) ([]Target, error) {
	var all []Target
	for _, t := range targets {
		if !slices.Contains(all, t) {
			all = append(all, t)
		}
	}
	if len(all) > MaxTargets {
		return nil, fmt.Errorf("%d targets: want at most %d", len(all), MaxTargets)
	}
	return all, nil
}
