// Package preflight finds out whether the filter would work on this host, without putting it
// in force.
package preflight

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/docker"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Result is the result of one check.
type Result string

const (
	OK   Result = "ok"
	Warn Result = "warn" // the filter works; something is left open or may be unexpected
	Fail Result = "fail" // the filter cannot be in force
)

// Check is one row of the report.
type Check struct {
	Name   string `json:"name"`
	Result Result `json:"result"`
	// Detail says what was found, and what to do about it.
	Detail string `json:"detail"`
}

// Report holds the results of all checks.
type Report struct {
	// Ready says whether the filter can be in force: no check has failed.
	Ready  bool    `json:"ready"`
	Checks []Check `json:"checks"`
	// Defences are those that status lists after an attach, each with whether this host can
	// have it.
	Defences []loader.Defence `json:"defences"`
}

func (r *Report) add(name string, result Result, format string, args ...any) {
	r.Checks = append(r.Checks, Check{name, result, fmt.Sprintf(format, args...)})
	r.Ready = r.Ready && result != Fail
}

// defence adds the check of a defence: whether this host can have it or, if not, why.
func (r *Report) defence(name string, active bool, detail string) {
	result, reason := OK, ""
	if !active {
		result, reason = Warn, detail
	}
	r.add(name, result, "%s", detail)
	// One reason is enough for what is not there.
	if !slices.ContainsFunc(r.Defences, func(d loader.Defence) bool { return d.Name == name }) {
		r.Defences = append(r.Defences, loader.Defence{Name: name, Active: active, Reason: reason})
	}
}

// Host is what the checks look at.
type Host struct {
	Filter *loader.Filter
	Root   cgroup.Root
	// Docker is the daemon to ask; nil to ask none.
	Docker *docker.Client
	// Pods is the container runtime of a Kubernetes node; nil to ask none.
	Pods   container.Source
	Config policy.Config
	// Resolvers are DNS servers of this host that the policy blocks.
	Resolvers []netip.Addr
}

// Run makes all checks.
func (h Host) Run(ctx context.Context) *Report {
	r := &Report{Ready: true, Defences: []loader.Defence{}}
	h.kernel(r)
	h.cgroups(r)
	state, err := maps.CreateState()
	if err != nil {
		r.add("programs", Fail, "%s", explained(err))
		r.Defences = append(r.Defences, loader.Defence{Name: loader.SocketFamilies, Reason: notTried}, loader.Defence{Name: loader.HostSide, Reason: notTried})
	} else {
		defer state.Close()
		h.programs(r, state)
	}
	h.others(r)
	h.docker(ctx, r)
	h.covered(r)
	h.pods(ctx, r)
	h.resolvers(r)
	if r.Ready {
		h.selfTest(ctx, r)
	}
	return r
}

// notTried is the reason of defences that need what could not be had.
const notTried = "not tried, since the state could not be made"

// PodWarnings says what a policy means for the pods of a Kubernetes node; nothing on other hosts.
func PodWarnings(root cgroup.Root, p policy.Policy) (warnings []string) {
	if !root.HasPods() || !p.PolicesPods() {
		return nil
	}
	if !p.SparesPods() {
		warnings = append(warnings, podsArePoliced)
	}
	if i := p.OpensToPods(); i >= 0 {
		warnings = append(warnings, fmt.Sprintf("this is a Kubernetes node, and rule %d of containers names no namespace: whoever may make a pod anywhere can match it by a name, an image or a label; add a namespace", i+1))
	}
	return warnings
}

const podsArePoliced = "this is a Kubernetes node: all pods are policed, including those that run the node (CNI, CSI, with the host's network or without), and lose the metadata service and packet sockets; to spare these, have egressbpf run apply a rule such as `containers: [{namespace: kube-system, metadata: allow, socket_families: any}]`; to leave all pods out, list only what is to be policed with --scopes, such as docker-{id}.scope and {build}"

// The oldest kernel that is supported.
const oldestMajor, oldestMinor = 5, 10

