package daemon_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/daemon"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/fakedocker"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newEngine returns a daemon of Docker that listens until the test ends.
func newEngine(t *testing.T) *fakedocker.Daemon {
	e := fakedocker.New(filepath.Join(t.TempDir(), "s"))
	check(t, e.Start())
	t.Cleanup(func() { _ = e.Stop() })
	return e
}

// service is a daemon at work.
type service struct {
	*daemon.Daemon
	t      *testing.T
	engine *fakedocker.Daemon
	slice  string // the policed cgroup
	config string
	log    testenv.Log
	reload chan os.Signal
	stop   func() // ends it

	mu       sync.Mutex
	notified []string
}

func id(n int) string { return fmt.Sprintf("%064x", n) }

func newService(t *testing.T, config string) *service {
	t.Helper()
	t.Cleanup(daemon.SetPace(20 * time.Millisecond))
	s := &service{
		t: t, engine: newEngine(t), slice: testenv.Child(t, testenv.Cgroup(t), "own.slice"),
		config: filepath.Join(t.TempDir(), "config.yaml"), reload: make(chan os.Signal, 1),
	}
	s.write(config)
	root := testenv.Root(t)
	filter := loader.New(testenv.PinPath(t), root)
	t.Cleanup(func() { check(t, filter.Detach(context.Background(), nil)) })
	docker, err := container.OpenDocker("unix://" + s.engine.Socket)
	check(t, err)
	s.Daemon = &daemon.Daemon{
		Filter: filter, Root: root, Containers: container.NewInventory(docker), File: s.config, Reload: s.reload,
		Load: func() (policy.Config, error) {
			text, err := os.ReadFile(s.config)
			if err != nil {
				return policy.Config{}, err
			}
			return policy.ParseConfig("config.yaml", text)
		},
		Log: slog.New(slog.NewTextHandler(&s.log, nil)),
		Notify: func(state string) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.notified = append(s.notified, state)
		},
		Watchdog: 20 * time.Millisecond,
	}
	return s
}

// start runs the daemon until the test ends or stop is called, and waits until it is
// ready.
func (s *service) start() {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("the daemon ended: %v", err)
		}
	})
	s.t.Cleanup(s.stop)
	s.eventually("ready", func() bool { return s.told("READY=1\nSTATUS=enforcing") > 0 })
}

func (s *service) eventually(what string, ok func() bool) {
	s.t.Helper()
	defer func() {
		if s.t.Failed() {
			s.t.Logf("log:\n%s", s.log.String())
		}
	}()
	testenv.Eventually(s.t, what, ok)
}

// told is how often the service manager was told of a state.
func (s *service) told(state string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, got := range s.notified {
		if strings.HasPrefix(got, state) {
			n++
		}
	}
	return n
}

// write changes the config file in one step.
func (s *service) write(config string) {
	s.t.Helper()
	check(s.t, os.WriteFile(s.config+".new", []byte(fmt.Sprintf("cgroups: [%s]\n%s", s.slice, config)), 0o600))
	check(s.t, os.Rename(s.config+".new", s.config))
}

// container makes the cgroup of a container, with a process in it.
func (s *service) container(n int) {
	s.t.Helper()
	path := testenv.Child(s.t, s.slice, "docker-"+id(n)+".scope")
	cmd := testenv.Command(s.t, path, "sleep", "infinity")
	check(s.t, cmd.Start())
	s.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	s.engine.SetProcess(id(n), cmd.Process.Pid)
}

// entry is what the kernel has of a container.
func (s *service) entry(n int) (c maps.Container) {
	s.t.Helper()
	state, err := s.Filter.State()
	check(s.t, err)
	defer state.Close()
	rel, err := s.Root.Rel(filepath.Join(s.slice, "docker-"+id(n)+".scope"))
	check(s.t, err)
	cgroupID, err := s.Root.ID(rel)
	check(s.t, err)
	all, err := state.Containers()
	check(s.t, err)
	return all[cgroupID]
}

func (s *service) mayReachMetadata(n int) bool { return s.entry(n).Flags&maps.MayReachMetadata != 0 }

func (s *service) burst(n int) uint32 { return s.entry(n).Limit.Burst }

const rulesText = `containers:
  - name: "mailer-*"
    smtp: {rate: 120/minute, burst: 30}
  - label: metadata=yes
    metadata: allow
`

// startBesideMailer starts the daemon, with rulesText, when container 1, mailer-1, runs, and
// waits until that has its rule: from then on Docker is followed.
func (s *service) startBesideMailer() {
	s.t.Helper()
	s.container(1)
	s.engine.Run("start", id(1), "mailer-1", nil)
	s.start()
	s.eventually("the rule of a container from before", func() bool { return s.burst(1) == 30 })
}

