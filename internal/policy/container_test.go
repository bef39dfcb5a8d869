package policy

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestContainerRuleMatches(t *testing.T) {
	web := Subject{
		Names: []string{"web", "shop-web-1"}, Image: "registry.example:5000/shop/web:1.2",
		Labels: map[string]string{"com.example.metadata": "yes", "empty": ""},
	}
	for _, tt := range []struct {
		rule ContainerRule
		want bool
	}{
		{ContainerRule{Name: "web"}, true},
		{ContainerRule{Name: "shop-*"}, true},
		{ContainerRule{Name: "*-web-*"}, true},
		{ContainerRule{Name: "*"}, true},
		{ContainerRule{Name: "we"}, false},
		{ContainerRule{Name: "web?"}, false},
		{ContainerRule{Name: "[w]eb"}, false},
		{ContainerRule{Name: "Web"}, false},
		{ContainerRule{Name: "w*eb*b"}, false},
		{ContainerRule{Image: "registry.example:5000/shop/*"}, true},
		{ContainerRule{Image: "*/web:*"}, true},
		{ContainerRule{Image: "shop/web"}, false},
		{ContainerRule{Label: "com.example.metadata=yes"}, true},
		{ContainerRule{Label: "com.example.metadata=y*"}, true},
		{ContainerRule{Label: "com.example.metadata"}, true},
		{ContainerRule{Label: "com.example.metadata="}, false},
		{ContainerRule{Label: "com.example.metadata=no"}, false},
		{ContainerRule{Label: "empty="}, true},
		{ContainerRule{Label: "empty"}, true},
		{ContainerRule{Label: "missing="}, false},
		{ContainerRule{Name: "web", Image: "*", Label: "empty"}, true},
		{ContainerRule{Name: "db", Image: "*"}, false},
		{ContainerRule{Name: "*", Label: "missing"}, false},
	} {
		if got := tt.rule.Matches(web); got != tt.want {
			t.Errorf("%+v: got %t", tt.rule, got)
		}
	}
	first := ContainerRule{Name: "shop-*", Metadata: Allowed}
	if got := RuleFor([]ContainerRule{{Name: "db"}, first, {Name: "*"}}, web); got != first {
		t.Errorf("got %+v, want the first that matches", got)
	}
	if got := RuleFor([]ContainerRule{{Name: "db"}}, web); got != (ContainerRule{}) {
		t.Errorf("got %+v, want none", got)
	}
}