func (h Host) kernel(r *Report) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		r.add("kernel", Fail, "%v", err)
		return
	}
	release := unix.ByteSliceToString(u.Release[:])
	major, minor, ok := version(release)
	if !ok || major < oldestMajor || major == oldestMajor && minor < oldestMinor {
		r.add("kernel", Fail, "%s: want %d.%d or newer", release, oldestMajor, oldestMinor)
		return
	}
	r.add("kernel", OK, "%s", release)
}

// version reads the beginning of a kernel's release, such as 6.1.0-28-amd64.
func version(release string) (major, minor int, ok bool) {
	first, rest, ok := strings.Cut(release, ".")
	second := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789"))]
	major, err1 := strconv.Atoi(first)
	minor, err2 := strconv.Atoi(second)
	return major, minor, ok && err1 == nil && err2 == nil
}

func (h Host) cgroups(r *Report) {
	if err := cgroup.CheckNamespace(); err != nil {
		r.add("cgroup2", Fail, "%v: run it on the host, outside of any container", err)
		return
	}
	gap, err := loader.SocketIdentityGap()
	switch {
	case err != nil:
		r.add("cgroup2", Fail, "%v", err)
	case gap != "":
		r.add("cgroup2", Warn, "%s", gap)
		r.Defences = append(r.Defences, loader.Defence{Name: loader.SocketIdentity, Reason: gap})
	default:
		r.add("cgroup2", OK, "%s", h.Root)
	}
	if delegates, err := h.Root.Delegates(); err != nil {
		r.defence(loader.CgroupBoundary, false, err.Error())
	} else if !delegates {
		r.defence(loader.CgroupBoundary, false, loader.NoDelegation)
	}
}

// needsNames says whether the config recognises containers by the names of their cgroups.
func (h Host) needsNames() bool {
	if len(h.Config.Cgroups) == 0 {
		return h.Config.Recognises("/")
	}
	return slices.ContainsFunc(h.Config.Cgroups, func(path string) bool {
		rel, err := h.Root.Rel(path)
		return err == nil && h.Config.Recognises(rel)
	})
}

func (h Host) programs(r *Report, state *maps.State) {
	progs, err := loader.Load(h.Config.Policy, state, "/", 1)
	if err != nil {
		r.add("programs", Fail, "%s", explained(err))
	} else {
		progs.Close()
		r.add("programs", OK, "the kernel accepts them with this policy")
	}

	if err := loader.ProbeRecognise(state); err != nil {
		result := Warn
		if h.needsNames() {
			result = Fail
		}
		r.add("recognise", result, "%s", cannotRecognise(err))
	} else {
		r.add("recognise", OK, "a container is recognised as soon as its cgroup is made")
	}
	h.families(r)
	h.hostSide(r, state)
}

// cannotRecognise says why containers are not recognised, and what to do.
func cannotRecognise(err error) string {
	if loader.Inconclusive(err) {
		return explained(err)
	}
	return fmt.Sprintf("containers cannot be told from services beside them: let Docker put containers into a cgroup of their own, and name it with --cgroup (%s)", firstLine(err))
}

func (h Host) families(r *Report) {
	if h.Config.Families == policy.AnyFamily {
		r.defence(loader.SocketFamilies, false, "turned off by the policy: containers with CAP_NET_RAW can bypass the filter")
		return
	}
	if err := h.Filter.ProbeFamilies(); err != nil {
		r.defence(loader.SocketFamilies, false, fmt.Sprintf("egressbpf cannot refuse sockets on this kernel; run containers that do not need CAP_NET_RAW with --cap-drop=NET_RAW (%s)", oneLine(err)))
		return
	}
	r.defence(loader.SocketFamilies, true, "a socket that must be refused was refused")
}

