package web

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// Arguments that make the test another process.
const (
	argProbe   = "probe"   // a confined process that tries what it must not do
	argService = "service" // a service that serves until it is killed
)

// served returns the process that serves for this one, or for another.
func served(t *testing.T, parent int) (pid int) {
	t.Helper()
	testenv.Eventually(t, "a process that serves", func() bool {
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
		check(t, err)
		for _, list := range lists {
			children, _ := os.ReadFile(list)
			for field := range strings.FieldsSeq(string(children)) {
				cmdline, _ := os.ReadFile("/proc/" + field + "/cmdline")
				if bytes.HasPrefix(cmdline, []byte("egressbpf\x00"+ServeArg)) {
					pid, err = strconv.Atoi(field)
					check(t, err)
					return true
				}
			}
		}
		return false
	})
	return pid
}

// TestUnprivileged looks at what the process that serves could do.
func TestUnprivileged(t *testing.T) {
	dir := t.TempDir()
	certificate(t, dir)
	check(t, os.WriteFile(dir+"/web", []byte("tls_server_config: {cert_file: cert.pem, key_file: key.pem}\n"), 0o600))
	s, _, _ := start(t, "0", dir+"/web", source(Page{}, nil))
	// It serves.
	conn, err := net.Dial("tcp", s.Addr().String())
	check(t, err)
	defer conn.Close()
	fmt.Fprint(conn, "x\r\n\r\n")
	_, err = io.ReadAll(conn)
	check(t, err)

	pid := served(t, os.Getpid())
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	check(t, err)
	for _, want := range []string{
		"CapInh:\t0000000000000000", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000",
		"NoNewPrivs:\t1", "Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534", "Groups:\t ", "Seccomp:\t2",
	} {
		if !strings.Contains(string(text), "\n"+want+"\n") {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	check(t, err)
	for _, thread := range threads {
		if text, err := os.ReadFile(thread); err == nil && (!bytes.Contains(text, []byte("CapBnd:\t0000000000000000\n")) || !bytes.Contains(text, []byte("Seccomp:\t2\n"))) {
			t.Errorf("a thread:\n%s", text)
		}
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	check(t, err)
	var got []string
	for _, file := range files {
		is, err := os.Readlink(file)
		check(t, err)
		name, _, _ := strings.Cut(is, ":")
		got = append(got, strings.TrimSpace(strings.TrimSuffix(name, "(deleted)")))
	}
	for _, is := range got {
		switch is {
		case "/dev/null", "pipe", "socket", "/memfd", "anon_inode":
		default:
			t.Errorf("it has %s open: %q", is, got)
		}
	}
	if len(got) > 10 {
		t.Errorf("open files: %q", got)
	}
	if environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || strings.Count(string(environ), "=") != 4 {
		t.Errorf("environment %q, %v", environ, err)
	}
	score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
	if err != nil || string(score) != "1000\n" {
		t.Errorf("oom_score_adj %q, %v", score, err)
	}
	// This process keeps what it has.
	text, err = os.ReadFile("/proc/thread-self/status")
	check(t, err)
	if bytes.Contains(text, []byte("CapBnd:\t0000000000000000\n")) {
		t.Errorf("the service has given up its own capabilities:\n%s", text)
	}
}

// probe tries what a process that serves must not do, and prints what it could.
func probe() {
	// Another process of the same user; and two listening sockets, one of which has clients.
	other := exec.Command("sleep", "60")
	var sockets [2]int
	var address unix.Sockaddr
	var err error
	for i := range sockets {
		sockets[i], err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		err = errors.Join(err, unix.Bind(sockets[i], &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(sockets[i], 1))
		if err != nil {
			fmt.Println("listen:", err)
			return
		}
		address, _ = unix.Getsockname(sockets[i])
	}
	if err := other.Start(); err != nil {
		fmt.Println("start:", err)
		return
	}
	pid := other.Process.Pid
	if err := confine(); err != nil {
		fmt.Println("confine:", err)
		return
	}
	can := func(what string, err error) {
		if err == nil {
			fmt.Println("it can", what)
		}
	}
	call := func(what string, args ...uintptr) {
		args = append(args, 0, 0, 0, 0)
		if r, _, errno := unix.RawSyscall6(args[0], args[1], args[2], args[3], args[4], 0, 0); errno == 0 {
			if what == "fork" && r == 0 {
				os.Exit(0)
			}
			fmt.Println("it can", what)
		} else if errno != unix.EPERM {
			fmt.Println(what+":", errno)
		}
	}
	_, err = os.ReadFile("/etc/passwd")
	can("read files", err)
	_, err = os.ReadDir("/")
	can("list files", err)
	can("write files", os.WriteFile("/dev/shm/egressbpf", nil, 0o600))
	can("signal others", unix.Kill(pid, unix.SIGKILL))
	can("signal others' threads", unix.Tgkill(pid, pid, unix.SIGKILL))
	can("signal all", unix.Kill(-1, 0))
	_, err = unix.FcntlInt(uintptr(sockets[0]), unix.F_SETOWN, pid)
	can("have the kernel signal others", err)
	can("limit others", unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{}, nil))
	can("slow down others", unix.Setpriority(unix.PRIO_PROCESS, pid, 19))
	can("choose the CPUs of others", unix.SchedSetaffinity(pid, &unix.CPUSet{1}))
	// A listening socket can become one that connects.
	if err := unix.Shutdown(sockets[0], unix.SHUT_RDWR); err != nil {
		fmt.Println("shutdown:", err)
	}
	can("connect", unix.Sendto(sockets[0], []byte("x"), unix.MSG_FASTOPEN, address))
	can("connect by a message", unix.Sendmsg(sockets[0], []byte("x"), nil, address, unix.MSG_FASTOPEN))
	can("have more files open", unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: 1024}))
	can("be root", syscall.Setuid(0))
	call("socket", unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM)
	call("execve", unix.SYS_EXECVE)
	call("fork", unix.SYS_CLONE, uintptr(unix.SIGCHLD))
	call("ptrace", unix.SYS_PTRACE, unix.PTRACE_TRACEME)
	call("ioctl", unix.SYS_IOCTL, uintptr(sockets[0]), unix.SIOCSPGRP)
	call("bpf", unix.SYS_BPF)
	// Threads work.
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() { runtime.LockOSThread(); time.Sleep(time.Millisecond) })
	}
	all.Wait()
	fmt.Println("done")
}

