package dockertest

import (
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

const (
	toolImage = "egressbpf"
	nextImage = "egressbpf-next"
)

// TestContainer runs egressbpf itself in a container, with the flags that docs/container.md names.
func TestContainer(t *testing.T) {
	delegate(t)
	n := lab.New(t)
	e := startEngine(t, n)
	t.Cleanup(func() { n.Egressbpf(t, "detach") })
	health := `HEALTHCHECK --interval=1s CMD ["/egressbpf","status"]`
	for _, name := range []string{toolImage, nextImage} {
		e.importChanged(t, name, []string{`ENTRYPOINT ["/egressbpf"]`, health}, executable(t, "egressbpf", lab.Binary(t)))
	}
	service := documented(t, e)
	var once []string // what an only command needs
	for _, flag := range service {
		if flag != "--detach" && !strings.HasPrefix(flag, "--name=") && !strings.HasPrefix(flag, "--restart=") {
			once = append(once, flag)
		}
	}
	once = append(once, "--rm")
	t.Run("wrong flags", func(t *testing.T) { testWrongFlags(t, e, once) })
	t.Run("attach", func(t *testing.T) { testContainerAttach(t, e, once) })
	t.Run("service", func(t *testing.T) { testContainerService(t, e, service, once) })
	if ok, err := delegates(); err != nil || !ok {
		t.Errorf("the host has lost nsdelegate: %v", err)
	}
}

// delegates says whether the hierarchy has the option nsdelegate.
func delegates() (bool, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	return strings.Contains(string(mounts), " "+cgroups+" cgroup2 ") && strings.Contains(string(mounts), "nsdelegate"), err
}

// delegate gives the hierarchy the option nsdelegate, as systemd does, until the test ends.
func delegate(t *testing.T) {
	t.Helper()
	had, err := delegates()
	if err != nil {
		t.Fatal(err)
	}
	remount := func(options string) {
		if err := unix.Mount("none", cgroups, "cgroup2", unix.MS_REMOUNT, options); err != nil {
			t.Fatalf("remount %s: %v", cgroups, err)
		}
	}
	if !had {
		remount("nsdelegate")
		t.Cleanup(func() { remount("") })
	}
}

// documented returns the flags of the command that docs/container.md gives, with the socket of the
// engine in place of the usual one. compose.yaml has to say the same.
func documented(t *testing.T, e *engine) (flags []string) {
	t.Helper()
	page, err := os.ReadFile("../../../docs/container.md")
	if err != nil {
		t.Fatal(err)
	}
	const begin = "\ndocker run --detach "
	_, rest, ok := strings.Cut(string(page), begin)
	command, _, ok2 := strings.Cut(rest, "\n```")
	if !ok || !ok2 {
		t.Fatalf("docs/container.md has no %q", begin)
	}
	words := strings.Fields("--detach " + strings.ReplaceAll(command, "\\\n", " "))
	flags, of := words[:len(words)-3], words[len(words)-3:]
	if !slices.Equal(of, []string{toolImage, "run", "--or-defaults"}) {
		t.Fatalf("docs/container.md runs %v", of)
	}
	expectCompose(t, flags)
	const socket = "/var/run/docker.sock"
	for i, flag := range flags {
		flags[i] = strings.Replace(flag, "="+socket+":", "="+e.path("socket")+":", 1)
	}
	return flags
}

// expectCompose compares dist/container/compose.yaml with the flags of docker run.
func expectCompose(t *testing.T, flags []string) {
	t.Helper()
	text, err := os.ReadFile("../../../dist/container/compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Services map[string]map[string]any
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	service := file.Services["egressbpf"]
	names := map[string]string{
		"container_name": "name", "restart": "restart", "cgroup": "cgroupns", "pid": "pid", "network_mode": "network",
		"cap_drop": "cap-drop", "cap_add": "cap-add", "security_opt": "security-opt", "volumes": "volume",
	}
	got := []string{"--detach"}
	for _, key := range slices.Sorted(maps.Keys(service)) {
		switch value := service[key].(type) {
		case []any:
			for _, v := range value {
				got = append(got, "--"+names[key]+"="+v.(string))
			}
		case string:
			if names[key] != "" {
				got = append(got, "--"+names[key]+"="+value)
			}
		case bool:
			got = append(got, map[bool]string{true: "--read-only"}[value])
		}
	}
	slices.Sort(got)
	if want := slices.Sorted(slices.Values(flags)); !slices.Equal(got, want) {
		t.Errorf("compose.yaml:\n got %q\nwant %q", got, want)
	}
	test := service["healthcheck"].(map[string]any)["test"]
	if service["image"] != toolImage || service["command"] != "run --or-defaults" || len(service) != len(names)+4 || !slices.Equal(test.([]any), []any{"CMD", "/egressbpf", "status"}) {
		t.Errorf("compose.yaml: %v", service)
	}
}

// tool runs a command in a container of an image of egressbpf, to its end.
func (e *engine) tool(t *testing.T, flags []string, args ...string) lab.Exit {
	t.Helper()
	return lab.Run(t, e.command(slices.Concat([]string{"run"}, flags, []string{toolImage}, args)...))
}

// Each wrong flag is refused, with what to do, and nothing is in force then.
func testWrongFlags(t *testing.T, e *engine, right []string) {
	seccomp := e.path("seccomp.json")
	if err := os.WriteFile(seccomp, []byte(`{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["bpf"], "action": "SCMP_ACT_ERRNO"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	// It is a bpf filesystem of the host, and ends with the last container that has it.
	e.docker(t, "volume", "create", "--opt", "type=bpf", "--opt", "device=bpf", "pins")
	bpffs := "--volume=/sys/fs/bpf:/sys/fs/bpf"
	part := "/sys/fs/bpf/part"
	if err := os.Mkdir(part, 0o700); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(part)
	// Somebody on the host looks into the network of another container.
	e.sleeper(t, "other", "--volume=pins:/sys/fs/bpf")
	looks := exec.Command("nsenter", "--net", "--target", e.docker(t, "inspect", "-f", "{{.State.Pid}}", "other"), "sleep", "1000000")
	if err := looks.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = looks.Process.Kill()
		_ = looks.Wait()
	}()
	for _, test := range []struct {
		name, without, with string
		code                int
		says                string
		all                 bool // tried with each command
	}{
		{"cgroup and PID namespaces", "--pid=host", "--cgroupns=private", 3, "--cgroupns=host", true},
		{"PID namespace", "--pid=host", "", 3, "--pid=host", false},
		{"another container's processes", "--pid=host", "--pid=container:other", 3, "run the container with --pid=host", false},
		{"network namespace", "--network=host", "", 3, "--network=host", false},
		{"no network", "--network=host", "--network=none", 3, "--network=host", false},
		{"another container's network", "--network=host", "--network=container:other", 3, "--network=host", false},
		{"bpf filesystem", bpffs, "", 3, "-v /sys/fs/bpf:/sys/fs/bpf", true},
		{"volume of pins", bpffs, "--volume=pins:/sys/fs/bpf", 3, "-v /sys/fs/bpf:/sys/fs/bpf", false},
		{"part of the bpf filesystem", bpffs, "--volume=" + part + ":/sys/fs/bpf", 3, "-v /sys/fs/bpf:/sys/fs/bpf", false},
		{"read-only bpf filesystem", bpffs, bpffs + ":ro", 1, "without :ro", false},
		{"tmpfs", bpffs, "--tmpfs=/sys/fs/bpf", 3, "-v /sys/fs/bpf:/sys/fs/bpf", false},
		{"no system administrator", "--cap-add=SYS_ADMIN", "", 1, "lacks CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN", false},
		{"no network administrator", "--cap-add=NET_ADMIN", "", 1, "lacks CAP_NET_ADMIN", false},
		{"no handles", "--cap-add=DAC_READ_SEARCH", "", 1, "lacks CAP_DAC_READ_SEARCH", false},
		{"no ptrace", "--cap-add=SYS_PTRACE", "", 3, "--cap-add=SYS_PTRACE", false},
		{"seccomp", "", "--security-opt=seccomp=" + seccomp, 1, "seccomp", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			flags := slices.DeleteFunc(slices.Clone(right), func(flag string) bool { return flag == test.without })
			if test.without != "" && len(flags) == len(right) {
				t.Fatalf("docs/container.md has no %s", test.without)
			}
			if test.with != "" {
				flags = append(flags, test.with)
			}
			commands := []string{"attach"}
			if test.all {
				commands = []string{"attach", "run", "status", "check"}
			}
			for _, command := range commands {
				flags := flags
				if command == "check" {
					flags = append(slices.Clone(flags), "--cap-add=DAC_OVERRIDE")
				}
				exit := e.tool(t, flags, command)
				if exit.Code != test.code || !strings.Contains(exit.Stderr, test.says) || exit.Stdout != "" {
					t.Errorf("%s: exit code %d\n%s%s", command, exit.Code, exit.Stdout, exit.Stderr)
				}
			}
		})
	}
	lab.ExpectPrograms(t, cgroups, 0)

	// A self-test needs what the filter does not.
	if exit := e.tool(t, append(slices.Clone(right), "--cap-add=DAC_OVERRIDE"), "check"); exit.Code != 1 || !strings.Contains(exit.Stderr, "is read-only") {
		t.Errorf("check: exit code %d\n%s%s", exit.Code, exit.Stdout, exit.Stderr)
	}
	var writable []string
	for _, flag := range right {
		writable = append(writable, strings.Replace(flag, "cgroup:ro", "cgroup", 1))
	}
	if exit := e.tool(t, append(writable, "--cap-add=DAC_OVERRIDE"), "check"); exit.Code != 0 {
		t.Errorf("check: exit code %d\n%s%s", exit.Code, exit.Stdout, exit.Stderr)
	}
	// Without the socket, only names are missing.
	silent := slices.DeleteFunc(slices.Clone(right), func(flag string) bool { return strings.Contains(flag, "docker.sock") })
	if exit := e.tool(t, silent, "attach"); exit.Code != 0 || !strings.Contains(exit.Stderr, "-v /var/run/docker.sock") {
		t.Errorf("attach: exit code %d\n%s", exit.Code, exit.Stderr)
	}
	if exit := e.tool(t, right, "detach"); exit.Code != 0 {
		t.Errorf("detach: exit code %d\n%s", exit.Code, exit.Stderr)
	}
	lab.ExpectPrograms(t, cgroups, 0)
	// A pod cannot ask for the host's cgroup namespace, but the command gets there by itself.
	private := append(slices.DeleteFunc(slices.Clone(right), func(flag string) bool { return flag == "--cgroupns=host" }), "--cgroupns=private")
	for _, command := range []string{"attach", "status", "detach"} {
		if exit := e.tool(t, private, command); exit.Code != 0 || command != "detach" && !strings.Contains(exit.Stdout, "enforcing  yes") {
			t.Errorf("%s: exit code %d\n%s%s", command, exit.Code, exit.Stdout, exit.Stderr)
		}
	}
	lab.ExpectPrograms(t, cgroups, 0)
}

// What a container has put in force stays when the container is gone.
func testContainerAttach(t *testing.T, e *engine, flags []string) {
	for _, command := range []string{"attach", "status"} {
		exit := e.tool(t, flags, command)
		if exit.Code != 0 || !strings.Contains(exit.Stdout, "enforcing  yes") || strings.Contains(exit.Stdout, "EXPOSED") || strings.Contains(exit.Stderr, "cgroup_boundary") {
			t.Errorf("%s: exit code %d\n%s%s", command, exit.Code, exit.Stdout, exit.Stderr)
		}
	}
	expectStatus(t, e.Network, 0)
	expectPoliced(t, e, e.run(t, "attached"))
	if exit := e.tool(t, flags, "stats"); exit.Code != 0 || !counted(exit.Stdout, "attached") {
		t.Errorf("stats: exit code %d\n%s%s", exit.Code, exit.Stdout, exit.Stderr)
	}
	if exit := e.tool(t, flags, "detach"); exit.Code != 0 {
		t.Errorf("detach: exit code %d\n%s", exit.Code, exit.Stderr)
	}
	lab.ExpectPrograms(t, cgroups, 0)
}

// expectPoliced expects that a container reaches no metadata service, but another destination.
func expectPoliced(t *testing.T, e *engine, c *container) {
	t.Helper()
	seen := e.Capture(t)
	expectMetadataRefused(t, c.Agent)
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	if sent, received := c.Transfer(at(lab.Other4, 80), 1<<16); received != sent.String() {
		t.Errorf("sent %s, received %s", sent, received)
	}
}

// counted says whether stats show what expectMetadataRefused tries, under a container's name.
func counted(stats, name string) bool {
	for line := range strings.Lines(stats) {
		if fields := strings.Fields(line); len(fields) > 3 && fields[0] == name {
			return slices.Equal(fields[1:3], []string{"2", "3"}) // packets, connects
		}
	}
	return false
}

// The service is replaced by that of another image, and removed, and no packet gets through.
func testContainerService(t *testing.T, e *engine, flags, once []string) {
	start := func(image string) {
		t.Helper()
		e.docker(t, slices.Concat([]string{"run"}, flags, []string{image, "run", "--or-defaults"})...)
		testenv.Eventually(t, "healthy", func() bool {
			return e.docker(t, "inspect", "-f", "{{.State.Health.Status}}", toolImage) == "healthy"
		})
	}
	e.removeAfter(t, toolImage)
	start(toolImage)
	c := e.run(t, "web")
	expectPoliced(t, e, c)
	tell := func(args ...string) string {
		return e.docker(t, append([]string{"exec", toolImage, "/egressbpf"}, args...)...)
	}
	if got := tell("stats"); !counted(got, "web") || !strings.Contains(got, "\negressbpf  ") {
		t.Errorf("stats:\n%s", got)
	}
	if got := tell("status"); strings.Contains(got, "EXPOSED") {
		t.Errorf("status:\n%s", got)
	}
	first := expectStatus(t, e.Network, 0).Hooks[0].Program

	seen := e.Capture(t)
	begun := time.Now()
	c.Flood(lab.Flood{Blocked: []netip.Addr{lab.Metadata4, lab.Metadata6}, Mail: at(lab.Mail4, 25), Source: netip.MustParseAddr("172.30.0.99")})
	blocked := func(p lab.Packet) bool { return p.Dst.Addr() == lab.Metadata4 || p.Dst.Addr() == lab.Metadata6 }
	e.docker(t, "rm", "-f", toolImage)
	expectStatus(t, e.Network, 0)
	start(nextImage)
	// It is healthy at once, since the filter is in force.
	testenv.Eventually(t, "programs replaced", func() bool { return expectStatus(t, e.Network, 0).Hooks[0].Program != first })
	e.docker(t, "rm", "-f", toolImage)
	expectPolicedStill(t, c, begun, seen, blocked)

	host := exec.Command(lab.Binary(t), "status")
	if exit := e.Run(t, host); exit.Code != 0 || strings.Contains(exit.Stdout, "EXPOSED") {
		t.Errorf("status: exit code %d\n%s", exit.Code, exit.Stdout)
	}
	if exit := e.tool(t, once, "detach"); exit.Code != 0 {
		t.Errorf("detach: exit code %d\n%s", exit.Code, exit.Stderr)
	}
	lab.ExpectPrograms(t, cgroups, 0)
}

// expectPolicedStill ends a container's flood, of which nothing must have arrived that is blocked.
func expectPolicedStill(t *testing.T, c *container, begun time.Time, seen *lab.Capture, blocked func(lab.Packet) bool) {
	t.Helper()
	flooded := c.StopFlood()
	most := 5 + int(time.Since(begun)/(12*time.Second)) // 5 at once, and 5 a minute
	t.Logf("flood: %+v", flooded)
	if flooded.Sent > 0 || flooded.Other != "" || flooded.Refused == 0 || flooded.Denied == 0 {
		t.Errorf("flood: %+v", flooded)
	}
	packets := seen.Settle(t)
	if n := lab.Count(packets, blocked); n > 0 {
		t.Errorf("%d blocked packets arrived", n)
	}
	if n := syns(packets, 25); n > most {
		t.Errorf("%d mails arrived of %d, want at most %d", n, flooded.Mails, most)
	}
	seen.Forget()
}