func (h Host) hostSide(r *Report, state *maps.State) {
	if h.Config.HostSide == policy.Off {
		r.defence(loader.HostSide, false, "turned off by the policy")
		return
	}
	detail := "the kernel accepts its programs"
	host, err := loader.LoadHost(h.Config.Policy, state)
	if errors.Is(err, ebpf.ErrNotSupported) {
		detail = "the kernel accepts its program, which judges the bridges that exist at attach, as before 6.4 or without the kernel's BTF or JIT compiler"
		var prog *ebpf.Program
		if prog, err = loader.LoadHostIngress(h.Config.Policy, state, "/", 1); err == nil {
			prog.Close()
		}
	} else if err == nil {
		host.Close()
	}
	if err != nil {
		detail = explained(err)
	}
	r.defence(loader.HostSide, err == nil, detail)
}

// others lists programs of others at the hooks where the filter would be attached.
func (h Host) others(r *Report) {
	paths := h.Config.Cgroups
	if len(paths) == 0 {
		paths = []string{string(h.Root)}
	}
	ours := map[ebpf.ProgramID]bool{}
	if s, err := h.Filter.Status(); err == nil {
		for _, hook := range s.Hooks {
			ours[ebpf.ProgramID(hook.Program)] = true
		}
		paths = append(slices.Clone(paths), s.Cgroups...)
	}
	slices.Sort(paths)
	var found []string
	for _, path := range slices.Compact(paths) {
		dir, err := os.Open(path)
		if err != nil {
			continue // attach makes it
		}
		for _, attach := range loader.AttachTypes() {
			result, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: attach})
			if err != nil {
				continue
			}
			for _, p := range result.Programs {
				if !ours[p.ID] {
					found = append(found, fmt.Sprintf("%s (%s at %s)", programName(p.ID), attach, path))
				}
			}
		}
		dir.Close()
	}
	if len(found) == 0 {
		r.add("other programs", OK, "none")
		return
	}
	r.add("other programs", OK, "they keep working; a packet must pass them all: %s", strings.Join(found, ", "))
}

func programName(id ebpf.ProgramID) string {
	name := fmt.Sprint("program ", uint32(id))
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return name
	}
	defer prog.Close()
	if info, err := prog.Info(); err == nil && info.Name != "" {
		name += " " + strconv.Quote(info.Name)
	}
	return name
}

// patience is how long to wait for Docker's daemon, and for each process of the self-test. What
// the kernel takes to verify programs, minutes on a slow machine, does not count.
const patience = 20 * time.Second

// hybridRoot is where runc looks for the unified hierarchy on the hybrid layout.
const hybridRoot = "/sys/fs/cgroup/unified"

func (h Host) docker(ctx context.Context, r *Report) {
	config, err := docker.ReadConfig(docker.ConfigFile)
	if err != nil {
		r.add("docker config", Warn, "%v", err)
	} else if config.CgroupParent != "" {
		h.parent(r, config.CgroupParent)
	}
	if h.Docker == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	info, err := h.Docker.Info(ctx)
	if err != nil {
		r.add("docker", Warn, "not asked: %v", err)
		return
	}
	detail := fmt.Sprintf("%s at %s, cgroup driver %s, cgroup v%d", info.Version, h.Docker.Host(), info.CgroupDriver, info.CgroupVersion)
	switch {
	case info.CgroupDriver == "none":
		r.add("docker", Fail, "%s: containers have no cgroups of their own; rootless Docker needs cgroup v2 with delegation", detail)
	case info.CgroupVersion == 1 && h.Root != hybridRoot:
		r.add("docker", Fail, "%s: containers have cgroups in the unified hierarchy only if that is mounted at %s; boot with systemd.unified_cgroup_hierarchy=1", detail, hybridRoot)
	case info.CgroupVersion == 1:
		// On the hybrid layout runc from 1.1 on uses both.
		r.add("docker", Warn, "%s: runc before 1.1 gives containers no cgroups in the unified hierarchy; look for NOT COVERED in egressbpf status while one runs, or boot with systemd.unified_cgroup_hierarchy=1", detail)
	case info.Rootless:
		r.add("docker", Warn, "%s, rootless: its bridge is in a network namespace of its own, which host_side does not see", detail)
	default:
		r.add("docker", OK, "%s", detail)
	}
}

