package web

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// process is a process that serves.
type process struct {
	cmd   *exec.Cmd
	asked *net.UnixConn
	// ended is closed when the process has ended, for the reason why.
	ended chan struct{}
	why   error
}

// errCannotRun means that the executable is not for all users.
var errCannotRun = errors.New("the process that serves has no privileges, so every user has to be allowed to execute egressbpf: chmod a+rx")

// errDone is why a process has ended that nobody told to end.
var errDone = errors.New("exit status 0")

// start starts a process.
func (s *Server) start() (*process, error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	own, its := os.NewFile(uintptr(ends[0]), "web"), os.NewFile(uintptr(ends[1]), "web")
	defer own.Close()
	defer its.Close()
	conn, err := net.FileConn(own)
	if err != nil {
		return nil, err
	}
	listener, err := s.listener.File()
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer listener.Close()
	args, files := []string{ServeArg}, []*os.File{listener, its}
	if s.config != "" {
		file, err := s.settings.open()
		if err != nil {
			conn.Close()
			return nil, err
		}
		defer file.Close()
		args, files = append(args, argConfig), append(files, file)
	}
	if s.at.Addr().Unmap().IsLoopback() && !s.settings.known {
		args = append(args, argLocal)
	}
	// Not by its path, which an update may have replaced, or which a user cannot reach.
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "egressbpf"
	// Go would keep the files of its cgroup open to see how many CPUs it may use.
	cmd.Dir, cmd.Env = "/", []string{"GOMAXPROCS=2", "GODEBUG=containermaxprocs=0,updatemaxprocs=0"}
	cmd.ExtraFiles = files
	says, err := cmd.StderrPipe()
	if err != nil {
		conn.Close()
		return nil, err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: nobody, Gid: nobody},
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true, // a terminal interrupts the service, which ends the process
	}
	p := &process{cmd: cmd, asked: conn.(*net.UnixConn), ended: make(chan struct{})}
	started := make(chan error)
	go func() {
		// What this thread gives up, the process does not get. The kernel also kills the
		// process when the thread ends, so that waits; and no other goroutine gets the
		// thread afterwards.
		runtime.LockOSThread()
		err := renounce()
		if err == nil {
			err = cmd.Start()
		}
		started <- err
		if err == nil {
			relay(says, s.log)
			p.why = cmp.Or(cmd.Wait(), errDone)
			close(p.ended)
		}
	}()
	if err := <-started; err != nil {
		conn.Close()
		if errors.Is(err, unix.EACCES) {
			err = errCannotRun
		}
		return nil, fmt.Errorf("start the process that serves: %w", err)
	}
	p.expendable(s.log)
	return p, nil
}

// expendable has the kernel end the process rather than others when memory is short.
func (p *process) expendable(log *slog.Logger) {
	err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.cmd.Process.Pid), []byte("1000"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("the process that serves is not the first to end when memory is short", "err", err)
	}
}

// Lines that the process can write to the log.
const (
	maxLine      = 1024
	linesAtOnce  = 30
	linesEachMin = 10
)

// relay logs what the process says until it ends: some lines, as it may have been taken over.
func relay(says io.Reader, log *slog.Logger) {
	limit := rate.NewLimiter(rate.Every(time.Minute/linesEachMin), linesAtOnce)
	lines := bufio.NewReaderSize(says, maxLine)
	for {
		line, err := lines.ReadSlice('\n')
		if len(line) > 0 && limit.Allow() {
			log.Warn("the process that serves says", "line", strings.ToValidUTF8(strings.TrimRight(string(line), "\n"), "\uFFFD"))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

// end has the process end, and waits for that.
func (p *process) end() {
	p.asked.Close()
	select {
	case <-p.ended:
	case <-time.After(endPatience):
		p.kill()
	}
}

// kill ends the process.
func (p *process) kill() {
	p.asked.Close()
	_ = p.cmd.Process.Kill()
	<-p.ended
}
