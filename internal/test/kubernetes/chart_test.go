//go:build helm

package kubernetes

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/egressbpf/egressbpf/internal/policy"
)

var write = flag.Bool("write", false, "write dist/kubernetes/egressbpf.yaml")

// operator has the schema of PodMonitor, which is not one of Kubernetes' own.
const operator = "github.com/prometheus-operator/prometheus-operator@v0.85.0"

// The versions of Kubernetes that the chart is rendered for, and the newest ones whose schemas are
// at hand: since 1.30, AppArmor's profile is a field.
var versions = []string{"1.26", "1.29", "1.30"}

// Tools are built by the Go command, which caches them.
var (
	helm     = tool("helm", "helm")
	validate = tool("kubectl-validate", "kubectl-validate")
)

func tool(module, name string) func(t *testing.T) string {
	find := sync.OnceValues(func() (string, error) {
		cmd := exec.Command("go", "tool", "-n", "-modfile=tools/"+module+"/go.mod", name)
		cmd.Dir = repository
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		return strings.TrimSpace(string(out)), err
	})
	return func(t *testing.T) string {
		t.Helper()
		path, err := find()
		if err != nil {
			t.Fatalf("build %s: %v", name, err)
		}
		return path
	}
}

// run returns what a command prints, and its errors apart.
func run(t *testing.T, name string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	cmd := exec.Command(name, args...)
	// No settings, plugins or clusters of whoever runs the test.
	home := t.TempDir()
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "KUBECONFIG=" + filepath.Join(home, "none")}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), err
}

// render returns what the chart makes of values for a version of Kubernetes.
func render(t *testing.T, version string, flags ...string) string {
	t.Helper()
	args := []string{"template", "egressbpf", chart, "--namespace", "egressbpf", "--kube-version", version, "--api-versions", "monitoring.coreos.com/v1"}
	out, stderr, err := run(t, helm(t), append(args, flags...)...)
	if err != nil {
		t.Fatalf("helm template: %s", stderr)
	}
	return out
}

// list returns the objects of a list.
func (o object) list(keys ...string) (list []object) {
	entries, _ := o.at(keys...).([]any)
	for _, e := range entries {
		m, _ := e.(map[string]any)
		list = append(list, m)
	}
	return list
}

// sets are the names of files of values in testdata, without their suffix.
func sets(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) < 5 {
		t.Fatalf("values: %q, %v", files, err)
	}
	for _, file := range files {
		names = append(names, strings.TrimSuffix(filepath.Base(file), ".yaml"))
	}
	return names
}

func valuesOf(set string) string { return "testdata/" + set + ".yaml" }

func TestLint(t *testing.T) {
	for _, set := range sets(t) {
		out, stderr, err := run(t, helm(t), "lint", "--strict", "--kube-version", "1.30", chart, "--namespace", "egressbpf", "--values", valuesOf(set))
		if err != nil {
			t.Errorf("helm lint with %s: %s%s", set, out, stderr)
		}
	}
}

// crds returns a directory with the definition of PodMonitor.
var crds = sync.OnceValues(func() (string, error) {
	cmd := exec.Command("go", "mod", "download", "-json", operator)
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod")
	out, err := cmd.Output()
	if err != nil {
		return "", errors.New(string(out))
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		return "", err
	}
	text, err := os.ReadFile(filepath.Join(module.Dir, "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml"))
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "crds")
	if err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "podmonitor.yaml"), text, 0o644)
})

// checkSchema compares files with what was rendered with the schemas that Kubernetes and the
// Prometheus operator publish. It returns what it says about the files, and an error if one is wrong.
func checkSchema(t *testing.T, version string, files ...string) (string, error) {
	t.Helper()
	dir, err := crds()
	if err != nil {
		t.Fatal(err)
	}
	out, stderr, err := run(t, validate(t), append([]string{"--version", version, "--local-crds", dir}, files...)...)
	return colours.ReplaceAllString(out+stderr, ""), err
}

var colours = regexp.MustCompile("\x1b\\[[0-9;]*m")

// file returns a file with a text.
func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name+".yaml")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if dir, err := crds(); err == nil {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

func TestRender(t *testing.T) {
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			var files []string
			for _, set := range sets(t) {
				text := render(t, version, "--values", valuesOf(set))
				files = append(files, file(t, set, text))
				t.Run(set, func(t *testing.T) {
					objects := parse(t, text)
					checkObjects(t, objects)
					checkPod(t, objects["DaemonSet"], version)
					checkConfig(t, objects)
				})
			}
			if said, err := checkSchema(t, version, files...); err != nil {
				t.Error(said)
			}
		})
	}
}