// pods looks at a Kubernetes node.
func (h Host) pods(ctx context.Context, r *Report) {
	for _, text := range PodWarnings(h.Root, h.Config.Policy) {
		r.add("kubernetes", Warn, "%s", text)
	}
	if h.Pods == nil || !h.Root.HasPods() && !h.Pods.Started() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	const without = "pods have no names, and rules by namespace, pod or label are not applied to them"
	switch all, err := h.Pods.List(ctx); {
	case err != nil:
		r.add("container runtime", Warn, "not asked: %v: %s", err, without)
	case !h.Pods.Started():
		r.add("container runtime", Warn, "no socket of one at the usual places: %s; name it with --cri-endpoint", without)
	default:
		r.add("container runtime", OK, "%s, %d containers and sandboxes of pods", h.Pods.Host(), len(all))
	}
}

// parent says whether containers in the daemon's cgroup-parent would be recognised.
func (h Host) parent(r *Report, parent string) {
	if h.Config.IsContainer(cgroup.DockerContainer(parent)) {
		r.add("docker config", OK, "cgroup-parent %s: containers there are recognised", parent)
	} else {
		r.add("docker config", Warn, "cgroup-parent %s: --scopes does not recognise containers there", parent)
	}
}

// covered looks for running containers that would not be policed.
func (h Host) covered(r *Report) {
	running, systems, err := h.Root.Containers()
	if err != nil {
		r.add("containers", Warn, "%v", err)
		return
	}
	var missed, exposed []string
	for _, c := range running {
		if e, err := h.Root.Exposure(c.Rel); err == nil && e != (cgroup.Exposure{}) && c.Rel != cgroup.OwnContainer() {
			exposed = append(exposed, strconv.Quote(c.Rel))
		}
		if !h.polices(c.Rel) {
			missed = append(missed, strconv.Quote(c.Rel))
		}
	}
	if len(missed) > 0 {
		r.add("containers", Warn, "%d of %d would not be policed, such as %s", len(missed), len(running), missed[0])
	} else {
		r.add("containers", OK, "%d run, and all would be policed", len(running))
	}
	systems = slices.DeleteFunc(systems, func(s cgroup.System) bool { return h.polices(s.Cgroup) })
	if len(systems) > 0 {
		r.add("containers", Warn, "%d system containers would not be policed, such as %q of %s: if you do not trust them, police them with --scopes default,lxc.payload.*,systemd-nspawn@*,machine-*.scope", len(systems), systems[0].Name, systems[0].Engine)
	}
	if len(exposed) > 0 {
		r.defence(loader.CgroupBoundary, false, fmt.Sprintf("%d containers have the host's cgroup namespace or tree, such as %s: they can leave their cgroups, or start containers beside them", len(exposed), exposed[0]))
	}
}

// polices says whether the config polices a container's cgroup.
func (h Host) polices(rel string) bool {
	if len(h.Config.Cgroups) == 0 {
		return h.Config.IsContainer(rel)
	}
	return slices.ContainsFunc(h.Config.Cgroups, func(path string) bool {
		of, err := h.Root.Rel(path)
		return err == nil && cgroup.Within(rel, of) && (!h.Config.Recognises(of) || h.Config.IsContainer(rel))
	})
}

func (h Host) resolvers(r *Report) {
	if len(h.Resolvers) == 0 {
		r.add("resolvers", OK, "the policy blocks no DNS server that containers are given")
		return
	}
	r.add("resolvers", Warn, "the policy blocks the DNS servers %v that containers are given: use --allow-dns", h.Resolvers)
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// explained is the first line of an error, with what may have refused something to this process.
func explained(err error) string {
	line := strings.ReplaceAll(firstLine(err), loader.MemlockHint, "")
	if why := loader.WhyRefused(err); why != "" {
		line += "; " + why
	}
	return line
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