func TestParseContainerRules(t *testing.T) {
	const text = `containers:
  - name: "mailer-*"
    smtp: {rate: 120/minute, burst: 30}
  - label: "com.example.metadata=yes"
    metadata: allow
  - image: "bulk:*"
    smtp: {rate: 50/hour}
    metadata: block
  - name: dhcp
    socket_families: packet, can
  - name: balancer
    socket_families: [packet, can]
  - namespace: kube-system
    host_network: true
    pod: "cni-*"
    metadata: allow
  - namespace: "kube-*"
    image: "*"
    label: app
    socket_families: any
smtp: {burst: 7}
`
	got, err := ParseConfig("config.yaml", []byte(text))
	want := []ContainerRule{
		{Name: "mailer-*", SMTP: &Limit{Rate{120, time.Minute}, 30}},
		{Label: "com.example.metadata=yes", Metadata: Allowed},
		{Image: "bulk:*", SMTP: &Limit{Rate{50, time.Hour}, 7}, Metadata: Denied},
		{Name: "dhcp", Families: "can,packet"},
		{Name: "balancer", Families: "can,packet"},
		{Namespace: "kube-system", HostNetwork: true, Pod: "cni-*", Metadata: Allowed},
		{Namespace: "kube-*", Image: "*", Label: "app", Families: AnyFamily},
	}
	if err != nil || !reflect.DeepEqual(got.Containers, want) {
		t.Fatalf("got %+v, %v, want %+v", got.Containers, err, want)
	}

	for _, tt := range []struct{ entry, want string }{
		{"{smtp: {rate: 1/day}}", "config.yaml:2: containers: want a name, an image, a label, a namespace or a pod"},
		{"{host_network: true, metadata: allow}", "config.yaml:2: containers: host_network alone selects nothing"},
		{"{namespace: a, host_network: false, metadata: allow}", `config.yaml:2: containers.host_network: "false": want true`},
		{"{namespace: '', metadata: allow}", `config.yaml:2: containers.namespace: ""`},
		{"{namespace: a/b, metadata: allow}", `config.yaml:2: containers.namespace: "a/b"`},
		{"{pod: Web, metadata: allow}", `config.yaml:2: containers.pod: "Web": want a name as Kubernetes has them`},
		{"{name: a}", "config.yaml:2: containers: want smtp, metadata or socket_families"},
		{"", "config.yaml:2: containers: want a name"},
		{"web", "config.yaml:2: containers: want keys and values: name, image, label, namespace, pod, host_network, metadata, socket_families, smtp"},
		{"{name: a/b, metadata: allow}", `config.yaml:2: containers.name: "a/b"`},
		{"{name: '', metadata: allow}", `config.yaml:2: containers.name: ""`},
		{"{image: '', metadata: allow}", `config.yaml:2: containers.image: want a pattern`},
		{"{label: =x, metadata: allow}", `config.yaml:2: containers.label: "=x"`},
		{"{label: 'a*', metadata: allow}", `config.yaml:2: containers.label: "a*"`},
		{"{name: a, metadata: yes}", `config.yaml:2: containers.metadata: "yes": want allow or block`},
		{"{name: a b, metadata: allow}", `config.yaml:2: containers.name: "a b": want a container's name`},
		{"{name: a, socket_families: [packet, unix]}", `config.yaml:2: containers.socket_families: "unix": no such family`},
		{"{name: a, socket_families: [packet, any]}", `config.yaml:2: containers.socket_families: "any": no such family`},
		{"{name: a, socket_families: []}", `config.yaml:2: containers.socket_families: want a single value`},
		{"{name: a, socket_families: unix}", `config.yaml:2: containers.socket_families: "unix": no such family`},
		{"{name: a, smtp: {rate: 5}}", `config.yaml:2: containers.smtp.rate: "5"`},
		{"{name: a, smtp: {rate: 1/day, burst: 1000000}}", `config.yaml:2: containers.smtp.burst: `},
		{"{name: a, smtp: {ports: [25]}}", `config.yaml:2: containers.smtp.ports: unknown key`},
		{"{nam: a, metadata: allow}", `config.yaml:2: containers.nam: unknown key (did you mean "name"?)`},
	} {
		_, err := ParseConfig("config.yaml", []byte("containers:\n  - "+tt.entry+"\n"))
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %s…", tt.entry, err, tt.want)
		}
	}
	if _, err := ParseConfig("config.yaml", []byte("containers: {name: a}\n")); err == nil || !strings.Contains(err.Error(), "want a list") {
		t.Errorf("got %v, want a list asked for", err)
	}
}

// Rules for pods hold for no other container, and what holds for a whole pod does not depend on
// what its containers choose.
func TestRulesForPods(t *testing.T) {
	agent := Subject{Names: []string{"agent"}, Image: "agent:1", Labels: map[string]string{"app": "cni"}, Namespace: "kube-system", Pod: "cni-x7k2p", HostNetwork: true}
	plain := agent
	plain.HostNetwork = false
	// Whoever starts a container with Docker chooses its labels.
	docker := Subject{Names: []string{"kube-system"}, Labels: map[string]string{"io.kubernetes.pod.namespace": "kube-system", "app": "cni"}}
	for _, tt := range []struct {
		rule                 ContainerRule
		agent, plain, docker bool
	}{
		{ContainerRule{Namespace: "kube-system"}, true, true, false},
		{ContainerRule{Namespace: "kube-*"}, true, true, false},
		{ContainerRule{Namespace: "*"}, true, true, false},
		{ContainerRule{Namespace: "kube"}, false, false, false},
		{ContainerRule{Namespace: "kube-system", HostNetwork: true}, true, false, false},
		{ContainerRule{Pod: "cni-*"}, true, true, false},
		{ContainerRule{Pod: "*", Namespace: "team"}, false, false, false},
		{ContainerRule{Label: "app=cni"}, true, true, true},
		{ContainerRule{Label: "app", HostNetwork: true}, true, false, false},
		{ContainerRule{Namespace: "kube-system", Name: "agent"}, true, true, false},
		{ContainerRule{Namespace: "kube-system", Name: "other"}, false, false, false},
		{ContainerRule{HostNetwork: true}, true, false, false},
	} {
		if a, p, d := tt.rule.Matches(agent), tt.rule.Matches(plain), tt.rule.Matches(docker); a != tt.agent || p != tt.plain || d != tt.docker {
			t.Errorf("%+v: got %v, %v, %v", tt.rule, a, p, d)
		}
	}
	all := []ContainerRule{
		{Namespace: "team", Metadata: Allowed},
		{Namespace: "kube-system", Name: "agent", Metadata: Denied},
		{Namespace: "kube-system", Metadata: Allowed},
	}
	if got := RuleForPod(all, agent); got != (ContainerRule{}) {
		t.Errorf("the second rule can hold for some of its containers: got %+v", got)
	}
	if got := RuleForPod(slices.Delete(slices.Clone(all), 1, 2), Subject{Namespace: "kube-system", Pod: "cni"}); got.Metadata != Allowed {
		t.Errorf("got %+v", got)
	}
	if got := RuleForPod(all, Subject{Namespace: "other", Pod: "cni"}); got != (ContainerRule{}) {
		t.Errorf("got %+v", got)
	}
}

