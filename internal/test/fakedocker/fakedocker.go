// Package fakedocker answers as Docker's daemon does, about containers that a test makes up.
package fakedocker

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Daemon is a daemon at a socket. Its methods may be called concurrently.
type Daemon struct {
	// Socket is the path of the socket.
	Socket string
	server *http.Server

	mu         sync.Mutex
	containers map[string]map[string]any // as /containers/json shows them
	pids       map[string]int
	listeners  map[chan []byte]bool
	mute       bool
	broken     bool
}

// New returns a Daemon that will listen at a socket, and knows no container.
func New(socket string) *Daemon {
	return &Daemon{
		Socket:     socket,
		containers: map[string]map[string]any{}, pids: map[string]int{}, listeners: map[chan []byte]bool{},
	}
}

// Start makes the Daemon listen.
func (d *Daemon) Start() error {
	l, err := net.Listen("unix", d.Socket)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", "1.47") })
	mux.HandleFunc("/", d.answer)
	d.server = &http.Server{Handler: mux}
	go d.server.Serve(l)
	return nil
}

// Stop closes the socket and all connections. The Daemon keeps its containers.
func (d *Daemon) Stop() error { return d.server.Close() }

// SetMute makes the Daemon answer no question about containers.
func (d *Daemon) SetMute(mute bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mute = mute
}

// SetBroken makes the Daemon fail whenever it is asked for a single container.
func (d *Daemon) SetBroken(broken bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.broken = broken
}

// Followed says whether somebody follows the events.
func (d *Daemon) Followed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.listeners) > 0
}

// SetProcess says which process is a container's first. Until then it is one that does not
// exist.
func (d *Daemon) SetProcess(id string, pid int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pids[id] = pid
}

// Run makes a container known or renames it, and tells of an action.
func (d *Daemon) Run(action, id, name string, labels map[string]string) {
	d.Add(id, name, labels)
	d.Tell(action, id)
}

// Add makes a container known or renames it, and tells nobody.
func (d *Daemon) Add(id, name string, labels map[string]string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.containers[id] = map[string]any{
		"Id": id, "Names": []string{"/" + name}, "Image": "image", "Labels": labels, "State": "running",
		"ImageID": "sha256:" + id, "Command": "/entrypoint.sh", "Created": 1, "Status": "Up 5 minutes",
		"Mounts": mounts(id), "NetworkSettings": map[string]any{"Networks": networks(id)},
	}
}

// Remove makes a container unknown, and tells nobody.
func (d *Daemon) Remove(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.containers, id)
	delete(d.pids, id)
}

// Tell tells of an action.
func (d *Daemon) Tell(action, id string) {
	now := time.Now()
	event := mustMarshal(map[string]any{
		"Type": "container", "Action": action, "Actor": map[string]any{"ID": id, "Attributes": map[string]string{"name": "n"}},
		"scope": "local", "time": now.Unix(), "timeNano": now.UnixNano(),
	})
	event = append(event, '\n')
	d.mu.Lock()
	defer d.mu.Unlock()
	for l := range d.listeners {
		l <- event
	}
}

func (d *Daemon) answer(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	mute := d.mute
	d.mu.Unlock()
	if mute {
		<-r.Context().Done()
		return
	}
	_, path, _ := strings.Cut(r.URL.Path[1:], "/") // the version goes before it
	if path == "events" {
		d.stream(w, r)
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	if path == "containers/json" {
		_, _ = w.Write(mustMarshal(slices.AppendSeq([]map[string]any{}, maps.Values(d.containers))))
		return
	}
	id := strings.TrimSuffix(strings.TrimPrefix(path, "containers/"), "/json")
	c, ok := d.containers[id]
	switch {
	case d.broken:
		http.Error(w, `{"message":"busy"}`, http.StatusInternalServerError)
	case !ok:
		http.Error(w, `{"message":"No such container"}`, http.StatusNotFound)
	default:
		_, _ = w.Write(mustMarshal(d.inspected(id, c)))
	}
}

// noProcess is beyond the greatest number of a process (PID_MAX_LIMIT).
const noProcess = 1<<22 + 1

// inspected is what /containers/ID/json shows, about as long as Docker's.
func (d *Daemon) inspected(id string, c map[string]any) map[string]any {
	pid, ok := d.pids[id]
	if !ok {
		pid = noProcess
	}
	var env []string
	for i := range 20 {
		env = append(env, fmt.Sprintf("SETTING_OF_THE_IMAGE_%d=%s", i, id[:40]))
	}
	dir := "/var/lib/docker/containers/" + id
	return map[string]any{
		"Id": id, "Name": c["Names"].([]string)[0], "Created": "2026-01-01T00:00:00Z", "Path": "/entrypoint.sh", "Args": []string{"serve"},
		"State":          map[string]any{"Status": "running", "Running": true, "Pid": pid, "StartedAt": "2026-01-01T00:00:00Z"},
		"ResolvConfPath": dir + "/resolv.conf", "HostnamePath": dir + "/hostname", "HostsPath": dir + "/hosts", "LogPath": dir + "/" + id + "-json.log",
		"Config": map[string]any{"Image": c["Image"], "Labels": c["Labels"], "Env": env, "Cmd": []string{"serve"}},
		"HostConfig": map[string]any{
			"NetworkMode": "default", "RestartPolicy": map[string]any{"Name": "always"}, "ShmSize": 67108864, "Runtime": "runc",
			"MaskedPaths":   []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"},
			"ReadonlyPaths": []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
		"GraphDriver":     map[string]any{"Name": "overlay2", "Data": map[string]string{"LowerDir": strings.Repeat("/var/lib/docker/overlay2/"+id+"/diff:", 10)}},
		"Mounts":          mounts(id),
		"NetworkSettings": map[string]any{"Networks": networks(id)},
	}
}

func mounts(id string) any {
	return []any{map[string]any{"Type": "volume", "Name": id, "Source": "/var/lib/docker/volumes/" + id + "/_data", "Destination": "/data", "Driver": "local", "RW": true}}
}

func networks(id string) any {
	return map[string]any{"bridge": map[string]any{"NetworkID": id, "EndpointID": id, "Gateway": "172.17.0.1", "IPAddress": "172.17.0.2", "IPPrefixLen": 16}}
}

func (d *Daemon) stream(w http.ResponseWriter, r *http.Request) {
	events := make(chan []byte, 20000)
	d.mu.Lock()
	d.listeners[events] = true
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.listeners, events)
	}()
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case event := <-events:
			_, _ = w.Write(event)
			w.(http.Flusher).Flush()
		}
	}
}

func mustMarshal(v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return text
}
