package traffic

import (
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
)

// Process is a worker, seen from outside.
type Process struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	*gob.Encoder
	*gob.Decoder
}

// Start starts a worker in a lab. The calling goroutine must be locked to a thread that lives
// as long as this program: the worker ends with it.
func Start(l *lab.Lab, cpus []int, operations []string) (_ *Process, err error) {
	p := &Process{cmd: exec.Command("/proc/self/exe", WorkerArg)}
	p.cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1")
	p.cmd.Stderr = os.Stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	p.Encoder, p.Decoder = gob.NewEncoder(p.in), gob.NewDecoder(out)
	err = p.Encode(setup{
		Container: l.Container.Path(), Host: l.Host.Path(), Server: l.Server.Path(),
		Cgroups: *l.Cgroups, CPUs: cpus, Operations: operations,
	})
	if err == nil {
		_, err = p.answer()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", l.Filter, err), p.End())
	}
	return p, nil
}

// do has the worker do an operation n times on each of some CPUs. It returns how long one
// took, in nanoseconds.
func (p *Process) do(op Operation, n int) (float64, error) {
	if err := p.Encode(request{Operation: op.Name, N: n, CPUs: op.CPUs}); err != nil {
		return 0, err
	}
	a, err := p.answer()
	if err != nil {
		err = fmt.Errorf("%s: %w", op.Name, err)
	}
	return a.Nanoseconds, err
}

// Flood has the worker send SYNs to port 25 of the server for a time, on each of some CPUs as
// fast as it can. It returns how many it sent, and how much time passed between the first and
// the last.
func (p *Process) Flood(over time.Duration, cpus int) (sent int, took time.Duration, err error) {
	if err := p.Encode(request{Flood: over, CPUs: cpus}); err != nil {
		return 0, 0, err
	}
	a, err := p.answer()
	return a.Sent, a.Took, err
}

func (p *Process) answer() (a answer, err error) {
	if err := p.Decode(&a); err != nil {
		return a, fmt.Errorf("worker: %w", err)
	}
	if a.Err != "" {
		return a, errors.New(a.Err)
	}
	return a, nil
}

// End ends the worker and its sockets.
func (p *Process) End() error {
	return errors.Join(p.in.Close(), p.cmd.Wait())
}