func TestRules(t *testing.T) {
	s := newService(t, rulesText)
	s.startBesideMailer()

	s.container(2)
	if s.mayReachMetadata(2) {
		t.Error("a container that Docker has not told of may reach the metadata service")
	}
	s.engine.Run("start", id(2), "agent", map[string]string{"metadata": "yes"})
	s.eventually("the rule of a new container", func() bool { return s.mayReachMetadata(2) })
	if s.mayReachMetadata(1) || s.burst(2) != 0 {
		t.Errorf("rules for others hold: %+v, %+v", s.entry(1), s.entry(2))
	}

	s.engine.Run("rename", id(1), "web", nil)
	s.eventually("no rule after a new name", func() bool { return s.burst(1) == 0 })
	s.engine.Run("rename", id(1), "mailer-2", nil)
	s.eventually("a rule after a new name", func() bool { return s.burst(1) == 30 })

	state, err := s.Filter.State()
	check(t, err)
	defer state.Close()
	rel, err := s.Root.Rel(filepath.Join(s.slice, "docker-"+id(1)+".scope"))
	check(t, err)
	cgroupID, err := s.Root.ID(rel)
	check(t, err)
	check(t, state.SetLimit(cgroupID, policy.Limit{Burst: 7}))
	s.container(3)
	s.engine.Run("start", id(3), "mailer-3", nil)
	s.eventually("the rule of one more", func() bool { return s.burst(3) == 30 })
	if got := s.burst(1); got != 7 {
		t.Errorf("burst %d of a limit that was set by hand, want 7", got)
	}
	check(t, state.UnsetLimit(cgroupID))
	s.eventually("the rule when the limit is unset", func() bool { return s.burst(1) == 30 })

	s.write("mode: audit\n")
	s.eventually("no rules any more", func() bool { return s.burst(3) == 0 && !s.mayReachMetadata(2) })
	s.write(rulesText)
	s.reload <- unix.SIGHUP
	s.eventually("rules again", func() bool { return s.burst(3) == 30 && s.mayReachMetadata(2) })
	// Of what is due at once, any may come first.
	s.eventually("the watchdog is told", func() bool { return s.told("WATCHDOG=1") > 0 })
	s.stop()
	if got := s.notified[len(s.notified)-1]; got != "STOPPING=1" {
		t.Errorf("told at the end: %q", got)
	}
	if status, err := s.Filter.Status(); err != nil || !status.Enforcing || !s.mayReachMetadata(2) {
		t.Errorf("after the daemon: %+v, %v", status, err)
	}
}

// TestBadConfig changes the file to what is refused: what was in force stays.
func TestBadConfig(t *testing.T) {
	s := newService(t, "block: [192.0.2.1]\n"+rulesText)
	s.container(1)
	s.engine.Run("start", id(1), "agent", map[string]string{"metadata": "yes"})
	s.start()
	s.eventually("the rule", func() bool { return s.mayReachMetadata(1) })
	before, err := s.Filter.Status()
	check(t, err)
	s.write("block: [192.0.2.1, nonsense]\n")
	s.eventually("refused", func() bool { return strings.Contains(s.log.String(), "config.yaml:2: block: ") })
	check(t, os.Remove(s.config))
	s.eventually("refused without a file", func() bool { return strings.Contains(s.log.String(), "no such file") })
	after, err := s.Filter.Status()
	check(t, err)
	if program(before) != program(after) || !s.mayReachMetadata(1) {
		t.Error("a bad configuration has changed something")
	}
	s.write("block: [192.0.2.2]\n")
	s.eventually("a good one", func() bool {
		status, err := s.Filter.Status()
		check(t, err)
		return status.Policy.Block[0].String() == "192.0.2.2/32" || status.Policy.Block[0].String() == "192.0.2.2"
	})

	s.stop()
	s.write("nonsense: yes\n")
	if err := s.Run(t.Context()); err == nil {
		t.Error("a daemon with a bad configuration runs")
	}
	if status, err := s.Filter.Status(); err != nil || !status.Enforcing {
		t.Errorf("after a daemon with a bad configuration: %+v, %v", status, err)
	}
}

func program(s *loader.Status) uint32 {
	i := slices.IndexFunc(s.Hooks, func(h loader.Hook) bool { return h.Name == "egress" })
	return s.Hooks[i].Program
}

