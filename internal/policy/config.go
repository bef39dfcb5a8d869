package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"sort"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/notify"
)

// Config is what the config file holds.
type Config struct {
	// Cgroups are the absolute paths of the cgroups to police. If empty, those that are
	// policed already, else the root.
	Cgroups []string `json:"cgroups" yaml:"cgroups"`
	// Notify is who is told of refusals. The targets have secrets, so they are not part of the
	// Policy, which everybody who may read the filter can read.
	Notify []notify.Target `json:"-" yaml:"-"`
	Policy `yaml:",inline"`
}

// ParseConfig reads the YAML of a config file over the defaults. A key that is
// absent keeps its default; an empty list is an empty list. ParseConfig refuses unknown
// and repeated keys, keys without a value, YAML tags and merges, a second document, and
// every malformed value. Errors begin with "name:line: key: ".
func ParseConfig(name string, data []byte) (Config, error) {
	cfg := Config{Cgroups: []string{}, Policy: Default()}
	at := position{file: name}
	in := &lineReader{data: data}
	docs, err := documents(in)
	switch {
	case err != nil:
		return Config{}, syntaxError(name, data, in.read, err)
	case len(docs) == 0: // nothing but comments
		return cfg, nil
	case len(docs) > 1:
		return Config{}, at.errorf(docs[1], "a second document begins here: want one")
	}
	smtp := &cfg.SMTP
	limit := fields{
		{"ports", list(&smtp.Ports, ParsePort, sortPorts)},
		{"rate", value(&smtp.Rate, ParseRate)},
		{"burst", value(&smtp.Burst, parseBurst)},
		{"over_limit", value(&smtp.OverLimit, ParseOverLimit)},
		{"exempt", list(&smtp.Exempt, ParsePrefix, distinct)},
	}
	// Their limits start from the values of smtp, wherever that key is in the file.
	containers := func() error { return nil }
	err = fields{
		{"mode", value(&cfg.Mode, ParseMode)},
		{"cgroups", list(&cfg.Cgroups, parseCgroup, distinct)},
		{"presets", list(&cfg.Presets, parsePreset, ParsePresets)},
		{"block", list(&cfg.Block, ParseRule, distinct)},
		{"allow", list(&cfg.Allow, ParseRule, distinct)},
		{"allow_dns", value(&cfg.AllowDNS, parseBool)},
		{"socket_families", familiesOf(&cfg.Families)},
		{"host_side", value(&cfg.HostSide, ParseSwitch)},
		{"host_devices", list(&cfg.HostDevices, ParseDevice, distinct)},
		{"scopes", list(&cfg.Scopes, cgroup.ParseScope, finishScopes)},
		{"smtp", func(at position, n *yaml.Node) error {
			if err := limit.set(at, n); err != nil {
				return err
			}
			// Only a burst from the file can be too large for its rate.
			if err := smtp.Limit().validateBurst(); err != nil {
				return at.under("burst").errorf(lookup(n, "burst"), "%w", err)
			}
			return nil
		}},
		{"notify", list(&cfg.Notify, notify.Parse, notify.Distinct)},
		{"containers", func(at position, n *yaml.Node) error {
			containers = func() error { return containerRules(&cfg.Containers, smtp.Limit())(at, n) }
			return nil
		}},
	}.set(at, docs[0])
	if err == nil {
		err = containers()
	}
	if err != nil {
		return Config{}, err
	}
	return cfg, nil
}

func parsePreset(s string) (string, error) { return s, checkPreset(s) }

func parseCgroup(s string) (string, error) {
	if !path.IsAbs(s) || strings.ContainsRune(s, 0) {
		return "", fmt.Errorf("%q: want an absolute path such as /sys/fs/cgroup/docker", s)
	}
	return path.Clean(s), nil
}

func parseBurst(s string) (uint32, error) {
	n, ok := number(s, 1, maxBurst)
	if !ok {
		return 0, fmt.Errorf("%q: want a number from 1 to %d", s, maxBurst)
	}
	return uint32(n), nil
}