// TestSchemaRefuses makes sure that the comparison with the schemas can fail.
func TestSchemaRefuses(t *testing.T) {
	text := render(t, "1.30", "--values", valuesOf("metrics"))
	var files []string
	for _, change := range [][2]string{
		{"hostPID: true", "hostPIDs: true"},
		{"hostNetwork: true", "hostNetwork: often"},
		{"hostPath:", "hostpath:"},
		{"podMetricsEndpoints:", "podMetricEndpoints:"},
		{"scrapeTimeout: 10s", "scrapeTimeout: soon"},
		{"clusterIP: None", "clusterIp: None"},
	} {
		changed := strings.Replace(text, change[0], change[1], 1)
		if changed == text {
			t.Errorf("no %q", change[0])
		}
		files = append(files, file(t, "changed", changed))
	}
	said, err := checkSchema(t, "1.30", files...)
	if err == nil {
		t.Error("nothing was refused")
	}
	for _, file := range files {
		if !strings.Contains(said, file+"...ERROR") {
			t.Errorf("%s was not refused:\n%s", file, said)
		}
	}
}

// checkObjects looks at which objects there are.
func checkObjects(t *testing.T, objects map[string]object) {
	t.Helper()
	allowed := []string{"DaemonSet", "ServiceAccount", "ConfigMap", "Secret", "Service", "PodMonitor", "ResourceQuota"}
	for kind, o := range objects {
		if !slices.Contains(allowed, kind) {
			t.Errorf("an object of kind %s", kind)
		}
		if got := o.text("metadata", "namespace"); got != "egressbpf" {
			t.Errorf("%s in namespace %q", kind, got)
		}
	}
	if o := objects["ServiceAccount"]; o != nil && o.at("automountServiceAccountToken") != false {
		t.Error("the service account's token is mounted")
	}
	spec := object(objects["DaemonSet"].at("spec", "template", "metadata", "labels").(map[string]any))
	for _, by := range [][]string{{"DaemonSet", "spec", "selector", "matchLabels"}, {"PodMonitor", "spec", "selector", "matchLabels"}, {"Service", "spec", "selector"}} {
		if objects[by[0]] == nil {
			continue
		}
		selector, _ := objects[by[0]].at(by[1:]...).(map[string]any)
		if len(selector) == 0 {
			t.Errorf("%s selects everything", by[0])
		}
		for key, value := range selector {
			if spec[key] != value {
				t.Errorf("%s selects %s=%v, not the pods", by[0], key, value)
			}
		}
	}
}

// documented returns the values that flags have in the command of docs/container.md.
func documented(t *testing.T, name string) (values []string) {
	t.Helper()
	page, err := os.ReadFile(repository + "/docs/container.md")
	if err != nil {
		t.Fatal(err)
	}
	_, command, _ := strings.Cut(string(page), "\ndocker run --detach ")
	command, _, _ = strings.Cut(command, "\n```")
	for _, match := range regexp.MustCompile(`--`+name+`=(\S+)`).FindAllStringSubmatch(command, -1) {
		values = append(values, match[1])
	}
	if len(values) == 0 {
		t.Fatalf("docs/container.md has no flag --%s", name)
	}
	return values
}

