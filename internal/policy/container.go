package policy

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Access says whether something is open to a container.
type Access string

const (
	Allowed Access = "allow"
	Denied  Access = "block"
)

// ParseAccess reads allow or block.
func ParseAccess(s string) (Access, error) { return oneOf(s, Allowed, Denied) }

// ContainerRule is an exception to the policy for the containers with a name, an image or a
// label, or in a pod of Kubernetes. Whoever may start containers or make pods chooses all of
// these; in most clusters, but for the namespace.
type ContainerRule struct {
	// Name, Image and Label select containers: all that are not empty must match. A star
	// stands for any characters. Label is KEY or KEY=VALUE; for a container of a pod, of the
	// pod. The name of such a container is its name in the pod.
	Name  string `json:"name,omitempty" yaml:"name,omitempty"`
	Image string `json:"image,omitempty" yaml:"image,omitempty"`
	Label string `json:"label,omitempty" yaml:"label,omitempty"`
	// Namespace and Pod, with stars, and HostNetwork select containers of pods; HostNetwork
	// those of pods with the network of their node. Alone, that selects none.
	Namespace   string `json:"namespace,omitempty" yaml:"namespace,omitempty"`
	Pod         string `json:"pod,omitempty" yaml:"pod,omitempty"`
	HostNetwork bool   `json:"host_network,omitempty" yaml:"host_network,omitempty"`

	// SMTP is the containers' limit; nil for the policy's.
	SMTP *Limit `json:"smtp,omitempty" yaml:"smtp,omitempty"`
	// Metadata is Allowed if the containers may reach what the presets block. What Block
	// lists stays blocked.
	Metadata Access `json:"metadata,omitempty" yaml:"metadata,omitempty"`
	// Families are socket families that the containers may use in addition to the policy's;
	// empty for none.
	Families Families `json:"socket_families,omitempty" yaml:"socket_families,omitempty"`
}

// Subject holds what rules can match of a container.
type Subject struct {
	Names  []string
	Image  string
	Labels map[string]string
	// Namespace and Pod are empty for a container outside of pods.
	Namespace, Pod string
	HostNetwork    bool
	// PodUnknown is whether the container is in a pod of which no more is known, and
	// NetworkUnknown whether it is not known if the pod has the network of its node.
	PodUnknown, NetworkUnknown bool
}

// match is whether a rule holds for a container.
type match int

const (
	no match = iota
	yes
	// unsure is no, but a rule that comes later must not hold either: this one may be there to keep
	// it from the container.
	unsure
)

// Matches says whether the rule holds for a container.
func (r ContainerRule) Matches(s Subject) bool { return r.match(s) == yes }

func (r ContainerRule) match(s Subject) match {
	pod := r.matchPod(s)
	if pod == unsure && s.PodUnknown {
		return unsure // its names and image may be another source's
	}
	if r.Name != "" && !anyMatches(r.Name, s.Names) {
		return no
	}
	if r.Image != "" && !glob(r.Image, s.Image) {
		return no
	}
	return pod
}

// matchPod is match without what can differ between the containers of a pod.
func (r ContainerRule) matchPod(s Subject) match {
	// The labels of a pod are not those that an engine tells of its containers.
	if s.PodUnknown && (r.ofPods() || r.Label != "") {
		return unsure
	}
	key, value, valued := strings.Cut(r.Label, "=")
	if have, ok := s.Labels[key]; r.Label != "" && !(ok && (!valued || glob(value, have))) {
		return no
	}
	inPod := s.Namespace != "" && s.Pod != ""
	if r.ofPods() && !inPod {
		return no
	}
	if r.Namespace != "" && !glob(r.Namespace, s.Namespace) || r.Pod != "" && !glob(r.Pod, s.Pod) {
		return no
	}
	if r.HostNetwork && s.NetworkUnknown {
		return unsure
	}
	if r.HostNetwork && !s.HostNetwork {
		return no
	}
	return yes
}

// ofPods says whether the rule holds for containers of pods alone.
func (r ContainerRule) ofPods() bool { return r.Namespace != "" || r.Pod != "" || r.HostNetwork }

func anyMatches(pattern string, names []string) bool {
	for _, name := range names {
		if glob(pattern, name) {
			return true
		}
	}
	return false
}

// glob matches a pattern in which a star stands for any characters.
func glob(pattern, text string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == text
	}
	first, last := parts[0], parts[len(parts)-1]
	if !strings.HasPrefix(text, first) || len(text) < len(first)+len(last) || !strings.HasSuffix(text, last) {
		return false
	}
	text = text[len(first) : len(text)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		i := strings.Index(text, part)
		if i < 0 {
			return false
		}
		text = text[i+len(part):]
	}
	return true
}

// RuleFor returns the first rule that matches a container; the zero rule if none does.
func RuleFor(rules []ContainerRule, s Subject) ContainerRule {
	if i := RuleIndex(rules, s); i >= 0 {
		return rules[i]
	}
	return ContainerRule{}
}

