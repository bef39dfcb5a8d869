package testenv

import "strings"

// NamedCgroup is what a cgroup could be called, and what is to be read from that.
type NamedCgroup struct {
	Name string
	// Container is whether the default scopes take it for a container's.
	Container bool
	// ID is that of the container; empty if the name has none.
	ID string
}

// NamedCgroups are for both that read them: Go, and the programs. There are names of each
// default scope but those of a directory, and such as come near them.
func NamedCgroups() []NamedCgroup {
	const (
		id    = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
		build = "0r6mzc6cy0b2zhfsoinq9y6th"
	)
	var all []NamedCgroup
	add := func(container bool, id string, names ...string) {
		for _, name := range names {
			all = append(all, NamedCgroup{name, container, id})
		}
	}
	add(true, id,
		"docker-"+id+".scope", id, "libpod-"+id+".scope", "libpod-"+id, "libpod-payload-"+id,
		"cri-containerd-"+id+".scope", "nerdctl-"+id+".scope", "crio-"+id+".scope", "crio-"+id)
	add(true, "",
		build, ":"+build, "system.slice:docker:"+build, strings.Repeat("0", len(build)), strings.Repeat("z", len(build)),
		"buildah-buildah123", "buildah-"+id, "crun-buildah-buildah123.scope", "runc-buildah-x")
	// Of an engine, with the other cgroup driver than it is known to have.
	add(false, id, "docker-"+id, "cri-containerd-"+id, "nerdctl-"+id, "libpod-payload-"+id+".scope", id+".scope")
	add(false, "",
		"docker-"+id+".service", "docker-"+id+".scope.d", "docker-"+id+".scope.scope", "docker-.scope", "docker-x.scope", "docker",
		"xdocker-"+id+".scope", "Docker-"+id+".scope", "docker--"+id+".scope", "libpod-conmon-"+id+".scope", "runc-"+id, "-"+id,
		"docker-"+id[1:]+".scope", "docker-0"+id+".scope", "docker-"+strings.ToUpper(id)+".scope",
		"docker-"+id[:63]+"g.scope", "docker-g"+id[1:]+".scope", "docker-"+id[:31]+"-"+id[32:]+".scope",
		id+"0", id[1:], "g"+id[1:], id[:63]+"A", "crio-"+id[1:],
		"docker-"+build, build[1:], build+"0", "X"+build[1:], build[:24]+"_", build+".scope", build+":", ":"+build[1:],
		"buildah-", "xbuildah-1", "runc-buildah", "lxc.payload.c1", "machine-m.scope", "user@1000.service")
	return all
}