// checkPod compares pods with the flags of docs/container.md, with which a real engine is tested.
func checkPod(t *testing.T, ds object, version string) {
	t.Helper()
	pod := object(ds.at("spec", "template", "spec").(map[string]any))
	if pod.at("hostPID") != true || pod.at("hostNetwork") != true || pod.at("automountServiceAccountToken") != false {
		t.Error("want hostPID, hostNetwork and no token")
	}
	run := len(pod.list("initContainers")) == 0
	web := strings.Contains(strings.Join(argsOf(pod.list("containers")[0]), " "), "--web-listen")
	for _, c := range slices.Concat(pod.list("initContainers"), pod.list("containers")) {
		name := c.text("name")
		var got []string
		for _, v := range c.at("securityContext", "capabilities", "add").([]any) {
			got = append(got, v.(string))
		}
		want := documented(t, "cap-add")
		if web {
			want = append(want, "SETUID", "SETGID", "SETPCAP", "KILL", "DAC_OVERRIDE")
		}
		got = slices.DeleteFunc(got, func(s string) bool { return s == "SYS_RESOURCE" }) // a value of the user's
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s has capabilities %v, want %v", name, got, want)
		}
		for key, want := range map[string]any{"privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsUser": 0} {
			if got := c.at("securityContext", key); got != want {
				t.Errorf("%s: %s is %v", name, key, got)
			}
		}
		annotation := ds.text("spec", "template", "metadata", "annotations", "container.apparmor.security.beta.kubernetes.io/"+name)
		field := c.text("securityContext", "appArmorProfile", "type")
		if version == "1.30" && (field != "Unconfined" || annotation != "") || version != "1.30" && (field != "" || annotation != "unconfined") {
			t.Errorf("%s, %s: AppArmor by field %q, annotation %q", version, name, field, annotation)
		}
		paths := map[string]string{}
		for _, v := range pod.list("volumes") {
			paths[v.text("name")] = v.text("hostPath", "path")
		}
		var mounts []string
		for _, m := range c.list("volumeMounts") {
			if m.at("subPath") != nil {
				t.Errorf("%s: with a subPath, changes of %s would not be seen", name, m.text("name"))
			}
			if path, ok := paths[m.text("name")]; !ok {
				t.Errorf("%s mounts %s, which is no volume", name, m.text("name"))
			} else if strings.HasPrefix(path, "/sys/") {
				mount := path + ":" + m.text("mountPath")
				if m.at("readOnly") == true {
					mount += ":ro"
				}
				mounts = append(mounts, mount)
			}
		}
		for _, volume := range documented(t, "volume") {
			if strings.HasPrefix(volume, "/sys/") && !slices.Contains(mounts, volume) {
				t.Errorf("%s lacks the mount %s, has %v", name, volume, mounts)
			}
		}
	}
	if main := argsOf(pod.list("containers")[0]); run != (main[0] == "run") {
		t.Errorf("args %v", main)
	}
}

func argsOf(c object) (args []string) {
	for _, a := range c.at("args").([]any) {
		args = append(args, a.(string))
	}
	return args
}

func TestConfig(t *testing.T) {
	defaults, _ := checkConfig(t, parse(t, render(t, "1.30")))
	if len(defaults.Containers) != 1 || defaults.Containers[0].Metadata != policy.Allowed || defaults.Containers[0].Families != "any" {
		t.Errorf("by default, the rules are %+v", defaults.Containers)
	}
	own, _ := checkConfig(t, parse(t, render(t, "1.30", "--values", valuesOf("own"))))
	if len(own.Containers) != 7 || own.Containers[3].Metadata != policy.Denied || own.Containers[5].Metadata != policy.Allowed {
		t.Errorf("the user's rules do not come before those of exempt.namespaces: %+v", own.Containers)
	}
	if own.SMTP.Burst != 1000000 || own.HostSide != policy.On || !own.AllowDNS {
		t.Errorf("the user's policy is %+v", own.Policy)
	}
	if none, _ := checkConfig(t, parse(t, render(t, "1.30", "--set", "exempt.namespaces=null"))); len(none.Containers) != 0 {
		t.Errorf("without exempt namespaces, the rules are %+v", none.Containers)
	}
	objects := parse(t, render(t, "1.30", "--values", valuesOf("notify")))
	if config, _ := checkConfig(t, objects); len(config.Notify) != 1 || objects["ConfigMap"] != nil || objects["Secret"] == nil {
		t.Error("the targets of notifications are not in a Secret")
	}
	if objects := parse(t, render(t, "1.30", "--values", valuesOf("secret"))); objects["Secret"] != nil || objects["ConfigMap"] != nil {
		t.Error("with configSecret, the chart makes a config of its own")
	}
}

// TestProbe looks at when a node counts as ready.
func TestProbe(t *testing.T) {
	for set, want := range map[string]bool{"defaults": true, "metrics": true, "audit": false, "detach": false, "secret": false} {
		c := object(parse(t, render(t, "1.30", "--values", valuesOf(set)))["DaemonSet"].at("spec", "template", "spec").(map[string]any)).list("containers")[0]
		if got := c.at("readinessProbe") != nil; got != want {
			t.Errorf("%s: readiness probe %v", set, got)
		}
		if c.at("livenessProbe") != nil {
			t.Errorf("%s: a liveness probe", set)
		}
	}
}

