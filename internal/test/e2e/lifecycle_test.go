package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func TestSocketsMadeBeforeAttachArePoliced(t *testing.T) {
	s := newScene(t)
	seen := s.Capture(t)
	type sender struct {
		name string
		*lab.Socket
		to      netip.AddrPort
		payload []byte
	}
	var senders []sender
	for _, to := range []netip.Addr{lab.Metadata4, lab.Metadata6, lab.Mapped(lab.Metadata4)} {
		family := lab.Family(to)
		tcp := s.a.Socket(family, unix.SOCK_STREAM, 0)
		connected := s.a.Socket(family, unix.SOCK_DGRAM, 0)
		for _, sock := range []*lab.Socket{tcp, connected} {
			if r := sock.Connect(at(to, 80)); r.Errno != ok {
				t.Fatal(r.Errno)
			}
		}
		hello, in := []byte("hello"), " to "+to.String()
		senders = append(senders,
			sender{"TCP" + in, tcp, netip.AddrPort{}, hello},
			sender{"connected UDP" + in, connected, netip.AddrPort{}, hello},
			sender{"UDP" + in, s.a.Socket(family, unix.SOCK_DGRAM, 0), at(to, 80), hello})
		if to.Is4In6() {
			continue
		}
		header := lab.Header{Src: s.a.addr(to), Dst: to, Proto: unix.IPPROTO_UDP}
		senders = append(senders, sender{"raw" + in, s.a.Socket(family, unix.SOCK_RAW, unix.IPPROTO_RAW),
			at(to, 0), header.Packet(lab.UDP(1024, 80, 8))})
	}
	mail := s.a.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	for _, sender := range senders {
		seen.Settle(t)
		seen.Forget()
		sender.Send(sender.payload, sender.to)
		if len(seen.Settle(t)) == 0 {
			t.Errorf("%s before attach: nothing arrived", sender.name)
		}
	}

	s.attach("--smtp-burst", "1", "--smtp-rate", scarce)
	seen.Settle(t)
	seen.Forget()
	for _, sender := range senders {
		sender.Send(sender.payload, sender.to)
		sender.Close()
	}
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	if n := s.row(s.a).Blocked.Packets; n < uint64(len(senders)/2) {
		t.Errorf("%d packets counted of %d senders", n, len(senders))
	}
	if r := mail.Connect(at(lab.Mail4, 25)); r.Errno != ok {
		t.Error(r.Errno)
	}
	s.expectMail(s.a, 1, 0)
}

// policies all block the metadata service, and limit mail in the same way.
var policies = [][]string{
	{},
	{"--preset", "none", "--block", "169.254.169.254,fd00:ec2::254"},
	{"--preset", "aws", "--smtp-exempt", lab.Relay4.String(), "--allow", "169.254.169.253"},
	{"--preset", "none", "--block", "169.254.0.0/16,fd00::/8", "--over-limit", "reject"},
}