// TestDockerDown has Docker go and come back.
func TestDockerDown(t *testing.T) {
	s := newService(t, rulesText)
	s.container(1)
	s.engine.Run("start", id(1), "agent", map[string]string{"metadata": "yes"})
	s.start()
	s.eventually("the rule", func() bool { return s.mayReachMetadata(1) })

	check(t, s.engine.Stop())
	s.eventually("Docker is missed", func() bool { return strings.Contains(s.log.String(), "Docker does not answer") })
	s.container(2)
	s.engine.Run("start", id(2), "agent-2", map[string]string{"metadata": "yes"})
	if !s.mayReachMetadata(1) || s.mayReachMetadata(2) {
		t.Errorf("without Docker: %+v, %+v", s.entry(1), s.entry(2))
	}
	s.stop()

	// A daemon that begins without Docker leaves what the same rules have given.
	s.start()
	s.eventually("two checks", func() bool { return s.told("STATUS=enforcing") > 2 })
	if !s.mayReachMetadata(1) {
		t.Error("what the same rules have given was taken")
	}
	// With other rules nobody can say who may keep it.
	s.write("containers:\n  - label: metadata=other\n    metadata: allow\n")
	s.eventually("nothing is open by other rules", func() bool { return !s.mayReachMetadata(1) })
	s.write(rulesText)
	check(t, s.engine.Start())
	s.eventually("the rules with Docker", func() bool { return s.mayReachMetadata(1) && s.mayReachMetadata(2) })
}

// TestFlood tells of more containers than there are, and does not answer.
func TestFlood(t *testing.T) {
	s := newService(t, rulesText)
	s.start()
	s.eventually("Docker is followed", s.engine.Followed)
	for n := range 10000 {
		s.engine.Tell("start", id(1000+n))
	}
	s.container(1)
	s.engine.Run("start", id(1), "agent", map[string]string{"metadata": "yes"})
	s.eventually("the rule after a flood of events", func() bool { return s.mayReachMetadata(1) })
	s.engine.SetMute(true)
	s.engine.Tell("rename", id(1))
	s.stop() // at once
}

// A container that Docker would not tell of when it started gets its rule later.
func TestMissedStart(t *testing.T) {
	s := newService(t, rulesText)
	s.startBesideMailer()
	s.engine.SetBroken(true)
	s.container(2)
	s.engine.Run("start", id(2), "mailer-2", nil)
	s.eventually("the rule", func() bool { return s.burst(2) == 30 })
	if !strings.Contains(s.log.String(), "cannot look up a container") {
		t.Errorf("nothing was missed:\n%s", s.log.String())
	}
}

// A container gets its rule although this host does not show the process that Docker names,
// as in another namespace, or shows another one.
func TestUnknownProcess(t *testing.T) {
	s := newService(t, rulesText)
	// No check finds the containers.
	t.Cleanup(daemon.SetPace(time.Hour))
	s.startBesideMailer()
	for n, pid := range map[int]int{2: 1<<22 + 1, 3: os.Getpid(), 4: 0} {
		s.container(n)
		s.engine.SetProcess(id(n), pid)
		s.engine.Run("start", id(n), fmt.Sprint("mailer-", n), nil)
		s.eventually(fmt.Sprint("the rule of container ", n), func() bool { return s.burst(n) == 30 })
	}
}

// Another command replaces the maps of the state between two starts.
func TestReplacedMaps(t *testing.T) {
	s := newService(t, rulesText)
	t.Cleanup(daemon.SetPace(time.Hour))
	s.startBesideMailer()
	config, err := s.Load()
	check(t, err)
	other := loader.New(s.Filter.Pins(), s.Root)
	for n := 2; n < 5; n++ {
		check(t, other.Detach(t.Context(), nil))
		check(t, other.Attach(t.Context(), config.Cgroups, config.Policy))
		s.container(n)
		s.engine.Run("start", id(n), fmt.Sprint("mailer-", n), nil)
		s.eventually("the rule in the new maps", func() bool { return s.burst(n) == 30 })
	}
}

