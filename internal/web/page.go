package web

import (
	"strconv"
	"time"

	"github.com/egressbpf/egressbpf/internal/events"
)

// MaxRows is how many containers the page shows: those with the most refusals.
const MaxRows = 200

// Page is what the page shows, as the kernel told it at a time. Names are as their authors wrote
// them.
type Page struct {
	Time    time.Time `json:"time"`
	Node    string    `json:"node"`
	Version string    `json:"version"`
	// Error says why nothing else can be read; empty if it can.
	Error string `json:"error,omitempty"`
	// InForce is whether the filter does all that it can, and Enforcing whether it drops
	// packets. Why says what is missing.
	InForce   bool      `json:"in_force"`
	Enforcing bool      `json:"enforcing"`
	Mode      string    `json:"mode"`
	Why       []string  `json:"why"`
	Cgroups   []string  `json:"cgroups"`
	Defences  []Defence `json:"defences"`
	// Total is of all containers, those that are gone included.
	Total Counts `json:"total"`
	// Containers is how many are policed, and Rows are the first MaxRows of them.
	Containers int   `json:"containers"`
	Rows       []Row `json:"rows"`
	// Records are the last refusals.
	Records []events.Record `json:"records"`
}

// Defence is a defence beside the hooks.
type Defence struct {
	Name   string `json:"name"`
	Active bool   `json:"active"`
	Reason string `json:"reason,omitempty"`
}

// Counts are what was refused, by reason, in packets and attempts to connect; and mail.
type Counts struct {
	Blocked     uint64 `json:"blocked"`
	Malformed   uint64 `json:"malformed"`
	Sockets     uint64 `json:"sockets"`
	Host        uint64 `json:"host"`
	MailAllowed uint64 `json:"mail_allowed"`
	MailRefused uint64 `json:"mail_refused"`
}

// Refused is the sum of what was refused.
func (c Counts) Refused() uint64 { return c.Blocked + c.Malformed + c.Sockets + c.Host + c.MailRefused }

// Other is what the table of containers shows together.
func (c Counts) Other() uint64 { return c.Malformed + c.Sockets + c.Host }

// LeftOut is how many containers have no row.
func (p Page) LeftOut() int { return max(0, p.Containers-len(p.Rows)) }

// Row is a container.
type Row struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	Image string `json:"image"`
	Counts
	// Tokens are the mail connections that it can open now; nil if they are not limited, or
	// not known. Limit is its limit, such as "5/minute, burst 5".
	Tokens *float64 `json:"tokens"`
	Limit  string   `json:"limit"`
}

// Left is Tokens as text.
func (r Row) Left() string {
	if r.Tokens == nil {
		return "–"
	}
	return strconv.FormatFloat(*r.Tokens, 'f', 1, 64)
}
