package daemon

import (
	"context"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// device is a network device that has appeared or was set up.
type device struct {
	name, kind string
	// missed means that some devices may have been missed instead, and lost that the
	// kernel tells of no others.
	missed, lost bool
}

// devices returns a channel of bridges as they are made, and of tunnels as they appear or
// change, until ctx ends; nil if the kernel sends no messages. The periodic check finds other
// devices.
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
						tell(device{name: u.Attrs().Name, kind: "bridge"})
					}
				default:
					// A tunnel is judged once it is there, and its port is
					// closed once it is up.
					if loader.MayBeTunnel(u.Link) {
						tell(device{name: u.Attrs().Name, kind: u.Type()})
					}
				}
			}
			// The kernel had more messages than it keeps.
			select {
			case <-time.After(lookEvery):
			case <-ctx.Done():
				return
			}
			updates, err = d.subscribe(ctx)
			tell(device{missed: true, lost: err != nil})
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
	if new.lost {
		d.follow(ctx, false)
	}
	if new.missed || (new.kind == "bridge" && loader.CoversDevice(d.config.Policy, new.name)) {
		d.check(ctx)
	} else if new.kind != "bridge" {
		d.closeTunnels(ctx)
	}
}

// follow tells the filter whether this daemon watches for tunnels.
func (d *Daemon) follow(ctx context.Context, follows bool) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := d.Filter.Follow(ctx, follows); err != nil {
		d.Log.Error("cannot judge packets to tunnels that are made from now on", "err", err)
	}
}

func (d *Daemon) closeTunnels(ctx context.Context) {
	if d.config.Policy.HostSide == policy.Off {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := d.Filter.CloseTunnels(ctx); err != nil {
		d.Log.Error("cannot close tunnels to containers", "err", err)
	}
}