func TestConfined(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", argProbe)
	// In a group of its own, since the probe cannot end what it has started.
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, Setpgid: true}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := renounce()
		if err == nil {
			err = cmd.Run()
		}
		started <- err
	}()
	err := <-started
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	if err != nil || out.String() != "done\n" {
		t.Errorf("%v: %s", err, &out)
	}
}

// TestEnd kills the process that serves, and the service.
func TestEnd(t *testing.T) {
	s, log, _ := start(t, "0", "", source(Page{}, nil))
	url := "http://" + s.Addr().String() + "/metrics"
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	first := served(t, os.Getpid())
	check(t, syscall.Kill(first, syscall.SIGKILL))
	testenv.Eventually(t, "another process", func() bool { return served(t, os.Getpid()) != first })
	if code, body := get(t, client, url); code != 200 || !strings.Contains(body, "test_answer 42") {
		t.Errorf("afterwards: %d, %s", code, body)
	}
	if !strings.Contains(log.String(), "signal: killed") {
		t.Errorf("log: %s", log)
	}

	cmd := exec.Command("/proc/self/exe", argService)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	var address [64]byte
	_, err = out.Read(address[:])
	check(t, err)
	pid := served(t, cmd.Process.Pid)
	check(t, cmd.Process.Kill())
	_ = cmd.Wait()
	testenv.Eventually(t, "the end of the process that serves", func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/%d/fd/0", pid))
		return err != nil
	})
}

