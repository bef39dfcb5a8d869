package journal_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/journal"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// listen returns a socket where the journal's would be, for this thread alone.
func listen(t *testing.T) *net.UnixConn {
	runtime.LockOSThread() // and never unlocked, so that the thread ends with the test
	check(t, unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS))
	check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	check(t, unix.Mount("tmpfs", "/run", "tmpfs", 0, ""))
	check(t, os.MkdirAll("/run/systemd/journal", 0o755))
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: "/run/systemd/journal/socket", Net: "unixgram"})
	check(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// receive returns the fields of the next entry. Their form is the journal's native protocol.
func receive(t *testing.T, conn *net.UnixConn) map[string]string {
	t.Helper()
	check(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	buffer := make([]byte, 1<<20)
	n, err := conn.Read(buffer)
	check(t, err)
	fields := map[string]string{}
	for rest := buffer[:n]; len(rest) > 0; {
		line, after, ok := bytes.Cut(rest, []byte("\n"))
		if !ok {
			t.Fatalf("%q is not a line", rest)
		}
		name, value, plain := bytes.Cut(line, []byte("="))
		if !plain {
			size := binary.LittleEndian.Uint64(after)
			value, after = after[8:8+size], after[8+size+1:]
		}
		if _, twice := fields[string(name)]; twice {
			t.Errorf("%s is there twice", name)
		}
		fields[string(name)], rest = string(value), after
	}
	return fields
}

func TestHandler(t *testing.T) {
	conn := listen(t)
	var text bytes.Buffer
	log := slog.New(journal.New(slog.NewTextHandler(&text, nil)))
	hostile := "web\nPRIORITY=0\nMESSAGE=\x1b[2J\xff\""

	log.Warn("refused", journal.MessageID, "0123456789abcdef0123456789abcdef", "container_name", hostile, "count", uint64(3))
	got := receive(t, conn)
	for name, want := range map[string]string{
		"MESSAGE":                  `refused container_name="web\nPRIORITY=0\nMESSAGE=\x1b[2J\xff\"" count=3`,
		"PRIORITY":                 "4",
		"MESSAGE_ID":               "0123456789abcdef0123456789abcdef",
		"SYSLOG_IDENTIFIER":        "egressbpf",
		"EGRESSBPF_CONTAINER_NAME": strings.Replace(hostile, "\xff", "\uFFFD", 1),
		"EGRESSBPF_COUNT":          "3",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
	if len(got) != 6 {
		t.Errorf("there are others: %q", got)
	}

	log.With("a", 1).WithGroup("g").With("b-c", 2).Error("failed", "err", errors.New("no\nway"), slog.Group("h", "d", 4))
	got = receive(t, conn)
	for name, want := range map[string]string{
		"MESSAGE": `failed a=1 g.b-c=2 g.err="no\nway" g.h.d=4`, "PRIORITY": "3",
		"EGRESSBPF_A": "1", "EGRESSBPF_G_B_C": "2", "EGRESSBPF_G_ERR": "no\nway", "EGRESSBPF_G_H_D": "4",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}

	log.Info("long", "name", strings.Repeat("\u00fc", 1<<20))
	if got := receive(t, conn); got["PRIORITY"] != "6" || len(got["EGRESSBPF_NAME"]) > 1026 {
		t.Errorf("a long field: %d bytes", len(got["EGRESSBPF_NAME"]))
	}
	log.Debug("not enabled")
	if log.Enabled(context.Background(), slog.LevelDebug) || text.Len() > 0 {
		t.Errorf("there is text: %s", text.String())
	}

	// While the journal restarts, nothing gets lost.
	check(t, conn.Close())
	check(t, os.RemoveAll("/run/systemd/journal/socket"))
	log.With("a", 1).Warn("refused", "count", 3)
	if !strings.Contains(text.String(), "level=WARN msg=refused a=1 count=3\n") {
		t.Errorf("without the journal: %q", text.String())
	}
}
