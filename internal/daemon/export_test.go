package daemon

import "time"

// SetPace makes daemons look more often. It returns how to undo that.
func SetPace(every time.Duration) (restore func()) {
	check, look := checkEvery, lookEvery
	checkEvery, lookEvery = every, every
	return func() { checkEvery, lookEvery = check, look }
}