func TestRefusesValues(t *testing.T) {
	for values, want := range map[string]string{
		"criSockets=/run/x.sock":                                               "criSockets",
		"exempt.namespace={kube-system}":                                       "namespace",
		"exempt.namespaces={team-*}":                                           "pattern",
		"operation=remove":                                                     "operation",
		"criSocket=unix:///run/containerd/containerd.sock":                     "criSocket",
		"criSocket=/run/../etc/x.sock":                                         "criSocket",
		"updateStrategy.rollingUpdate.maxSurge=1":                              "maxSurge",
		"metrics.port=80,metrics.enabled=true":                                 "port",
		"metrics.enabled=true":                                                 "metrics.webConfigSecret",
		"metrics.podMonitor.enabled=true":                                      "metrics.enabled",
		"metrics.service.enabled=true":                                         "metrics.enabled",
		"readinessProbe.exec=status":                                           "exec",
		"config=enforce":                                                       "config",
		"config.containers[0].namespace=*,config.containers[0].metadata=block": "kube-system is not exempt",
		"image.digest=0123456789":                                              "digest",
	} {
		out, stderr, err := run(t, helm(t), "template", "egressbpf", chart, "--kube-version", "1.30", "--set", values)
		if err == nil {
			t.Errorf("accepted: %s\n%s", values, out)
		} else if !strings.Contains(stderr, want) {
			t.Errorf("%s: %s", values, stderr)
		}
	}
	for _, values := range []string{
		"config.containers[0].namespace=kube-*,config.containers[0].metadata=allow,config.containers[0].socket_families=any",
		"config.containers[0].namespace=kube-system,config.containers[0].metadata=block,config.containers[1].namespace=*,config.containers[1].metadata=block",
		"config.containers[0].namespace=*,config.containers[0].host_network=true,config.containers[0].metadata=block",
		"config.containers[0].namespace=kube,config.containers[0].metadata=block",
		"config.containers[0].namespace=*,config.containers[0].metadata=block,operation=detach",
	} {
		if _, stderr, err := run(t, helm(t), "template", "egressbpf", chart, "--kube-version", "1.30", "--set", values); err != nil {
			t.Errorf("%s: %s", values, stderr)
		}
	}
	if _, stderr, err := run(t, helm(t), "template", "egressbpf", chart, "--kube-version", "1.25"); err == nil {
		t.Error("accepted: Kubernetes 1.25")
	} else if !strings.Contains(stderr, "kubeVersion") {
		t.Error(stderr)
	}
}

const manifestsHead = `# egressbpf on each node of a Kubernetes cluster, for kubectl apply: made by "make manifests" from the chart
# in dist/kubernetes/egressbpf, with its defaults, for Kubernetes 1.30 and newer. See docs/kubernetes.md.
# The chart's digest: %s
apiVersion: v1
kind: Namespace
metadata:
  name: egressbpf
  labels:
    # The agent needs the host's namespaces, paths and capabilities.
    pod-security.kubernetes.io/enforce: privileged
    pod-security.kubernetes.io/audit: privileged
    pod-security.kubernetes.io/warn: privileged
`

// TestManifests compares the plain manifests with what the chart makes.
func TestManifests(t *testing.T) {
	text := render(t, "1.30")
	// Who made them is another.
	for _, line := range []string{`(?m)^ +helm\.sh/chart: .*\n`, `(?m)^ +app\.kubernetes\.io/managed-by: .*\n`, `(?m)^# Source: .*\n`} {
		text = regexp.MustCompile(line).ReplaceAllString(text, "")
	}
	text = fmt.Sprintf(manifestsHead, digest(t)) + text
	if said, err := checkSchema(t, "1.30", file(t, "egressbpf", text)); err != nil {
		t.Error(said)
	}
	if *write {
		if err := os.WriteFile(manifests, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(manifests)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != text {
		t.Errorf("%s is not what the chart makes: run `make manifests`", manifests)
	}
}

// TestDocs takes the values that docs/kubernetes.md shows for what they say that they are.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile(repository + "/docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	examples := 0
	for _, match := range regexp.MustCompile("(?s)\n```yaml\n(.*?)\n```\n").FindAllStringSubmatch(string(page), -1) {
		var values map[string]any
		if err := yaml.Unmarshal([]byte(match[1]), &values); err != nil {
			t.Errorf("%v\n%s", err, match[1])
		}
		if values["config"] == nil && values["metrics"] == nil {
			continue // of another file
		}
		examples++
		text := render(t, "1.30", "--values", file(t, "values", match[1]))
		checkConfig(t, parse(t, text))
		if said, err := checkSchema(t, "1.30", file(t, "rendered", text)); err != nil {
			t.Error(said)
		}
	}
	if examples < 3 {
		t.Errorf("the page has only %d examples of values", examples)
	}
	// Values that the text names.
	for _, want := range []string{"criSocket: /run/k3s/containerd/containerd.sock", "operation=detach"} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page does not have %s", want)
		}
		out, stderr, err := run(t, helm(t), "template", "egressbpf", chart, "--kube-version", "1.30", "--set", strings.ReplaceAll(want, ": ", "="))
		if err != nil {
			t.Errorf("%s: %s%s", want, out, stderr)
		}
	}
}