// parseBool accepts only true and false: YAML 1.1 and 1.2 disagree about other spellings.
func parseBool(s string) (bool, error) {
	if s != "true" && s != "false" {
		return false, fmt.Errorf("%q: want true or false", s)
	}
	return s == "true", nil
}

func distinct[T comparable](list []T) ([]T, error) { return unique(list), nil }

// documents returns up to two documents: one more than is allowed.
func documents(r io.Reader) (docs []*yaml.Node, err error) {
	dec := yaml.NewDecoder(r)
	for len(docs) < 2 {
		var n yaml.Node
		if err := dec.Decode(&n); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		docs = append(docs, &n)
	}
	return docs, nil
}

var yamlPrefix = regexp.MustCompile(`^yaml: (line \d+: )?`)

// syntaxError adds the line to an error of the library. The line that the library
// names is that of the enclosing block, counted from 0 or 1 depending on the error, or
// missing. A better line is the one at which the file stops being YAML: the first one
// after the longest run of whole lines that parses. syntaxError looks for it backwards
// from where the parser stopped, since a quote or bracket that is never closed is wrong
// where it was opened.
func syntaxError(name string, data []byte, read int, err error) error {
	parses := func(lines int) bool {
		end := 0
		for range lines {
			end += bytes.IndexByte(data[end:], '\n') + 1
		}
		_, err := documents(bytes.NewReader(data[:end]))
		return err == nil
	}
	const patience = 100 // lines, each of which costs a parse
	line := bytes.Count(data[:read], []byte("\n"))
	far := line - patience
	for line > max(far, 0) && !parses(line) {
		line--
	}
	if far > 0 && line == far {
		// Then by bisection. A bracket that spans many lines can mislead it.
		line = sort.Search(far+1, func(n int) bool { return !parses(n) }) - 1
	}
	return fmt.Errorf("%s:%d: not YAML: %s", name, line+1, yamlPrefix.ReplaceAllString(err.Error(), ""))
}

// lineReader returns one line at a time, so that read shows how far the parser got: the
// line in which it stopped, apart from what it reads ahead.
type lineReader struct {
	data []byte
	read int // bytes
}

func (r *lineReader) Read(p []byte) (int, error) {
	if r.read == len(r.data) {
		return 0, io.EOF
	}
	line := r.data[r.read:]
	if i := bytes.IndexByte(line, '\n'); i >= 0 {
		line = line[:i+1]
	}
	n := copy(p, line)
	r.read += n
	return n, nil
}

// position is where a value is in the file, for errors.
type position struct{ file, key string }

func (at position) under(key string) position {
	if at.key != "" {
		key = at.key + "." + key
	}
	return position{at.file, key}
}

func (at position) errorf(n *yaml.Node, format string, args ...any) error {
	where := fmt.Sprintf("%s:%d: ", at.file, n.Line)
	if at.key != "" {
		where += at.key + ": "
	}
	return fmt.Errorf("%s%w", where, fmt.Errorf(format, args...))
}

// setter stores the value of one key.
type setter func(at position, n *yaml.Node) error

// fields are the keys that a mapping may have. The mapping is walked as nodes instead of
// decoded, since only nodes have the line of each value.
type fields []struct {
	key string
	set setter
}

func (f fields) names() []string {
	var names []string
	for _, field := range f {
		names = append(names, field.key)
	}
	return names
}

// set stores every key of the mapping n. An empty mapping, as when all keys are commented
// out, changes nothing.
func (f fields) set(at position, n *yaml.Node) error {
	n, err := at.resolve(n)
	if err != nil || n.ShortTag() == nullTag {
		return err
	}
	if n.Kind != yaml.MappingNode {
		return at.errorf(n, "want keys and values: %s", strings.Join(f.names(), ", "))
	}
	lines := map[string]int{}
	for i := 0; i < len(n.Content); i += 2 {
		key, err := at.resolve(n.Content[i])
		if err != nil {
			return err
		}
		if key.Kind != yaml.ScalarNode {
			return at.errorf(key, "want one of the keys %s", strings.Join(f.names(), ", "))
		}
		here := at.under(key.Value)
		if line, ok := lines[key.Value]; ok {
			return here.errorf(key, "already set on line %d", line)
		}
		lines[key.Value] = key.Line
		if err := f.setOne(here, key, n.Content[i+1]); err != nil {
			return err
		}
	}
	return nil
}

