package daemon

import (
	"context"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
)

// bridges returns a channel of the names of bridges as they are made, until ctx ends. The
// periodic check finds other devices, and all if the kernel does not tell.
func (d *Daemon) bridges(ctx context.Context) <-chan string {
	updates, names := make(chan netlink.LinkUpdate), make(chan string)
	err := netlink.LinkSubscribeWithOptions(updates, ctx.Done(), netlink.LinkSubscribeOptions{
		ErrorCallback: func(err error) {
			if ctx.Err() == nil {
				d.Log.Warn("new bridges are not followed any more, but found by and by", "err", err)
			}
		},
	})
	if err != nil {
		d.Log.Warn("new bridges cannot be followed, but are found by and by", "err", err)
		return nil
	}
	go func() {
		for u := range updates {
			// All bits: it is new.
			if u.Header.Type != unix.RTM_NEWLINK || u.IfInfomsg.Change != ^uint32(0) || u.Type() != "bridge" {
				continue
			}
			select {
			case names <- u.Attrs().Name:
			case <-ctx.Done():
			}
		}
	}()
	return names
}

// appeared has a bridge judged, if it leads to containers: where the kernel judges devices
// one by one, the last attach has left it out.
func (d *Daemon) appeared(ctx context.Context, name string) {
	if loader.CoversDevice(d.config.Policy, name) {
		d.check(ctx)
	}
}