// A rule that may hold for a container keeps rules that come later from it.
func TestRuleUnsure(t *testing.T) {
	open := ContainerRule{Namespace: "team-*", Metadata: Allowed}
	anywhere := ContainerRule{Image: "registry.example/*", Metadata: Allowed}
	gke := []ContainerRule{{Namespace: "kube-system", Metadata: Allowed}, {Namespace: "*", HostNetwork: true, Metadata: Denied}, open}
	byNamespace := []ContainerRule{{Namespace: "jail", Metadata: Denied}, anywhere}
	byLabel := []ContainerRule{{Label: "jail", Metadata: Denied}, anywhere}
	const image = "registry.example/web"
	for _, tt := range []struct {
		what  string
		rules []ContainerRule
		of    Subject
		want  int
	}{
		{"own network", gke, Subject{Namespace: "team-a", Pod: "web"}, 2},
		{"network not known", gke, Subject{Namespace: "team-a", Pod: "web", NetworkUnknown: true}, -1},
		{"network does not matter", gke, Subject{Namespace: "kube-system", Pod: "cni", NetworkUnknown: true}, 0},
		{"no pod", byNamespace, Subject{Image: image}, 1},
		{"another namespace", byNamespace, Subject{Image: image, Namespace: "team-a", Pod: "web"}, 1},
		{"pod not known", byNamespace, Subject{Image: image, PodUnknown: true}, -1},
		{"another image", append([]ContainerRule{{Namespace: "jail", Image: "x"}}, anywhere), Subject{Image: image, Namespace: "team-a", Pod: "web"}, 1},
		{"an image that another source tells", append([]ContainerRule{{Namespace: "jail", Image: "x"}}, anywhere), Subject{Image: image, PodUnknown: true}, -1},
		{"a name that another source tells", append([]ContainerRule{{Namespace: "jail", Name: "app"}}, anywhere), Subject{Names: []string{"k8s_app_web"}, Image: image, PodUnknown: true}, -1},
		{"labels of the pod not known", byLabel, Subject{Image: image, PodUnknown: true}, -1},
		{"a label that another source tells", byLabel, Subject{Image: image, PodUnknown: true, Labels: map[string]string{"jail": ""}}, -1},
		{"a label", byLabel, Subject{Image: image, Labels: map[string]string{"jail": ""}}, 0},
		{"no label", byLabel, Subject{Image: image}, 1},
	} {
		if got := RuleIndex(tt.rules, tt.of); got != tt.want {
			t.Errorf("%s: got rule %d, want %d", tt.what, got, tt.want)
		}
	}
	if got := RuleForPod(gke, Subject{Namespace: "team-a", Pod: "web", NetworkUnknown: true}); got != (ContainerRule{}) {
		t.Errorf("got %+v for a pod whose network is not known", got)
	}
}

// A rule opens something to pods of every namespace if nothing narrows its namespace.
func TestOpensToPods(t *testing.T) {
	for namespace, want := range map[string]int{"": 1, "*": 1, "**": 1, "team-*": -1, "kube-system": -1} {
		p := Policy{Containers: []ContainerRule{{Label: "x", Metadata: Denied}, {Namespace: namespace, Label: "x", Metadata: Allowed}}}
		if got := p.OpensToPods(); got != want {
			t.Errorf("namespace %q: got rule %d, want %d", namespace, got, want)
		}
	}
}
