// Package prometheus tests the alerts and the dashboard with the real Prometheus, which scrapes
// the real command.
package prometheus

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const (
	rulesFile = "../../../dist/prometheus/egressbpf.rules.yml"
	testsFile = "../../../dist/prometheus/egressbpf.test.yml"
	runbook   = "https://github.com/egressbpf/egressbpf/blob/main/docs/alerts.md#"
)

type rule struct {
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	For         string            `yaml:"for"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

func readYAML(t testing.TB, path string, into any) {
	t.Helper()
	text, err := os.ReadFile(path)
	check(t, err)
	check(t, yaml.Unmarshal(text, into))
}

func readRules(t testing.TB) []rule {
	t.Helper()
	var file struct {
		Groups []struct {
			Rules []rule `yaml:"rules"`
		} `yaml:"groups"`
	}
	readYAML(t, rulesFile, &file)
	var all []rule
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

// promtool runs Prometheus's tool, which must succeed, and returns what it prints.
func promtool(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), tool(t, "promtool"), args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s not found: install the Debian package prometheus", name)
	}
	return path
}

func TestRules(t *testing.T) {
	promtool(t, "", "check", "rules", rulesFile)
	promtool(t, "", "test", "rules", testsFile)

	text, err := os.ReadFile("../../../docs/alerts.md")
	check(t, err)
	var sections, alerts []string
	for _, s := range regexp.MustCompile(`(?m)^## (\w+)$`).FindAllStringSubmatch(string(text), -1) {
		sections = append(sections, s[1])
	}
	var tests struct {
		Tests []struct {
			Alerts []struct {
				Name string `yaml:"alertname"`
				Want []any  `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		} `yaml:"tests"`
	}
	readYAML(t, testsFile, &tests)
	fires, silent := map[string]bool{}, map[string]bool{}
	for _, test := range tests.Tests {
		for _, a := range test.Alerts {
			if len(a.Want) > 0 {
				fires[a.Name] = true
			} else {
				silent[a.Name] = true
			}
		}
	}
	for _, r := range readRules(t) {
		alerts = append(alerts, r.Alert)
		if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) {
			t.Errorf("%s: severity %q", r.Alert, r.Labels["severity"])
		}
		if r.For == "" && r.Labels["severity"] != "info" {
			t.Errorf("%s: one sample is enough for it to fire", r.Alert)
		}
		if r.Annotations["summary"] == "" || r.Annotations["description"] == "" || r.Annotations["runbook_url"] != runbook+strings.ToLower(r.Alert) {
			t.Errorf("%s: annotations %v", r.Alert, r.Annotations)
		}
		if !fires[r.Alert] || !silent[r.Alert] {
			t.Errorf("%s: tested to fire %v, not to fire %v", r.Alert, fires[r.Alert], silent[r.Alert])
		}
		if strings.Contains(r.Expr, "egressbpf_container_") && !strings.Contains(r.Expr, "topk by (job, instance)") {
			t.Errorf("%s: a host can have as many of them as it has containers", r.Alert)
		}
		for text := range strings.SplitSeq(r.Annotations["summary"]+r.Annotations["description"], "{{") {
			if strings.Contains(text, "$labels.container") && !strings.HasPrefix(text, ` printf "%q" `) {
				t.Errorf("%s: a name that a container has chosen is not quoted: {{%s", r.Alert, text)
			}
		}
	}
	if !slices.Equal(alerts, sections) {
		t.Errorf("docs/alerts.md has sections\n%v, want\n%v", sections, alerts)
	}
}

// TestSample checks the sample configuration, with files that there are here.
func TestSample(t *testing.T) {
	dir := t.TempDir()
	text, err := os.ReadFile("../../../dist/prometheus/scrape.yml")
	check(t, err)
	config := string(text)
	rules, err := filepath.Abs(rulesFile)
	check(t, err)
	certificate(t, dir)
	check(t, os.WriteFile(filepath.Join(dir, "password"), []byte("secret"), 0o600))
	for from, to := range map[string]string{
		"/usr/local/share/egressbpf/prometheus/egressbpf.rules.yml": rules,
		"/etc/prometheus/egressbpf.password":                        filepath.Join(dir, "password"),
		"/etc/prometheus/egressbpf-ca.pem":                          filepath.Join(dir, "cert.pem"),
	} {
		if !strings.Contains(config, from) {
			t.Errorf("%s is not in the sample", from)
		}
		config = strings.ReplaceAll(config, from, to)
	}
	path := filepath.Join(dir, "prometheus.yml")
	check(t, os.WriteFile(path, []byte(config), 0o600))
	promtool(t, "", "check", "config", path)

	page, err := os.ReadFile("../../../docs/metrics.md")
	check(t, err)
	_, jobs, _ := strings.Cut(string(text), "scrape_configs:\n")
	if !strings.Contains(string(page), "dist/prometheus/scrape.yml") || !strings.Contains(jobs, "job_name: egressbpf") {
		t.Error("docs/metrics.md does not lead to the sample, or its job is called otherwise")
	}
}
