// Package events tells of refusals as they happen: it reads them from the kernel, adds what is
// known about the container and the policy, and passes them on as records.
//
// Events are best effort. What has been refused is counted in the maps of the filter.
package events

import (
	"context"
	"net/netip"
	"time"
)

// The types of records.
const (
	// Start is the first record of a stream.
	Start = "start"
	// Refusal tells of one packet or system call that was refused, or would have been.
	Refusal = "refusal"
	// Suppressed tells how many refusals of a container were left out, because the container
	// has too many of them.
	Suppressed = "suppressed"
	// Lost tells how many refusals were lost, because a buffer was full.
	Lost = "lost"
)

// Where a packet or a system call is refused.
const (
	HookConnect = "connect" // connect()
	HookSendmsg = "sendmsg" // sendmsg() and the like, of a socket that is not connected
	HookPacket  = "packet"  // a packet that leaves a container
	HookSocket  = "socket"  // socket()
	HookHost    = "host"    // a packet that reaches the host from a container
)

// The reasons to refuse.
const (
	ReasonMalformed   = "malformed"
	ReasonBlocked     = "blocked"
	ReasonRateLimited = "rate_limited"
	ReasonNoBucket    = "no_bucket"
	ReasonFamily      = "family"
)

// Where events are lost.
const (
	StageKernel = "kernel" // the reader's buffer in the kernel was full
	StageReader = "reader" // the reader's own queue was full, or it was stopped for long
)

// Record is one line of a stream. Its JSON is an interface to other programs: keys are only
// ever added. A key is left out if its value is not known, or has no meaning for the type.
type Record struct {
	Type string    `json:"type"`
	Time time.Time `json:"time"`
	// Version is that of the program that writes the stream; only in Start.
	Version string `json:"version,omitempty"`
	// Node is the host's name.
	Node string `json:"node,omitempty"`
	// Container is nil if the container is not known: the host cannot always tell.
	Container *Container `json:"container,omitempty"`
	K8s       *K8s       `json:"k8s,omitempty"`

	// What follows is of a Refusal.

	Hook   string `json:"hook,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Rule is the entry of the policy that is the reason, as `egressbpf explain` names it.
	Rule string `json:"rule,omitempty"`
	// WouldBlock is whether the policy refuses this, and Blocked whether it was refused: not
	// in mode audit. Both are there in each Refusal.
	WouldBlock *bool `json:"would_block,omitempty"`
	Blocked    *bool `json:"blocked,omitempty"`
	// Protocol is a name (tcp, udp, icmp, ...) or a number; Family is the same of a socket's
	// family (packet, vsock, ...).
	Protocol    string    `json:"protocol,omitempty"`
	Family      string    `json:"family,omitempty"`
	Source      *Endpoint `json:"source,omitempty"`
	Destination *Endpoint `json:"destination,omitempty"`
	// Interface is the device by which a packet reached the host; only at HookHost.
	Interface string   `json:"interface,omitempty"`
	Process   *Process `json:"process,omitempty"`
	// Bytes is the length of the packet, from its IP header on.
	Bytes uint32 `json:"bytes,omitempty"`

	// Count is how many refusals a record of type Suppressed or Lost stands for, and Since
	// when the first of them was.
	Count uint64     `json:"count,omitempty"`
	Since *time.Time `json:"since,omitempty"`
	// Stage is where events were lost.
	Stage string `json:"stage,omitempty"`
}

// Container is a container as records show it. Whoever starts it has chosen Name and Image.
type Container struct {
	ID       string `json:"id"`
	Name     string `json:"name"`
	Image    string `json:"image"`
	Cgroup   string `json:"cgroup"`
	CgroupID uint64 `json:"cgroup_id"`
}

// K8s is the pod of a container.
type K8s struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	PodUID    string `json:"pod_uid"`
	Container string `json:"container"`
}

// Endpoint is one end of a packet. Port is 0 if the protocol has no ports.
type Endpoint struct {
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port,omitempty"`
}

// Process is the process that asked. Comm is the name that the process has given itself: any
// bytes, at most 15. UID is in the host's user namespace.
type Process struct {
	PID  uint32 `json:"pid"`
	Comm string `json:"comm"`
	UID  uint32 `json:"uid"`
}

// Source gives the records of a stream, one after the other. Next waits for the next record.
// Its error is that of ctx, or tells why there are no more; io.EOF if the stream has ended.
type Source interface {
	Next(ctx context.Context) (Record, error)
}
