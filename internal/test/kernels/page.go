package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/egressbpf/egressbpf/internal/test/kernels/facts"
)

// defences are in the order of the page.
var defences = []string{facts.Egress, facts.Connect, facts.Recognition, facts.Families, facts.HostSide, facts.Events}

// programs are those of the page, by what they do; the page says which of them a kernel lacks.
var programs = []string{
	"egress", "connect4", "connect6", "sendmsg4", "sendmsg6", "recognise", "keep", "release",
	"families_lsm", "families_fmod", "host_forward", "host_deliver", "host_answer", "host_ingress",
}

const head = `# Kernels

<!-- Generated from kernels.json: change internal/test/kernels instead, and run make kernels. -->

This page says what egressbpf does on which kernel, and how large its programs are for the
kernel's verifier. A test (` + "`TestKernel`" + `) found it on each of these kernels, in a virtual machine
under emulation, with real sockets and packets. CI runs the test again and fails if a kernel does
anything else than this page says. [hosts.md](hosts.md) says what follows from it.

The kernels are Debian's. Of a suite that moves on (backports, sid), it is the kernel of the day
on which this page was made. The kernels of other distributions are not tested.

## What is in force
`

const text = `
- *connect()* is the error with which a refused ` + "`connect()`" + ` fails.
- *recognition*: a container is known as soon as its cgroup is made.
- *socket families* is how the kernel refuses sockets.
- *host side* is how the host judges packets that do not come from a container's IP socket.
- *events* says whether refusals are told with the process that was refused.

## Instructions

The number of instructions that the verifier processes for each program: the largest of three
policies (the default, the default in mode audit, and one that blocks prefixes, exempts a relay and
has over_limit reject). Other policies may need more. The kernel's limit is 1,000,000. CI fails above %s, and if a number differs from this page by more than %d %%.
`

const tail = `
A dash is a program that is not loaded there. Kernels before 5.16 do not tell the number of a
program that is loaded: there it is from the verifier's log, of programs that refuse sockets it is
not known, and ` + "`host_ingress`" + ` is what the host side loads before 6.4.
`

func render(all kernels) string {
	var b strings.Builder
	names := all.names()
	b.WriteString(head)
	rows := [][]string{{"kernel", "architecture", "pages", "packets", "connect()", "recognition", "socket families", "host side", "events"}}
	for _, name := range names {
		f := all[name]
		row := []string{"`" + f.Release + "` (" + name + ")", f.Arch, strconv.Itoa(f.PageSize/1024) + " KiB"}
		for _, d := range defences {
			how := f.Defences[d]
			if how == "" {
				how = "**no**"
			}
			row = append(row, how)
		}
		rows = append(rows, row)
	}
	table(&b, rows)
	fmt.Fprintf(&b, text, thousands(facts.Ceiling), drift)
	rows = [][]string{append([]string{"program"}, names...)}
	for _, program := range programs {
		row := []string{"`" + program + "`"}
		for _, name := range names {
			n := "–"
			if all[name].Programs[program] > 0 {
				n = thousands(all[name].Programs[program])
			}
			row = append(row, n)
		}
		rows = append(rows, row)
	}
	table(&b, rows)
	b.WriteString(tail)
	return b.String()
}

func table(b *strings.Builder, rows [][]string) {
	b.WriteByte('\n')
	for i, row := range rows {
		b.WriteString("| " + strings.Join(row, " | ") + " |\n")
		if i == 0 {
			b.WriteString("|" + strings.Repeat("---|", len(row)) + "\n")
		}
	}
}

func thousands(n int) string {
	if n < 1000 {
		return strconv.Itoa(n)
	}
	return fmt.Sprintf("%s,%03d", thousands(n/1000), n%1000)
}
