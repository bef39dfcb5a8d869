package cgroup

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Started returns when the oldest process in the cgroup rel or below it was started; the zero
// time if there is none.
func (r Root) Started(rel string) (time.Time, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return time.Time{}, fmt.Errorf("read the clock: %w", err)
	}
	boot := time.Now().Add(-time.Duration(now.Nano()))
	var oldest time.Time
	err := r.Processes(rel, func(pid int) {
		stat, err := read(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return // it has ended
		}
		if after, ok := sinceBoot(stat); ok && (oldest.IsZero() || boot.Add(after).Before(oldest)) {
			oldest = boot.Add(after)
		}
	})
	return oldest, err
}

// sinceBoot reads the start of a process from its stat in /proc (proc_pid_stat(5), starttime).
// The process chooses its own name, which is in parentheses.
func sinceBoot(stat string) (time.Duration, bool) {
	const (
		tick      = time.Second / 100 // USER_HZ, on each architecture
		startTime = 22 - 3            // the third field is the first behind the name
	)
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) <= startTime {
		return 0, false
	}
	ticks, err := strconv.ParseInt(fields[startTime], 10, 64)
	return time.Duration(ticks) * tick, err == nil
}
