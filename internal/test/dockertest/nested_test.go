package dockertest

import (
	"archive/tar"
	"os"
	"slices"
	"testing"

	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// testNested starts an engine in a container, as CI jobs do. Whatever its containers do
// counts for the outer container.
func testNested(t *testing.T, e *engine) {
	inner := e.nested(t, "nested")
	bridged, onHost := inner.run(t, "inner"), inner.run(t, "inner-host", "--network=host")
	seen := e.Capture(t)
	expectMetadataRefused(t, bridged.Agent)
	expectMetadataRefused(t, onHost.Agent)
	for _, c := range []*lab.Agent{bridged.Agent, onHost.Agent, e.exec(t, "nested")} {
		c.ConnectAtOnce(at(lab.Mail4, 25), 60)
	}
	expectBurst(t, seen.Settle(t), 180)
	// A cgroup in there with the name of a container of the host is not a container.
	got := row(t, e.Network, e.id(t, "nested"))
	if got.Blocked.Connects != 6 || got.Blocked.Packets != 4 || got.SMTP.Allowed != 5 {
		t.Errorf("counted %+v, %+v, want 6 connects, 4 packets, 5 mails", got.Blocked, got.SMTP)
	}
	if rows := e.Stats(t).Containers; slices.ContainsFunc(rows, func(c stats.Container) bool { return c.ID == bridged.id || c.ID == onHost.id }) {
		t.Errorf("a container within a container has a row of its own: %+v", rows)
	}
	expectStatus(t, e.Network, 0)
}

// nested starts an engine in a privileged container, with this machine's programs.
func (e *engine) nested(t *testing.T, name string) *engine {
	t.Helper()
	const host = image + "-host"
	var files []file
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		files = append(files, file{Header: tar.Header{Name: dir, Linkname: "usr/" + dir, Typeflag: tar.TypeSymlink}})
	}
	e.importImage(t, host, append(files, executable(t, program[1:], e.program(t)))...)

	inner := &engine{Network: e.Network, outer: e, name: name}
	if err := os.Mkdir(e.path(name), 0o700); err != nil {
		t.Fatal(err)
	}
	ready := listenNotify(t, e.path(name+"/notify"))
	e.removeAfter(t, name)
	// As with --privileged, except a capability that virtual machines can lack.
	// As in any cgroup with controllers for cgroups below it, processes must leave the root.
	e.docker(t, "run", "-d", "--name", name, "--cap-add=ALL", "--cap-drop=SYS_RESOURCE", "--security-opt=seccomp=unconfined",
		"--security-opt=apparmor=unconfined", "--security-opt=systempaths=unconfined", "-v", "/usr:/usr:ro", "-v", "/etc/alternatives:/etc/alternatives:ro",
		"-v", "/var/lib/docker", "-v", e.path(name)+":/run/outer", "-e", "NOTIFY_SOCKET=/run/outer/notify", host, "/bin/sh", "-ec",
		"mount -o remount,rw /sys/fs/cgroup; mkdir /sys/fs/cgroup/engine; echo 0 >/sys/fs/cgroup/engine/cgroup.procs; "+
			// dockerd gives a containerd of its own 15 s to start. Only dockerd says when it is ready.
			"env -u NOTIFY_SOCKET containerd --root /var/lib/docker/containerd & "+
			"until [ -S "+innerContainerd+" ]; do sleep 0.1; done; "+
			"exec dockerd --containerd "+innerContainerd+" -H unix://"+innerSocket+
			" --exec-opt native.cgroupdriver=cgroupfs --bip 172.31.0.1/24 --ipv6 --fixed-cidr-v6 fd00:d1c::/64")
	if err := awaitReady(ready); err != nil {
		t.Fatalf("the dockerd in %s is not ready: %v\n%s", name, err, e.docker(t, "logs", name))
	}
	save, load := e.command("save", image), inner.command("load")
	var err error
	if load.Stdin, err = save.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := save.Start(); err != nil {
		t.Fatal(err)
	}
	if exit := lab.Run(t, load); exit.Code != 0 {
		t.Fatalf("docker load: %s", exit.Stderr)
	}
	if err := save.Wait(); err != nil {
		t.Fatal(err)
	}
	return inner
}

const innerSocket, innerContainerd = "/run/docker.sock", "/run/containerd/containerd.sock"
