package daemon

import (
	"time"

	"golang.org/x/sys/unix"
)

// watched is a file that is watched for changes.
type watched struct {
	path string
	// read is the file's stamp when it was last read, seen its stamp at the last look.
	read, seen stamp
}

// stamp changes whenever the file does.
type stamp struct {
	inode uint64
	size  int64
	mtime unix.Timespec
}

func newWatched(path string) *watched {
	w := &watched{path: path}
	w.read = w.stamp()
	w.seen = w.read
	return w
}

func (w *watched) stamp() stamp {
	var st unix.Stat_t
	if w.path == "" || unix.Stat(w.path, &st) != nil {
		return stamp{}
	}
	return stamp{st.Ino, st.Size, st.Mtim}
}

// changed says whether the file has changed since changed last returned true. It waits
// until the file stays the same for one look, since an editor may still be writing it.
func (w *watched) changed() bool {
	now := w.stamp()
	settled := now == w.seen
	w.seen = now
	if !settled || now == w.read {
		return false
	}
	w.read = now
	return true
}

// monotonic returns the time of CLOCK_MONOTONIC.
func monotonic() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
