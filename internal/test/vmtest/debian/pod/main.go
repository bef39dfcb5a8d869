// Command pod runs a command in a pod, as a kubelet with the systemd cgroup driver makes them, and prints
// what the command wrote. It exits with the command's exit code, or with 125 if there is none. The pod is
// removed. The runtime is containerd, at its usual socket.
//
//	pod [-host-network] NAMESPACE NAME IMAGE COMMAND [ARG]...
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const noResult = 125

func main() {
	log.SetFlags(0)
	hostNetwork := flag.Bool("host-network", false, "give the pod the network of the node")
	flag.Parse()
	args := flag.Args()
	if len(args) < 4 {
		log.Print("want NAMESPACE NAME IMAGE COMMAND")
		os.Exit(noResult)
	}
	code, err := run(*hostNetwork, args[0], args[1], args[2], args[3:])
	if err != nil {
		log.Print(err)
		code = noResult
	}
	os.Exit(code)
}

func run(hostNetwork bool, namespace, name, image string, command []string) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	conn, err := grpc.NewClient("unix:///run/containerd/containerd.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	api := runtime.NewRuntimeServiceClient(conn)

	uid, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		return 0, err
	}
	pod := podConfig(namespace, name, strings.TrimSpace(string(uid)))
	if pod.LogDirectory, err = os.MkdirTemp("", "pod-"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(pod.LogDirectory)
	namespaces := &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}
	if hostNetwork {
		namespaces.Network = runtime.NamespaceMode_NODE
		pod.Hostname = ""
	}
	pod.Linux.SecurityContext = &runtime.LinuxSandboxSecurityContext{NamespaceOptions: namespaces}

	sandbox, err := api.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: pod})
	if err != nil {
		return 0, fmt.Errorf("sandbox: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, stopped := api.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: sandbox.PodSandboxId})
		_, removed := api.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: sandbox.PodSandboxId})
		err = errors.Join(err, stopped, removed)
	}()
	container, err := api.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: sandbox.PodSandboxId, SandboxConfig: pod, Config: &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: "main"},
		Image:    &runtime.ImageSpec{Image: image, UserSpecifiedImage: image},
		Command:  command,
		LogPath:  "main.log",
		Labels:   map[string]string{"io.kubernetes.container.name": "main"},
		Linux:    &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: namespaces}},
	}})
	if err == nil {
		_, err = api.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: container.ContainerId})
	}
	if err != nil {
		return 0, fmt.Errorf("container: %w", err)
	}
	for {
		answer, err := api.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: container.ContainerId})
		if err != nil {
			return 0, err
		}
		if answer.Status.State == runtime.ContainerState_CONTAINER_EXITED {
			code = int(answer.Status.ExitCode)
			break
		}
		time.Sleep(50 * time.Millisecond) // not every runtime has events
	}
	text, err := os.ReadFile(filepath.Join(pod.LogDirectory, "main.log"))
	for line := range strings.Lines(string(text)) {
		// TIME STREAM F TEXT
		if fields := strings.SplitN(line, " ", 4); len(fields) == 4 {
			fmt.Print(fields[3])
		}
	}
	return code, err
}

func podConfig(namespace, name, uid string) *runtime.PodSandboxConfig {
	return &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Namespace: namespace, Name: name, Uid: uid},
		Hostname: name,
		Labels: map[string]string{
			"io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.name": name, "io.kubernetes.pod.uid": uid,
		},
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent: "kubepods-besteffort-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice",
		},
	}
}
