package verdict

import (
	"slices"
	"testing"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// row is a packet and its verdict when it leaves by an ordinary device. Admitted means that the
// packet takes a token: sent again, with no token left, it is dropped.
type row struct {
	name   string
	packet packet
	want   verdict
}

// table holds rows under one of the policies.
type table struct {
	name   string
	policy string
	rows   []row
}

func tables() []table {
	return slices.Concat(headerTables(), transportTables(), ruleTables(), mailTables())
}

// TestVerdict checks the program with every row of every table: the verdict, and what is
// counted and remembered.
func TestVerdict(t *testing.T) {
	at := newSender(t)
	for i, table := range tables() {
		if testing.Short() && i%8 > 0 {
			continue // under emulation, each policy takes long to load
		}
		t.Run(table.name, func(t *testing.T) {
			enforce := policies(t)[table.policy]
			audit := enforce
			audit.Mode = policy.Audit
			enforcing, auditing := at.load(t, enforce), at.load(t, audit)
			for _, row := range table.rows {
				t.Run(row.name, func(t *testing.T) {
					at.inside(t, func() {
						enforcing.check(t, row, at.device)
						enforcing.check(t, row, loopback)
						auditing.check(t, row, at.device)
					})
				})
			}
			for _, f := range []*filter{enforcing, auditing} {
				f.forget(t)
				if others, err := f.state.Containers(); err != nil || len(others) > 0 {
					t.Errorf("something was counted for others than the container: %v, %v", others, err)
				}
			}
		})
	}
}

func (f *filter) check(t *testing.T, r row, device int) {
	t.Helper()
	f.forget(t)
	want := r.want
	if device == loopback && want != malformed && want != blocked {
		want = newModel(f.policy).judge(r.packet.etherType(), r.packet.bytes(), loopback)
	}
	f.expect(t, r, device, want)
	if want == admitted {
		if !f.policy.SMTP.Rate.Unlimited() {
			want = rateLimited
		}
		f.expect(t, r, device, want)
	}
}

func (f *filter) expect(t *testing.T, r row, device int, want verdict) {
	t.Helper()
	if difference := f.compare(t, r.packet.etherType(), r.packet.bytes(), device, want); difference != "" {
		t.Errorf("%s, device %d: %s", f.policy.Mode, device, difference)
	}
}
