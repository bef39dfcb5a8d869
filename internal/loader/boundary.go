package loader

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// CgroupBoundary is the defence that keeps containers in their cgroups.
const CgroupBoundary = "cgroup_boundary"

// NoDelegation says what a cgroup2 mount without nsdelegate allows containers to do.
const NoDelegation = "cgroup2 is mounted without nsdelegate, as it is after a container had the host's cgroup namespace: a container that can write to the cgroup tree can move its processes to a cgroup that is not policed; run mount -o remount,nsdelegate, and give no container --cgroupns=host or write access to the tree"

// SocketIdentity is the defence that tells which container a socket belongs to.
const SocketIdentity = "socket_identity"

// socketIdentityGap says why the kernel may not know that a socket belongs to a container;
// "" if it does.
func socketIdentityGap() (string, error) {
	v1, err := cgroup.NetV1()
	if err != nil || !v1 {
		return "", err
	}
	// The helper came in 5.18, soon after the kernel could tell both hierarchies apart.
	recent, err := haveHelper(ebpf.CGroupSockAddr, asm.FnSetRetval)
	if err != nil || recent {
		return "", err
	}
	return "a cgroup v1 hierarchy with net_cls or net_prio is mounted: once it is used, this kernel counts new sockets of containers as the host's, and their packets pass; unmount it", nil
}

// SocketIdentityGap says why the kernel may not know that a socket belongs to a container;
// "" if it does.
func SocketIdentityGap() (string, error) { return socketIdentityGap() }
