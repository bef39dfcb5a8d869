package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

const (
	// How long each run of TestSequences lasts, as a Go duration.
	sequencesVar = "EGRESSBPF_SEQUENCES"
	// The seed of a run that failed. The result also depends on timing.
	seedVar = "EGRESSBPF_SEED"
)

// phrases are attacks that work, or once did. A sequence consists of phrases with steps
// left out, inserted, or done with another socket.
var phrases = [][]lab.Op{
	{lab.OpDisconnect, lab.OpConnect, lab.OpWait, lab.OpLearn, lab.OpSend},
	{lab.OpLinger, lab.OpClose, lab.OpOpen, lab.OpConnect, lab.OpWait, lab.OpLearn, lab.OpSend},
	{lab.OpClose, lab.OpOpen},
	{lab.OpDisconnect, lab.OpFastOpen, lab.OpWait, lab.OpSend, lab.OpShutdown},
	{lab.OpDisconnect, lab.OpAim, lab.OpRoute, lab.OpConnect, lab.OpUnroute, lab.OpWait, lab.OpSend},
	{lab.OpDisconnect, lab.OpAim, lab.OpLo, lab.OpConnect, lab.OpUnlo, lab.OpWait, lab.OpSend},
	{lab.OpDisconnect, lab.OpAim, lab.OpConnect, lab.OpSYNACK, lab.OpSend},
	{lab.OpDisconnect, lab.OpAim, lab.OpRoute, lab.OpConnect, lab.OpUnroute, lab.OpSYNACK, lab.OpSend},
	{lab.OpDisconnect, lab.OpAim, lab.OpLo, lab.OpConnect, lab.OpUnlo, lab.OpSYNACK, lab.OpSend},
	{lab.OpDisconnect, lab.OpAim, lab.OpRoute, lab.OpConnect, lab.OpSYN, lab.OpACK, lab.OpUnroute, lab.OpSend},
	{lab.OpDisconnect, lab.OpAim, lab.OpConnect, lab.OpRST, lab.OpConnect, lab.OpSYNACK, lab.OpSend},
	{lab.OpDisconnect, lab.OpRepair, lab.OpSend, lab.OpWait},
	{lab.OpDeaf, lab.OpDisconnect, lab.OpAim, lab.OpConnect, lab.OpRaw, lab.OpWait, lab.OpHear, lab.OpWait},
	{lab.OpLinger, lab.OpClose, lab.OpOpen, lab.OpConnect, lab.OpWait, lab.OpLearn, lab.OpDeaf, lab.OpSend,
		lab.OpLo, lab.OpACK, lab.OpUnlo, lab.OpRepeat},
	{lab.OpRaw, lab.OpRaw},
	{lab.OpUDP, lab.OpRaw},
}

// dialogue makes sequences for one container.
type dialogue struct {
	*rand.Rand
	own, mail netip.Addr
	slots     int
}

func (d *dialogue) sequence(n int) (steps []lab.Step) {
	for range n {
		slot := d.IntN(d.slots)
		for _, op := range phrases[d.IntN(len(phrases))] {
			if d.IntN(12) > 0 {
				steps = append(steps, d.step(op, slot))
			}
			switch d.IntN(12) {
			case 0:
				other := phrases[d.IntN(len(phrases))]
				steps = append(steps, d.step(other[d.IntN(len(other))], slot))
			case 1:
				slot = d.IntN(d.slots)
			}
		}
	}
	return steps
}

// Sockets are bound to few ports, so that ports are used again.
func (d *dialogue) step(op lab.Op, slot int) lab.Step {
	own := at(d.own, 2001+uint16(slot%3))
	s := lab.Step{Op: op, Slot: slot, Own: own, To: at(d.mail, 25), MPTCP: d.IntN(8) == 0}
	switch op {
	case lab.OpUDP:
		s.Data = make([]byte, []int{8, 4000}[d.IntN(2)])
	case lab.OpRaw:
		flags := []uint8{0x02, 0x02, 0x10, 0x18, 0x04, 0x14, 0x12, 0x11, 0x00, 0x06, 0xc2}[d.IntN(11)]
		h := lab.Header{Src: d.own, Dst: d.mail, Proto: unix.IPPROTO_TCP, ID: uint16(d.IntN(4))}
		payload := append(lab.TCP(own.Port(), 25, d.Uint32N(8), flags), make([]byte, 28)...)
		switch d.IntN(8) {
		case 0:
			h.More, payload = true, payload[:24]
		case 1:
			h.Offset, payload = 24, payload[24:]
		case 2:
			h.Proto, payload = unix.IPPROTO_UDP, lab.UDP(own.Port(), 25, 8)
		}
		s.Data = h.Finished(payload)
	}
	return s
}

