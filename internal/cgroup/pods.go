package cgroup

import (
	"os"
	"path"
	"sync"

	"golang.org/x/sys/unix"
)

// WatchPods returns a channel that gets a message soon after a pod's cgroup has been made, which
// a kubelet does before it asks its runtime for the pod. Several pods may share one message. The
// channel is closed, or nil, if the kernel does not tell. The caller calls stop.
func (r Root) WatchPods() (made <-chan struct{}, stop func()) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, func() {}
	}
	// It can be read until it is closed.
	f := os.NewFile(uintptr(fd), "inotify")
	r.watchParents(fd)
	told := make(chan struct{}, 1)
	var reading sync.WaitGroup
	reading.Go(func() {
		buf := make([]byte, 16*(unix.SizeofInotifyEvent+unix.NAME_MAX+1))
		for {
			if _, err := f.Read(buf); err != nil {
				return
			}
			r.watchParents(fd) // the cgroup of a QoS class may be new
			select {
			case told <- struct{}{}:
			default:
			}
		}
	})
	return told, func() { f.Close(); reading.Wait() }
}

// Pods returns the cgroups of pods, by uid.
func (r Root) Pods() (map[string]string, error) {
	found, err := r.Outermost("/", func(rel string) bool {
		return podName.MatchString(path.Base(rel)) || ContainerID(rel) != ""
	})
	pods := map[string]string{}
	for _, c := range found {
		uid := PodUID(path.Join(c.Rel, anID))
		if _, ok := pods[uid]; uid != "" && !ok {
			pods[uid] = c.Rel
		}
	}
	return pods, err
}

// watchParents watches the cgroups in which a kubelet makes those of pods. To watch one again
// changes nothing.
func (r Root) watchParents(fd int) {
	for _, parent := range podParents {
		for _, class := range []string{"", "/besteffort", "/burstable", "/kubepods-besteffort.slice", "/kubepods-burstable.slice"} {
			unix.InotifyAddWatch(fd, r.Path("/"+parent+class), unix.IN_CREATE|unix.IN_ONLYDIR)
		}
	}
}
