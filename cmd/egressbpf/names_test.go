package main

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/stats"
)

// daemon answers on a socket as Docker would for the containers, given as ID=NAME. "stall"
// never answers, "broken" answers nonsense.
func daemon(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("unix", args[0])
	ts.Check(err)
	mux := http.NewServeMux()
	var list []map[string]any
	for _, arg := range args[1:] {
		id, name, _ := strings.Cut(arg, "=")
		name, pid, _ := strings.Cut(name, ":")
		list = append(list, map[string]any{"Id": id, "Names": []string{"/" + name}})
		mux.HandleFunc("/v1.41/containers/"+id+"/json", func(w http.ResponseWriter, _ *http.Request) {
			n, _ := strconv.Atoi(pid)
			_ = json.NewEncoder(w).Encode(map[string]any{"Id": id, "Name": "/" + name, "State": map[string]any{"Pid": n}})
		})
	}
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", "1.41") })
	mux.HandleFunc("/v1.41/containers/json", func(w http.ResponseWriter, r *http.Request) {
		switch args[1] {
		case "stall":
			<-r.Context().Done()
		case "broken":
			_, _ = io.WriteString(w, "\x1b[2J")
		default:
			_ = json.NewEncoder(w).Encode(list)
		}
	})
	server := &http.Server{Handler: mux}
	go func() { _ = server.Serve(l) }()
	ts.Defer(func() { server.Close() })
}

// No daemon is asked for names if there is no container to name.
func TestNoNamesNeeded(t *testing.T) {
	var stderr strings.Builder
	docker, err := container.OpenDocker("unix:///nothing")
	check(t, err)
	n := &names{containers: container.NewInventory(docker), asked: true, stderr: &stderr}
	n.addTo(t.Context(), &stats.Stats{Containers: []stats.Container{{Identity: container.Identity{ID: "web"}}}})
	if n.err != nil || stderr.Len() > 0 {
		t.Errorf("asked: %v, %s", n.err, &stderr)
	}
	for range 2 {
		n.addTo(t.Context(), &stats.Stats{Containers: []stats.Container{{Identity: container.Identity{ID: hex}}}})
	}
	if n.err == nil || strings.Count(stderr.String(), "warning: ") != 1 {
		t.Errorf("%v, %s", n.err, &stderr)
	}
}