func TestExchangeOfPoliciesUnderTraffic(t *testing.T) {
	s := newScene(t)
	const rate, burst = 20, 10
	flags := func(i int) []string {
		return append([]string{"--smtp-rate", fmt.Sprint(rate, "/second"), "--smtp-burst", fmt.Sprint(burst)},
			policies[i%len(policies)]...)
	}
	attach := func(i int) []string { return append([]string{"attach", "--cgroup", s.policed}, flags(i)...) }
	s.attach(flags(0)...)
	seen := s.Capture(t)
	begin := time.Now()
	s.a.Flood(lab.Flood{
		Blocked: []netip.Addr{lab.Metadata4, lab.Metadata6},
		Mail:    at(lab.Mail4, 25),
		Source:  s.a.IPv4,
	})
	for i := range 50 {
		s.Egressbpf(t, attach(i)...)
	}
	// Some are killed at an arbitrary moment.
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 30 {
		cmd := exec.Command(lab.Binary(t), attach(i)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Duration(random.Int64N(int64(60*time.Millisecond))), func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		// Perhaps not all hooks have the new policy yet.
		if status, _ := s.Status(t); slices.ContainsFunc(status.Hooks, func(h loader.Hook) bool { return !h.Attached }) {
			t.Fatalf("after a killed attach, not attached: %+v", status.Hooks)
		}
	}
	flooded := s.a.StopFlood()
	elapsed := time.Since(begin).Seconds()

	s.expectFlood(flooded, seen, rate, burst, elapsed)
}

// expectFlood checks a flood by container a that lasted for so long: what arrived, and that
// everything is counted.
func (s *scene) expectFlood(flooded lab.Flooded, seen *lab.Capture, rate, burst, seconds float64) {
	s.t.Helper()
	packets := seen.Settle(s.t)
	if n := lab.Count(packets, func(p lab.Packet) bool {
		return p.Dst.Addr() == lab.Metadata4 || p.Dst.Addr() == lab.Metadata6
	}); n > 0 {
		s.t.Errorf("%d packets reached the metadata service", n)
	}
	if flooded.Sent > 0 || flooded.Other != "" || flooded.Refused < 1000 || flooded.Denied < 1000 {
		s.t.Errorf("flood: %+v, want each attempt refused or denied", flooded)
	}
	mails := uint64(connections(packets, 25, netip.Addr{}))
	if most := burst + rate*seconds; float64(mails) > most || float64(mails) < 0.8*most {
		s.t.Errorf("%d mail SYNs of %d arrived in %.1f s, want at most and almost %.1f", mails, flooded.Mails, seconds, most)
	}
	got := s.row(s.a)
	if got.SMTP.Allowed != mails || flooded.MailsSent != mails || got.SMTP.RateLimited != flooded.Mails-mails {
		s.t.Errorf("%d mail SYNs arrived, %d of %d sent, but counted %+v", mails, flooded.MailsSent, flooded.Mails, got.SMTP.SMTP)
	}
	// Each attempt counts once: at the socket hook, or as a packet.
	if got.Blocked.Connects != flooded.Refused || got.Blocked.Packets != flooded.Denied {
		s.t.Errorf("%d attempts refused and %d denied, but counted %+v", flooded.Refused, flooded.Denied, got.Blocked)
	}
}

func TestParallelAttach(t *testing.T) {
	s := newScene(t)
	t.Cleanup(func() { s.Egressbpf(t, "detach") })
	own := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, 51, 100, byte(100 + i)}) }
	var all sync.WaitGroup
	exits := make([]lab.Exit, 5)
	for i := range exits {
		all.Go(func() {
			exits[i] = lab.Run(t, exec.Command(lab.Binary(t), "attach", "--cgroup", s.policed, "--block", own(i).String()))
		})
	}
	all.Wait()
	for i, exit := range exits {
		if exit.Code != 0 {
			t.Errorf("attach %d: exit code %d\n%s", i, exit.Code, exit.Stderr)
		}
	}
	status, _ := s.Status(t)
	if !status.Enforcing {
		t.Errorf("not enforcing: %+v", status.Hooks)
	}
	if status.Policy == nil || len(status.Policy.Block) != 1 {
		t.Fatalf("policy in force: %+v", status.Policy)
	}
	last := int(status.Policy.Block[0].Prefix.Addr().As4()[3]) - 100
	// The packet hook and the socket hooks have the policy that status shows.
	for i := range exits {
		connect, raw := ok, ok
		if i == last {
			connect, raw = refused, denied
		}
		if r := s.a.Connect(at(own(i), 80)); r.Errno != connect {
			t.Errorf("connect to %s: %v, want %v", own(i), r.Errno, connect)
		}
		header := lab.Header{Src: s.a.IPv4, Dst: own(i), Proto: unix.IPPROTO_UDP}
		if r := s.a.Raw(header.Packet(lab.UDP(1024, 80, 8)), own(i)); r.Errno != raw {
			t.Errorf("raw packet to %s: %v, want %v", own(i), r.Errno, raw)
		}
	}
	lab.ExpectPrograms(t, s.policed, 1)
}

func TestDetachLeavesNothing(t *testing.T) {
	s := newScene(t)
	s.attach()
	s.attach("--preset", "aws")
	if r := s.a.Connect(at(lab.Metadata4, 80)); r.Errno != refused {
		t.Fatal(r.Errno)
	}
	// Every program that was ever loaded holds the state's maps, and every link holds a
	// program. So when these maps are gone, everything is.
	maps := map[ebpf.MapID]bool{}
	status, _ := s.Status(t)
	for _, h := range status.Hooks {
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(h.Program))
		if err != nil {
			t.Fatal(err)
		}
		info, err := prog.Info()
		prog.Close()
		if err != nil {
			t.Fatal(err)
		}
		ids, _ := info.MapIDs()
		for _, id := range ids {
			maps[id] = true
		}
	}
	if len(maps) < 4 {
		t.Fatalf("the programs have %d maps", len(maps))
	}

	s.Egressbpf(t, "detach")
	if status, code := s.Status(t); code != 3 || status.Enforcing || len(status.Hooks) > 0 {
		t.Errorf("status after detach: exit code %d, %+v", code, status)
	}
	lab.ExpectPrograms(t, s.policed, 0)
	if _, err := os.Stat(loader.DefaultPinPath); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is left: %v", loader.DefaultPinPath, err)
	}
	// The kernel frees a program when no CPU uses it any more.
	for id := range maps {
		testenv.Eventually(t, fmt.Sprint("map ", id, " gone"), func() bool {
			m, err := ebpf.NewMapFromID(id)
			if err == nil {
				m.Close()
			}
			return errors.Is(err, fs.ErrNotExist)
		})
	}
	seen := s.Capture(t)
	if r := s.a.Connect(at(lab.Metadata4, 80)); r.Errno != ok {
		t.Errorf("after detach: %v", r.Errno)
	}
	if len(seen.Settle(t)) == 0 {
		t.Error("after detach: nothing arrived")
	}
	s.Egressbpf(t, "detach")
}
