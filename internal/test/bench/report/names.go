package report

import (
	"slices"
	"strings"
)

// The parts of a run, and the names by which the measurements call what the page compares.
// Others are shown too, under their own names.
const (
	programs = "programs"
	traffic  = "traffic"
	commands = "commands"

	none           = "none"
	noneLegacy     = "none (iptables-legacy)"
	emptyProgram   = "empty program"
	emptyPrograms  = "empty programs"
	emptyNetfilter = "empty netfilter"
	withoutHost    = "egressbpf without host side"
	hostAlone      = "host side alone"
	tool           = "egressbpf"
	// byTrafficControl is a way not taken.
	byTrafficControl = "egressbpf, host side by traffic control"
	nftRules         = "iptables-nft rules"
	legacyRules      = "iptables-legacy rules"
	perContainer     = "per-container rules"
	hashlimit        = "hashlimit"
	nftablesSet      = "nftables set"
	addressDeny      = "IPAddressDeny"

	udp4           = "udp4 from a container"
	udp6           = "udp6 from a container"
	udpIntoHost    = "udp4 into the host from outside"
	refusedConnect = "refused connect"
	refusedMail    = "refused mail syn"
	// Between these stands how the containers start.
	startCPU, ofService = "container start", "service's CPU"
	pass                = "pass tcp4 64 B"
	crowdedPass         = "tcp4, 10,000 containers"
)

// filters is the order of filters in tables.
var filters = []string{
	none, noneLegacy, emptyProgram, emptyPrograms, emptyNetfilter, withoutHost, hostAlone, tool, byTrafficControl,
	nftRules, legacyRules, perContainer, hashlimit, nftablesSet, addressDeny,
}

// threeRules are the two kinds of the rules that egressbpf replaces. The first is what
// iptables makes on current distributions.
var threeRules = []string{nftRules, legacyRules}

// rank is a filter's place in tables. Filters that only the results know come last.
func rank(filter string) int {
	if i := slices.Index(filters, filter); i >= 0 {
		return i
	}
	return len(filters)
}

// kind splits the IP version from an operation: "udp4 from a container" is of the kind "udp
// from a container", and of version "4".
func kind(operation string) (kind, version string) {
	words := strings.Fields(operation)
	for i, w := range words {
		for _, p := range []string{"udp", "tcp"} {
			if v, ok := strings.CutPrefix(w, p); ok && (v == "4" || v == "6") {
				words[i] = p
				return strings.Join(words, " "), v
			}
		}
	}
	return operation, ""
}

var titles = strings.NewReplacer(
	"connect and close tcp", "TCP connect and close",
	"round trip tcp", "TCP round trip",
	"bulk tcp", "TCP bulk transfer",
	"udp", "UDP packet",
	"mail syn", "mail SYN",
	"from a service beside", "from a service of the host",
)

// title is a kind of operation as a heading.
func title(kind string) string {
	t := titles.Replace(kind)
	return strings.ToUpper(t[:1]) + t[1:]
}

// describe is an operation as a heading.
func describe(operation string, cpus int) string {
	k, version := kind(operation)
	text := title(k)
	switch {
	case version != "" && cpus > 1:
		text += " (IPv" + version + ", " + count(cpus, "CPU") + ")"
	case version != "":
		text += " (IPv" + version + ")"
	case cpus > 1:
		text += " (" + count(cpus, "CPU") + ")"
	}
	return text
}
