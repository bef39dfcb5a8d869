package daemon

import (
	"context"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
)

// devices returns a channel of the names of network devices as they are made, until ctx
// ends. If the kernel does not tell, the periodic check finds them.
func (d *Daemon) devices(ctx context.Context) <-chan string {
	updates, names := make(chan netlink.LinkUpdate), make(chan string)
	err := netlink.LinkSubscribeWithOptions(updates, ctx.Done(), netlink.LinkSubscribeOptions{
		ErrorCallback: func(err error) { d.Log.Debug("network devices are not followed", "err", err) },
	})
	if err != nil {
		d.Log.Warn("network devices cannot be followed", "err", err)
		return nil
	}
	go func() {
		for u := range updates {
			// All bits: it is new.
			if u.Header.Type != unix.RTM_NEWLINK || u.IfInfomsg.Change != ^uint32(0) {
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

// appeared has the device judged, if it is a bridge of containers: where the kernel
// judges devices one by one, the last attach has left it out.
func (d *Daemon) appeared(ctx context.Context, name string) {
	if loader.CoversDevice(d.config.Policy, name) {
		d.check(ctx)
	}
}