func (f fields) setOne(at position, key, v *yaml.Node) error {
	for _, field := range f {
		if field.key == key.Value {
			return field.set(at, v)
		}
	}
	return at.errorf(key, "unknown key%s; want %s", suggest(key.Value, f.names()), strings.Join(f.names(), ", "))
}

// value stores a single value.
func value[T any](dst *T, parse func(string) (T, error)) setter {
	return func(at position, n *yaml.Node) (err error) {
		*dst, err = scalar(at, n, parse)
		return err
	}
}

// list stores a list that finish has checked and put in order.
func list[T any](dst *[]T, parse func(string) (T, error), finish func([]T) ([]T, error)) setter {
	return func(at position, n *yaml.Node) error {
		entries, err := at.sequence(n)
		if err != nil {
			return err
		}
		values := make([]T, 0, len(entries))
		for _, entry := range entries {
			v, err := scalar(at, entry, parse)
			if err != nil {
				return err
			}
			values = append(values, v)
		}
		if values, err = finish(values); err != nil {
			return at.errorf(n, "%w", err)
		}
		*dst = values
		return nil
	}
}

// familiesOf stores socket families, given as one value or as a list.
func familiesOf(dst *Families) setter {
	return func(at position, n *yaml.Node) error {
		r, err := at.resolve(n)
		if err != nil {
			return err
		}
		if r.Kind != yaml.SequenceNode || len(r.Content) == 0 {
			return value(dst, ParseFamilies)(at, n)
		}
		var names []string
		for _, entry := range r.Content {
			name, err := scalar(at, entry, ParseFamilies)
			if err != nil {
				return err
			}
			names = append(names, string(name))
		}
		if *dst, err = ParseFamilies(strings.Join(names, ",")); err != nil {
			return at.errorf(n, "%w", err)
		}
		return nil
	}
}

// sequence returns the entries of the list n.
func (at position) sequence(n *yaml.Node) ([]*yaml.Node, error) {
	n, err := at.resolve(n)
	if err != nil {
		return nil, err
	}
	if n.ShortTag() == nullTag {
		return nil, at.errorf(n, "want a list: [] for an empty one, or leave the key out for the default")
	}
	if n.Kind != yaml.SequenceNode {
		return nil, at.errorf(n, "want a list, in brackets or with a dash before each entry")
	}
	return n.Content, nil
}

func scalar[T any](at position, n *yaml.Node, parse func(string) (T, error)) (v T, err error) {
	if n, err = at.resolve(n); err != nil {
		return v, err
	}
	switch {
	case n.ShortTag() == nullTag:
		return v, at.errorf(n, "want a value")
	case n.Kind != yaml.ScalarNode:
		// IPv6 addresses have brackets and colons, which mean something in YAML.
		return v, at.errorf(n, "want a single value; put quotes around one with brackets or colons")
	}
	if v, err = parse(n.Value); err != nil {
		return v, at.errorf(n, "%w", err)
	}
	return v, nil
}

const nullTag = "!!null"

// resolve returns the node that n stands for.
func (at position) resolve(n *yaml.Node) (*yaml.Node, error) {
	if n.Kind == yaml.DocumentNode {
		n = n.Content[0]
	}
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Style&yaml.TaggedStyle != 0 {
		return nil, at.errorf(n, "the tag %s has no meaning here: leave it out", n.Tag)
	}
	return n, nil
}

// lookup returns the value of a key that [fields.set] has seen in n, or n if an
// alias hides the key.
func lookup(n *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return n
}
