package daemon

import (
	"context"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
)

// bridges returns a channel of the names of bridges as they are made, until ctx ends; an
// empty one means that some may have been missed. The periodic check finds other devices,
// and all if the kernel does not tell.
func (d *Daemon) bridges(ctx context.Context) <-chan string {
	updates, err := d.subscribe(ctx)
	if err != nil {
		return nil
	}
	names := make(chan string)
	tell := func(name string) {
		select {
		case names <- name:
		case <-ctx.Done():
		}
	}
	go func() {
		for err == nil {
			for u := range updates {
				// All bits: it is new.
				if u.Header.Type == unix.RTM_NEWLINK && u.IfInfomsg.Change == ^uint32(0) && u.Type() == "bridge" {
					tell(u.Attrs().Name)
				}
			}
			// The kernel had more to tell than it keeps.
			select {
			case <-time.After(lookEvery):
			case <-ctx.Done():
				return
			}
			updates, err = d.subscribe(ctx)
			tell("")
		}
	}()
	return names
}

// subscribe returns what becomes of network devices, until ctx ends or something is missed.
func (d *Daemon) subscribe(ctx context.Context) (<-chan netlink.LinkUpdate, error) {
	const kept = 1 << 20 // bytes; thousands of devices
	updates := make(chan netlink.LinkUpdate)
	err := netlink.LinkSubscribeWithOptions(updates, ctx.Done(), netlink.LinkSubscribeOptions{
		ReceiveBufferSize: kept,
		ErrorCallback: func(err error) {
			if ctx.Err() == nil {
				d.Log.Warn("news of new bridges was missed", "err", err)
			}
		},
	})
	if err != nil {
		d.Log.Warn("new bridges cannot be followed, but are found by and by", "err", err)
	}
	return updates, err
}

// appeared has a bridge judged, if it leads to containers: where the kernel judges devices
// one by one, the last attach has left it out.
func (d *Daemon) appeared(ctx context.Context, name string) {
	if name == "" || loader.CoversDevice(d.config.Policy, name) {
		d.check(ctx)
	}
}
