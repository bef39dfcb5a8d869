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

// devices returns a channel of bridges as they are made, of devices that may lead to a new
// container without a bridge of Docker's, and of tunnels as they appear or change, until ctx
// ends; nil if the kernel sends no messages. The periodic check finds other devices.
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
	d.background.Go(func() {
		ports := newPorts()
		for err == nil {
			for u := range updates {
				if u.Header.Type != unix.RTM_NEWLINK {
					ports.forget(u.Attrs().Index)
					continue
				}
				switch u.Type() {
				case "veth", "netkit":
					if name, ok := ports.leads(u.Link); ok {
						tell(device{name: name, kind: pair})
					}
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
	})
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

// pair is the kind of a device through which a container may reach the host: one end of a pair,
// or the bridge of which that is a port.
const pair = "pair"

// ports knows which of the host's devices are ports of Docker's bridges, so that a container of
// Docker's costs nothing when it starts.
type ports struct {
	// bridges are the names of masters by index.
	bridges map[int]string
	// told are the indexes of the pairs of which leads has told, with their masters then.
	told map[int]int
	// nameOf returns the name of a device; "" if there is none.
	nameOf func(index int) string
}

func newPorts() *ports {
	return &ports{map[int]string{}, map[int]int{}, func(index int) string {
		l, err := netlink.LinkByIndex(index)
		if err != nil {
			return ""
		}
		return l.Attrs().Name
	}}
}

// leads returns through which device a container could reach the host by l, if l or its master
// is new and the device is not one of Docker's bridges.
func (p *ports) leads(l netlink.Link) (device string, ok bool) {
	a := l.Attrs()
	if !loader.LeadsElsewhere(l) {
		return "", false
	}
	if master, known := p.told[a.Index]; known && master == a.MasterIndex {
		return "", false
	}
	device = a.Name
	if a.MasterIndex != 0 {
		if device, ok = p.bridges[a.MasterIndex]; !ok {
			device = p.nameOf(a.MasterIndex)
			p.bridges[a.MasterIndex] = device
		}
	}
	if loader.CoversDevice(policy.Policy{}, device) {
		return "", false
	}
	p.told[a.Index] = a.MasterIndex
	return device, true
}

// forget forgets a device that is gone.
func (p *ports) forget(index int) {
	delete(p.bridges, index)
	delete(p.told, index)
}

// The daemon looks for a container behind a new device at once, and again after delays that
// double, since the container's first process comes after its network. Then the periodic check
// goes on. It spends at most one part in lookShare of its time on this.
const (
	firstLook = 100 * time.Millisecond
	lastLook  = 16 * time.Second
	lookShare = 10
)

// newPair has the daemon look soon whether a new device leads to a container.
func (d *Daemon) newPair(name string) {
	if d.config.Policy.HostSide == policy.Off || d.attached != nil && d.attached.JudgesNewDevice(name) {
		return
	}
	d.nextLook = firstLook
	d.lookIn(firstLook)
}

// lookIn has the daemon look for containers behind new devices after a delay, or later if it has
// just looked for long. If it looks earlier anyway, that stays.
func (d *Daemon) lookIn(delay time.Duration) {
	at := time.Now().Add(delay)
	if at.Before(d.notBefore) {
		at = d.notBefore
	}
	if d.pairs == nil || at.Before(d.lookAt) {
		d.lookAt, d.pairs = at, time.After(time.Until(at))
	}
}

// lookForPairs gets new devices judged that lead to containers.
func (d *Daemon) lookForPairs(ctx context.Context) {
	d.pairs = nil
	began := time.Now()
	d.judgePairs(ctx)
	d.notBefore = time.Now().Add((lookShare - 1) * time.Since(began))
	if d.nextLook *= 2; d.nextLook <= lastLook {
		d.lookIn(d.nextLook)
	}
}

func (d *Daemon) judgePairs(ctx context.Context) {
	s, err := d.Filter.Status()
	if err != nil {
		d.Log.Error("cannot read the status", "err", err)
		return
	}
	if len(s.Unjudged) == 0 {
		return
	}
	d.Log.Info("containers have new devices; attaching again", "devices", s.Unjudged)
	if err := d.attach(ctx, d.config); err != nil {
		d.Log.Error("cannot attach again", "err", err)
	}
	d.apply(ctx) // an attach forgets what rules give to whole pods
}

// appeared gets a bridge judged if it leads to containers: if the kernel judges each device
// by itself, the last attach could not include this one. A device that may be a tunnel is
// closed to containers.
func (d *Daemon) appeared(ctx context.Context, new device) {
	if new.lost {
		d.follow(ctx, false)
	}
	if new.kind == pair {
		d.newPair(new.name)
	} else if new.missed || (new.kind == "bridge" && loader.CoversDevice(d.config.Policy, new.name)) {
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
