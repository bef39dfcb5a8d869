package tell

// Remembered is how much a Teller remembers that does not run.
func (t *Teller) Remembered() int {
	return len(t.who) + len(t.known) + len(t.seen) + len(t.left.containers)
}

// What is written for targets.
var (
	Inert = inert
)

// MaxText is how long a message can be.
const MaxText = 2000
