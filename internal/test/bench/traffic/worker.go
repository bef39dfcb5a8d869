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
	"time"

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

// request asks for an operation, or for a flood.
type request struct {
	Operation string
	N, CPUs   int
	Flood     time.Duration
}

// answer says how long one operation took, on average; or what a flood sent.
type answer struct {
	Nanoseconds float64
	Sent        int
	Took        time.Duration
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
		if r.Flood > 0 {
			a.Sent, a.Took, err = w.flood(r)
		} else {
			a.Nanoseconds, err = w.measure(r)
		}
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
	took := make([]float64, r.CPUs)
	err := w.onEach(r.CPUs, func(i int, together func()) error {
		fn := w.ready[r.Operation][i]
		// What other labs left in the caches does not count.
		if err := fn(r.N/8 + 1); err != nil {
			return err
		}
		together()
		start := nanoseconds()
		err := fn(r.N)
		took[i] = float64(nanoseconds()-start) / float64(r.N)
		return err
	})
	sum := 0.0
	for _, ns := range took {
		sum += ns
	}
	return sum / float64(r.CPUs), err
}

func (w *worker) flood(r request) (sent int, took time.Duration, err error) {
	senders := make([]*SYNs, r.CPUs)
	for i := range senders {
		if senders[i], err = NewSYNs(w.container, lab.Container4, lab.Server4, 25, uint16(i)); err != nil {
			return 0, 0, err
		}
		defer closeSocket(senders[i].fd)
	}
	first, last := make([]int64, r.CPUs), make([]int64, r.CPUs)
	err = w.onEach(r.CPUs, func(i int, together func()) error {
		together()
		first[i] = nanoseconds()
		for last[i] < first[i]+r.Flood.Nanoseconds() {
			if err := senders[i].Send(); err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOBUFS) {
				return err
			}
			last[i] = nanoseconds()
		}
		return nil
	})
	for _, s := range senders {
		sent += int(s.n)
	}
	return sent, time.Duration(slices.Max(last) - slices.Min(first)), err
}

// onEach does something on each of some CPUs. They begin what follows together() at the same
// time.
func (w *worker) onEach(cpus int, fn func(cpu int, together func()) error) error {
	var here atomic.Int32
	var all sync.WaitGroup
	errs := make([]error, cpus)
	one := func(i int) {
		errs[i] = fn(i, func() {
			here.Add(1)
			for here.Load() < int32(cpus) {
			}
		})
		if errs[i] != nil {
			here.Add(int32(cpus)) // nobody waits for this one
		}
	}
	for i := 1; i < cpus; i++ {
		all.Go(func() {
			// The thread ends with the goroutine.
			runtime.LockOSThread()
			if errs[i] = errors.Join(pin(w.CPUs[i]), w.container.Enter()); errs[i] != nil {
				here.Add(int32(cpus))
				return
			}
			one(i)
		})
	}
	one(0)
	all.Wait()
	return errors.Join(errs...)
}

// pin keeps this thread on a CPU.
func pin(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	return unix.SchedSetaffinity(0, &set)
}
