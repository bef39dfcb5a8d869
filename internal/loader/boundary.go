package loader

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// cgroupBoundary is what keeps containers in their cgroups.
const cgroupBoundary = "cgroup_boundary"

// NoDelegation says what follows from a cgroup2 mount without nsdelegate.
const NoDelegation = "cgroup2 is mounted without nsdelegate, as it is once a container had the host's cgroup namespace: a container that can write to the cgroup tree can move its processes to where they are not judged; mount -o remount,nsdelegate, and give containers neither --cgroupns=host nor that tree to write"

// socketIdentity is what tells whose a socket is.
const socketIdentity = "socket_identity"

// socketIdentityGap says why sockets may not be known for a container's, if so.
func socketIdentityGap() (string, error) {
	v1, err := cgroup.NetV1()
	if err != nil || !v1 {
		return "", err
	}
	// It came in 5.18, soon after the kernel could tell both hierarchies apart.
	recent, err := haveHelper(ebpf.CGroupSockAddr, asm.FnSetRetval)
	if err != nil || recent {
		return "", err
	}
	return "a cgroup v1 hierarchy with net_cls or net_prio is mounted: once that is used, this kernel takes new sockets of containers for the host's, and they pass; unmount it", nil
}

// SocketIdentityGap says why sockets may not be known for a container's, or nothing if
// they are.
func SocketIdentityGap() (string, error) { return socketIdentityGap() }