// TestNewConfig changes the web config file.
func TestNewConfig(t *testing.T) {
	config := filepath.Join(t.TempDir(), "web")
	write := func(text string) {
		check(t, os.WriteFile(config+".new", []byte(text), 0o600))
		check(t, os.Rename(config+".new", config))
	}
	write("http_server_config: {headers: {X-Frame-Options: deny}}\n")
	s, log, _ := start(t, "0", config, source(Page{}, nil))
	url := "http://" + s.Addr().String() + "/metrics"
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	has := func(want string) func() bool {
		return func() bool {
			resp, err := client.Get(url)
			if err != nil {
				return false
			}
			resp.Body.Close()
			return resp.Header.Get("X-Frame-Options") == want
		}
	}
	testenv.Eventually(t, "a header", has("deny"))
	write("nonsense: yes\n")
	testenv.Eventually(t, "a complaint", func() bool { return strings.Contains(log.String(), "stays as it was") })
	if !has("deny")() {
		t.Error("a wrong file was used")
	}
	write("http_server_config: {headers: {X-Frame-Options: sameorigin}}\n")
	testenv.Eventually(t, "another header", has("sameorigin"))
	if strings.Contains(log.String(), "has ended") {
		t.Errorf("log: %s", log)
	}
}

// hostile is a process that serves and that has been taken over.
func hostile(t *testing.T, from Source) (asks *net.UnixConn, done chan error) {
	t.Helper()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	var conns [2]*net.UnixConn
	for i, end := range ends {
		file := os.NewFile(uintptr(end), "web")
		conn, err := net.FileConn(file)
		check(t, err)
		file.Close()
		conns[i] = conn.(*net.UnixConn)
		t.Cleanup(func() { conn.Close() })
	}
	done = make(chan error, 1)
	go func() { done <- newAnswers(from).serve(t.Context(), conns[0]) }()
	return conns[1], done
}

// A process that asks for more than it may have is told so, and what is no question ends it.
func TestHostile(t *testing.T) {
	var mu sync.Mutex
	asked := 0
	from := source(Page{}, &Recent{})
	from.Metrics = func(w io.Writer) error {
		mu.Lock()
		asked++
		mu.Unlock()
		for { // more than a pipe holds
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				return err
			}
		}
	}
	asks, _ := hostile(t, from)
	service := newService(asks)
	var got []*os.File
	refused := 0
	for range 1000 {
		file, err := service.ask(askMetrics)
		if err == nil {
			got = append(got, file) // and is not read
		} else if err == errBusy {
			refused++
		} else {
			t.Fatal(err)
		}
	}
	if len(got) != atOnce[askMetrics] || refused != 1000-len(got) {
		t.Errorf("%d answers, %d refused", len(got), refused)
	}
	// Others still get answers.
	file, err := service.ask(askPage)
	check(t, err)
	var page Page
	check(t, json.NewDecoder(file).Decode(&page))
	for _, file := range got {
		file.Close()
	}
	testenv.Eventually(t, "an answer", func() bool { _, err := service.ask(askMetrics); return err == nil })
	// Faster than it may.
	before := time.Now()
	answered := 0
	for range 1000 {
		file, err := service.ask(askPage)
		if err == nil {
			_, err := io.Copy(io.Discard, file)
			check(t, err)
			file.Close()
			answered++
		}
	}
	if most := burst + int(time.Since(before).Seconds()*perSecond) + 1; answered > most {
		t.Errorf("%d answers, want at most %d", answered, most)
	}

	for _, question := range []string{"x", "mm", "\x00", "m" + strings.Repeat("m", 100000)} {
		asks, done := hostile(t, from)
		_, err := asks.Write([]byte(question))
		check(t, err)
		if err := <-done; err != errQuestion {
			t.Errorf("%.5q: %v", question, err)
		}
	}
}

// TestFlood asks from outside for all that there is, much too often.
func TestFlood(t *testing.T) {
	s, log, _ := start(t, "0", "", source(Page{Node: "here"}, &Recent{}))
	url := "http://" + s.Addr().String()
	first := served(t, os.Getpid())
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			client := &http.Client{Timeout: 5 * time.Second}
			defer client.CloseIdleConnections()
			for range 50 {
				resp, err := client.Get(url + []string{"/", "/metrics", "/page.json"}[i%3])
				if err != nil {
					continue
				}
				if resp.StatusCode != 200 && resp.StatusCode != 503 {
					t.Errorf("got %s", resp.Status)
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		})
	}
	all.Wait()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	testenv.Eventually(t, "an answer", func() bool { code, _ := get(t, client, url+"/metrics"); return code == 200 })
	if served(t, os.Getpid()) != first || strings.Contains(log.String(), "ended") {
		t.Errorf("the process has ended: %s", log)
	}
}
