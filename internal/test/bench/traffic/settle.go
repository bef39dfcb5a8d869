package traffic

import (
	"fmt"
	"os"
	"time"
)

// settle waits until the machine is idle, since the kernel removes the namespaces of the last
// round in the background; but not for long.
func settle() {
	for range 20 {
		if busy := Busy(100 * time.Millisecond); busy < 0.1 {
			return
		}
	}
}

// Busy returns how many CPUs are busy, on average over a time.
func Busy(over time.Duration) float64 {
	before := busyTime()
	time.Sleep(over)
	const ticks = 100 // a second
	return float64(busyTime()-before) / ticks / over.Seconds()
}

// busyTime is the time that all CPUs were not idle, in ticks.
func busyTime() (ticks uint64) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	var user, nice, system, idle, iowait, irq, softirq, steal uint64
	fmt.Sscanf(string(text), "cpu %d %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal)
	return user + nice + system + irq + softirq + steal
}
