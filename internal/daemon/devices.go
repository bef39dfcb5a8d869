package daemon

import (
	"context"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// device is a network device that has appeared or was set up. The zero value means that
// some devices may have been missed.
type device struct{ name, kind string }

// devices returns a channel of bridges as they are made, and of tunnels as they come up,
// until ctx ends. The periodic check finds other devices, and all devices if the kernel
// sends no messages.
func (d *Daemon) devices(ctx context.Context) <-chan device {
	updates, err := d.subscribe(ctx)
	if err != nil {
		return nil
	}
	found := make(chan device)
	tell := func(new device) {
		select {
		case found <- new:
		case <-ctx.Done():
		}
	}
	go func() {
		for err == nil {
			for u := range updates {
				if u.Header.Type != unix.RTM_NEWLINK {
					continue
				}
				switch u.Type() {
				case "bridge":
					// All bits are set for a new device.
					if u.IfInfomsg.Change == ^uint32(0) {
						tell(device{u.Attrs().Name, "bridge"})
					}
				case "device", "dummy", "ifb", "ipvlan", "macvlan", "veth", "vlan":
				default:
					// A tunnel has its port from the moment that it is
					// up.
					tell(device{u.Attrs().Name, u.Type()})
				}
			}
			// The kernel had more messages than it keeps.
			select {
			case <-time.After(lookEvery):
			case <-ctx.Done():
				return
			}
			updates, err = d.subscribe(ctx)
			tell(device{})
		}
	}()
	return found
}

// subscribe returns messages about network devices until ctx ends or a message is missed.
func (d *Daemon) subscribe(ctx context.Context) (<-chan netlink.LinkUpdate, error) {
	const kept = 1 << 20 // bytes; thousands of devices
	updates := make(chan netlink.LinkUpdate)
	err := netlink.LinkSubscribeWithOptions(updates, ctx.Done(), netlink.LinkSubscribeOptions{
		ReceiveBufferSize: kept,
		ErrorCallback: func(err error) {
			if ctx.Err() == nil {
				d.Log.Warn("missed messages about new bridges", "err", err)
			}
		},
	})
	if err != nil {
		d.Log.Warn("cannot follow new bridges; the periodic check finds them", "err", err)
	}
	return updates, err
}

// appeared gets a bridge judged if it leads to containers: if the kernel judges each device
// by itself, the last attach could not include this one. A device that may be a tunnel is
// closed to containers.
func (d *Daemon) appeared(ctx context.Context, new device) {
	if new.kind == "" || (new.kind == "bridge" && loader.CoversDevice(d.config.Policy, new.name)) {
		d.check(ctx)
	} else if new.kind != "bridge" {
		d.closeTunnels()
	}
}

func (d *Daemon) closeTunnels() {
	if d.config.Policy.HostSide == policy.Off {
		return
	}
	if err := d.Filter.CloseTunnels(); err != nil {
		d.Log.Error("cannot close tunnels to containers", "err", err)
	}
}