// RuleIndex returns the index of the rule that [RuleFor] returns; -1 if no rule matches, or if it is
// not known whether an earlier one does.
func RuleIndex(rules []ContainerRule, s Subject) int {
	return first(rules, func(r ContainerRule) match { return r.match(s) })
}

// first returns the index of the first rule that matches; -1 if there is none, or if a rule before it
// may match.
func first(rules []ContainerRule, matches func(ContainerRule) match) int {
	for i, r := range rules {
		switch matches(r) {
		case yes:
			return i
		case unsure:
			return -1
		}
	}
	return -1
}

// RuleForPod returns the rule that holds for all containers of a pod, whatever their names and
// images are, of which the Subject may have none; the zero rule if there is none, or if it
// depends on these.
func RuleForPod(rules []ContainerRule, s Subject) ContainerRule {
	i := first(rules, func(r ContainerRule) match { return r.matchPod(s) })
	if i < 0 || rules[i].Name != "" || rules[i].Image != "" {
		return ContainerRule{}
	}
	return rules[i]
}

// Validate refuses a rule that the parser could not have returned.
func (r ContainerRule) Validate() error {
	if r.Name == "" && r.Image == "" && r.Label == "" && r.Namespace == "" && r.Pod == "" {
		if r.HostNetwork {
			return errors.New("host_network alone selects nothing, since each pod can ask for the network of its node: add a namespace, or a pod or label")
		}
		return errors.New("want a name, an image, a label, a namespace or a pod, to say which containers the rule is for")
	}
	if r.SMTP == nil && r.Metadata == "" && r.Families == "" {
		return errors.New("want smtp, metadata or socket_families, to say what holds for them")
	}
	if r.Families != "" {
		if _, err := ParseFamilies(string(r.Families)); err != nil {
			return fmt.Errorf("socket_families: %w", err)
		}
	}
	if r.SMTP != nil {
		if err := r.SMTP.Validate(); err != nil {
			return fmt.Errorf("smtp.%w", err)
		}
	}
	return nil
}

func parsePattern(s string) (string, error) {
	if s == "" {
		return "", errors.New("want a pattern, such as mailer-*")
	}
	return s, nil
}

// nameCharacters are the characters of Docker's names, and the star.
const nameCharacters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-*"

func parseNamePattern(s string) (string, error) {
	if path.Base("/"+s) != s || strings.ContainsFunc(s, func(r rune) bool { return !strings.ContainsRune(nameCharacters, r) }) {
		return "", fmt.Errorf("%q: want a container's name, in which a star stands for any characters", s)
	}
	return s, nil
}

// podCharacters are the characters of the names of namespaces and pods, and the star.
const podCharacters = "abcdefghijklmnopqrstuvwxyz0123456789.-*"

func parsePodPattern(s string) (string, error) {
	if s == "" || strings.ContainsFunc(s, func(r rune) bool { return !strings.ContainsRune(podCharacters, r) }) {
		return "", fmt.Errorf("%q: want a name as Kubernetes has them, in which a star stands for any characters", s)
	}
	return s, nil
}

func parseTrue(s string) (bool, error) {
	if s != "true" {
		return false, fmt.Errorf("%q: want true, or no such key for pods with any network", s)
	}
	return true, nil
}

func parseLabel(s string) (string, error) {
	if key, _, _ := strings.Cut(s, "="); key == "" || strings.Contains(key, "*") {
		return "", fmt.Errorf("%q: want KEY or KEY=VALUE, with stars in VALUE only", s)
	}
	return s, nil
}

// setContainer stores one entry of the list containers.
func setContainer(r *ContainerRule, def Limit) setter {
	return func(at position, n *yaml.Node) error {
		limit := def
		err := fields{
			{"name", value(&r.Name, parseNamePattern)},
			{"image", value(&r.Image, parsePattern)},
			{"label", value(&r.Label, parseLabel)},
			{"namespace", value(&r.Namespace, parsePodPattern)},
			{"pod", value(&r.Pod, parsePodPattern)},
			{"host_network", value(&r.HostNetwork, parseTrue)},
			{"metadata", value(&r.Metadata, ParseAccess)},
			{"socket_families", familiesOf(&r.Families)},
			{"smtp", func(at position, n *yaml.Node) error {
				r.SMTP = &limit
				if err := (fields{{"rate", value(&limit.Rate, ParseRate)}, {"burst", value(&limit.Burst, parseBurst)}}).set(at, n); err != nil {
					return err
				}
				if err := limit.validateBurst(); err != nil {
					return at.under("burst").errorf(lookup(n, "burst"), "%w", err)
				}
				return nil
			}},
		}.set(at, n)
		if err != nil {
			return err
		}
		if err := r.Validate(); err != nil {
			return at.errorf(n, "%w", err)
		}
		return nil
	}
}

// containerRules stores the list containers.
func containerRules(dst *[]ContainerRule, def Limit) setter {
	return func(at position, n *yaml.Node) error {
		entries, err := at.sequence(n)
		if err != nil {
			return err
		}
		rules := make([]ContainerRule, len(entries))
		for i, entry := range entries {
			if err := setContainer(&rules[i], def)(at, entry); err != nil {
				return err
			}
		}
		*dst = rules
		return nil
	}
}
