package traffic

import (
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
)

// WorkerArg is the argument with which this program is a worker: a process in a lab that does
// operations when it is asked to.
const WorkerArg = "traffic-worker"

// setup tells a worker where it is.
type setup struct {
	Container, Host, Server string // paths of network namespaces
	Cgroups                 lab.Cgroups
	CPUs                    []int
	Operations              []string // to prepare
}

// request asks for an operation.
type request struct {
	Operation string
	N, CPUs   int
}

// answer says how long one operation took, on average.
type answer struct {
	Nanoseconds float64
	Err         string
}

type worker struct {
	setup
	container, host, server *lab.Netns
	// listeners are the server's.
	listeners map[netip.Addr]int
	// outside are the sockets of a client beyond the host, not connected yet.
	outside struct{ udp, tcp int }
	// ready are the operations for each CPU, by name.
	ready map[string][]do
}

// Work is the main function of a worker. It answers its setup and each request, and ends with
// its stdin.
func Work() error {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	in, out := gob.NewDecoder(os.Stdin), gob.NewEncoder(os.Stdout)
	w := &worker{listeners: map[netip.Addr]int{}, ready: map[string][]do{}}
	if err := in.Decode(&w.setup); err != nil {
		return err
	}
	var a answer
	err := w.prepare()
	for {
		if err != nil {
			a.Err = err.Error()
		}
		if err := out.Encode(a); err != nil {
			return err
		}
		var r request
		if err := in.Decode(&r); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		a = answer{}
		a.Nanoseconds, err = w.measure(r)
	}
}

// prepare makes the sockets of all operations. Those of the server are made outside the
// policed cgroup; then the worker becomes a service, and then a container.
func (w *worker) prepare() (err error) {
	for _, ns := range []struct {
		open **lab.Netns
		path string
	}{{&w.container, w.Container}, {&w.host, w.Host}, {&w.server, w.Server}} {
		if *ns.open, err = lab.OpenNetns(ns.path); err != nil {
			return err
		}
	}
	if err := pin(w.CPUs[0]); err != nil {
		return err
	}
	for _, a := range []netip.Addr{lab.Server4, lab.Server6} {
		if w.listeners[a], err = listener(w.server, a, echoPort); err != nil {
			return err
		}
	}
	if w.outside.udp, err = socketIn(w.server, unix.AF_INET, unix.SOCK_DGRAM); err != nil {
		return err
	}
	if w.outside.tcp, err = socketIn(w.server, unix.AF_INET, unix.SOCK_STREAM); err != nil {
		return err
	}
	for _, place := range []struct {
		origin
		cgroup string
	}{{service, w.Cgroups.Service}, {confined, w.Cgroups.Container}} {
		if err := os.WriteFile(filepath.Join(place.cgroup, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
		for _, op := range Operations() {
			if op.from != place.origin || !slices.Contains(w.Operations, op.Name) {
				continue
			}
			for len(w.ready[op.Name]) < op.CPUs {
				fn, err := op.prepare(w)
				if err != nil {
					return fmt.Errorf("prepare %s: %w", op.Name, err)
				}
				w.ready[op.Name] = append(w.ready[op.Name], fn)
			}
		}
	}
	return w.container.Enter()
}

// measure does an operation n times on each of some CPUs.
func (w *worker) measure(r request) (float64, error) {
	var begin atomic.Int32
	var all sync.WaitGroup
	took, errs := make([]float64, r.CPUs), make([]error, r.CPUs)
	one := func(i int) {
		fn := w.ready[r.Operation][i]
		// What other labs left in the caches does not count.
		if errs[i] = fn(r.N/8 + 1); errs[i] != nil {
			begin.Add(int32(r.CPUs))
			return
		}
		begin.Add(1)
		for begin.Load() < int32(r.CPUs) {
		}
		start := nanoseconds()
		errs[i] = fn(r.N)
		took[i] = float64(nanoseconds()-start) / float64(r.N)
	}
	for i := 1; i < r.CPUs; i++ {
		all.Go(func() {
			// The thread ends with the goroutine.
			runtime.LockOSThread()
			if errs[i] = pin(w.CPUs[i]); errs[i] == nil {
				errs[i] = w.container.Enter()
			}
			if errs[i] == nil {
				one(i)
			}
		})
	}
	one(0)
	all.Wait()
	sum := 0.0
	for _, ns := range took {
		sum += ns
	}
	return sum / float64(r.CPUs), errors.Join(errs...)
}

// pin keeps this thread on a CPU.
func pin(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	return unix.SchedSetaffinity(0, &set)
}
