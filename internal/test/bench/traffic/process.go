package traffic

import (
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
)

// process is a worker, seen from outside.
type process struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	*gob.Encoder
	*gob.Decoder
}

// start starts a worker in a lab. The calling goroutine must be locked to a thread that lives
// as long as this program: the worker ends with it.
func start(l *lab.Lab, cpus []int, operations []string) (_ *process, err error) {
	p := &process{cmd: exec.Command("/proc/self/exe", WorkerArg)}
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
		return nil, errors.Join(fmt.Errorf("%s: %w", l.Filter, err), p.end())
	}
	return p, nil
}

// do has the worker do an operation n times on each of some CPUs. It returns how long one
// took, in nanoseconds.
func (p *process) do(op Operation, n int) (float64, error) {
	if err := p.Encode(request{Operation: op.Name, N: n, CPUs: op.CPUs}); err != nil {
		return 0, err
	}
	ns, err := p.answer()
	if err != nil {
		err = fmt.Errorf("%s: %w", op.Name, err)
	}
	return ns, err
}

func (p *process) answer() (float64, error) {
	var a answer
	if err := p.Decode(&a); err != nil {
		return 0, fmt.Errorf("worker: %w", err)
	}
	if a.Err != "" {
		return 0, errors.New(a.Err)
	}
	return a.Nanoseconds, nil
}

// end ends the worker and its sockets.
func (p *process) end() error {
	return errors.Join(p.in.Close(), p.cmd.Wait())
}