// While another command holds the lock, containers that start do not wait for it one by one. They
// get their rules once the lock is free.
func TestBusy(t *testing.T) {
	s := newService(t, rulesText)
	t.Cleanup(daemon.SetPace(time.Hour))
	t.Cleanup(daemon.SetPatience(2 * time.Second))
	s.startBesideMailer()
	for n := 2; n < 22; n++ {
		s.container(n)
	}
	lock, err := os.Open(s.Filter.Pins())
	check(t, err)
	defer lock.Close()
	check(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	for n := 2; n < 22; n++ {
		s.engine.Run("start", id(n), fmt.Sprint("mailer-", n), nil)
	}
	const one, all = "rules not applied to a container", "rules not applied to all containers"
	s.eventually("nobody gets the lock", func() bool { return strings.Contains(s.log.String(), all) })
	told := s.told("WATCHDOG=1")
	s.eventually("the watchdog is told", func() bool { return s.told("WATCHDOG=1") > told })
	if n := strings.Count(s.log.String(), one); n > 1 {
		t.Errorf("%d containers have waited for the lock", n)
	}
	check(t, lock.Close())
	for n := 2; n < 22; n++ {
		s.eventually(fmt.Sprint("the rule of container ", n), func() bool { return s.burst(n) == 30 })
	}
}

// A container that has no cgroup of its own is one all the same, as Docker says.
func TestUncovered(t *testing.T) {
	s := newService(t, "")
	s.start()
	s.engine.SetProcess(id(1), os.Getpid())
	s.engine.Run("start", id(1), "lost", nil)
	s.eventually("a container that is not covered", func() bool {
		return strings.Contains(s.log.String(), "msg=\"container not covered\" id="+id(1)+" name=lost")
	})
	s.eventually("systemctl tells", func() bool { return s.told("STATUS=enforcing, containers not covered: ") > 0 })
}

// TestRepair takes off what the daemon has attached.
func TestRepair(t *testing.T) {
	s := newService(t, "")
	s.start()
	for _, pin := range []string{"recognise", "cgroup-*/egress"} {
		paths, err := filepath.Glob(filepath.Join(s.Filter.Pins(), pin))
		check(t, err)
		if len(paths) != 1 {
			t.Fatalf("pins %s: %v", pin, paths)
		}
		check(t, os.Remove(paths[0]))
		s.eventually(pin+" is back", func() bool {
			_, err := os.Stat(paths[0])
			return !errors.Is(err, fs.ErrNotExist)
		})
	}
	s.eventually("in force", func() bool {
		status, err := s.Filter.Status()
		check(t, err)
		return status.Enforcing
	})
}

// TestRepairOneOfTwo detaches one of the two cgroups that the configuration names, and a third that somebody
// else has added.
func TestRepairOneOfTwo(t *testing.T) {
	s := newService(t, "")
	second, third := testenv.Child(t, testenv.Cgroup(t), "second.slice"), testenv.Child(t, testenv.Cgroup(t), "third.slice")
	s.slice += ", " + second
	s.write("")
	s.start()
	policed := func() []string {
		status, err := s.Filter.Status()
		check(t, err)
		return status.Cgroups
	}
	config, err := s.Load()
	check(t, err)
	check(t, s.Filter.Attach(t.Context(), []string{third}, config.Policy))
	check(t, s.Filter.Detach(t.Context(), []string{second, third}))
	s.eventually("the configured cgroup is policed again", func() bool { return slices.Contains(policed(), second) })
	if got := policed(); len(got) != 2 || slices.Contains(got, third) {
		t.Errorf("policed: %v", got)
	}
}

// TestBusyReload changes the file while another command holds the lock.
func TestBusyReload(t *testing.T) {
	s := newService(t, rulesText)
	t.Cleanup(daemon.SetPatience(time.Second))
	s.startBesideMailer()
	lock, err := os.Open(s.Filter.Pins())
	check(t, err)
	defer lock.Close()
	check(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	s.write(strings.ReplaceAll(rulesText, "burst: 30", "burst: 40"))
	s.eventually("not put in force", func() bool { return strings.Contains(s.log.String(), "configuration refused") })
	check(t, lock.Close())
	s.eventually("put in force later", func() bool { return s.burst(1) == 40 })
}

// TestStartWithOtherRules starts the daemon with rules that are new, but say the same of a container.
func TestStartWithOtherRules(t *testing.T) {
	s := newService(t, rulesText)
	s.startBesideMailer()
	s.stop()
	s.write(strings.Replace(rulesText, "containers:\n", "containers:\n  - {name: other, metadata: allow}\n", 1))
	docker, err := container.OpenDocker("unix://" + s.engine.Socket)
	check(t, err)
	s.Containers = container.NewInventory(docker)
	before, ready := len(s.log.String()), s.told("READY=1")
	s.container(2)
	s.engine.Run("start", id(2), "mailer-2", nil)
	late, notify := false, s.Notify
	s.Notify = func(state string) {
		late = late || strings.HasPrefix(state, "READY=1") && s.burst(2) != 30
		notify(state)
	}
	s.start()
	s.eventually("ready again", func() bool { return s.told("READY=1") > ready })
	s.stop()
	if log := s.log.String()[before:]; late || strings.Count(log, "rules applied") != 1 || !strings.Contains(log, `msg="rules applied" containers=1`) {
		t.Errorf("a container has lost its rule for a while, or has got it late: %v\n%s", late, log)
	}
}