// Whatever the sockets of a container do, each connection that the server accepts was paid for.
func TestSequences(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv(sequencesVar))
	if err != nil {
		length = 4 * time.Second
	}
	seed, err := strconv.ParseUint(os.Getenv(seedVar), 10, 64)
	if err != nil {
		seed = 1
	}
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		for rate, perSecond := range map[string]float64{scarce: 0, "2/second": 2} {
			t.Run(fmt.Sprintf("%s at %s", mail, rate), func(t *testing.T) {
				t.Logf("%s=%d", seedVar, seed)
				s := newScene(t)
				lab.HurrySYNs(t, s.policed)
				s.cookies(true)
				s.openFast()
				seen := s.Capture(t)
				random := rand.New(rand.NewPCG(seed, 0))
				const slots = 6
				// Some connections are regular, for the other steps to start from.
				learn := func(c *container) {
					d := dialogue{random, c.addr(mail), mail, slots}
					var steps []lab.Step
					for slot := range slots {
						open := d.step(lab.OpOpen, slot)
						open.MPTCP = false
						steps = append(steps, open)
					}
					const ports = 3
					for slot := range ports {
						for _, op := range append(append([]lab.Op{lab.OpConnect}, connected...), lab.OpLearn, lab.OpDisconnect) {
							steps = append(steps, d.step(op, slot))
						}
					}
					if n := c.Sequence(steps); n != ports {
						t.Fatalf("%d connections, want %d", n, ports)
					}
				}
				run := func(c *container) []lab.Step {
					d := dialogue{random, c.addr(mail), mail, slots}
					steps := d.sequence(20)
					c.Sequence(steps)
					return steps
				}
				free := s.container("free")
				learn(free)
				for range 2 {
					run(free)
				}
				if n := s.accepted(free, mail); n <= burst {
					t.Errorf("without the filter %d connections were accepted, want more than %d", n, burst)
				}
				free.End()
				seen.Settle(t)
				seen.Forget()

				begin := time.Now()
				// The filter alone is enough too.
				hostSide := map[bool]string{true: "on", false: "off"}[rate == scarce]
				s.attach("--smtp-rate", rate, "--smtp-burst", fmt.Sprint(burst), "--host-side", hostSide)
				learn(s.a)
				learn(s.b)
				rounds := 0
				for ; time.Since(begin) < length && !t.Failed(); rounds++ {
					for _, c := range []*container{s.a, s.b} {
						steps := run(c)
						accepted := s.accepted(c, mail)
						if most := burst + perSecond*time.Since(begin).Seconds(); float64(accepted) > most {
							t.Errorf("%d connections were accepted, want at most %.1f; at last:", accepted, most)
							for _, step := range steps {
								t.Logf("  %d: %s", step.Slot, step.Op)
							}
						}
					}
					s.a.GiveSlot(random.IntN(slots), s.b.Agent, random.IntN(slots))
				}
				packets := seen.Settle(t)
				for _, c := range []*container{s.a, s.b} {
					accepted, allowed := s.accepted(c, mail), s.row(c).SMTP.Allowed
					if uint64(accepted) > allowed {
						t.Errorf("%d connections were accepted, but %d are counted", accepted, allowed)
					}
					if n := connections(packets, 25, c.addr(mail)); uint64(n) > allowed {
						t.Errorf("SYNs of %d connections arrived, but %d are counted", n, allowed)
					}
					if n := pairs(packets, c.addr(mail)); uint64(n) > allowed {
						t.Errorf("segments of %d pairs of ports arrived, but %d are counted", n, allowed)
					}
					t.Logf("%s: %d connections in %d rounds", filepath.Base(c.cgroup), accepted, rounds)
				}
			})
		}
	}
}

// pairs returns the number of ports of an address from which TCP segments to port 25 came.
func pairs(packets []lab.Packet, from netip.Addr) int {
	seen := map[uint16]bool{}
	for _, p := range packets {
		if p.Proto == unix.IPPROTO_TCP && p.Src.Addr() == from && p.Dst.Port() == 25 {
			seen[p.Src.Port()] = true
		}
	}
	return len(seen)
}
