// Package facts describes what the filter does on a kernel, as a test found it.
package facts

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Ceiling is how many instructions the verifier may process for one program: a tenth of the kernel's
// own limit, since other kernels and compilers need more or less than those that are tested.
const Ceiling = 100_000

// Facts are what a test found on a kernel.
type Facts struct {
	// Release is the kernel's version, and Arch its architecture, as Go names it.
	Release string `json:"release"`
	Arch    string `json:"arch"`
	// PageSize is the size of a page of memory, in bytes.
	PageSize int `json:"page_size"`
	// Defences says how the kernel does what the filter can do. What it does not do is left out.
	Defences map[string]string `json:"defences"`
	// Programs are the instructions that the verifier processed for each program, at most, with
	// the policies of the test.
	Programs map[string]int `json:"programs"`
}

// The defences.
const (
	Egress      = "egress"          // packets are judged
	Connect     = "connect"         // connect() and sendmsg() are judged; how is what a refused connect() says
	Recognition = "recognition"     // a container is known when its cgroup is made
	Families    = "socket_families" // socket() is refused
	HostSide    = "host_side"       // packets that do not come from a container's IP socket are judged
	Events      = "events"          // refusals are told, with the process or without
)

// prefix begins the line of a test's output that holds facts.
const prefix = "facts: "

// Write writes the facts as one line, for Read.
func (f *Facts) Write(to io.Writer) error {
	line, err := json.Marshal(f)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(to, "%s%s\n", prefix, line)
	return err
}

// Read finds the facts in the output of a test.
func Read(from io.Reader) (*Facts, error) {
	lines := bufio.NewScanner(from)
	for lines.Scan() {
		if line, ok := strings.CutPrefix(lines.Text(), prefix); ok {
			f := new(Facts)
			return f, json.Unmarshal([]byte(line), f)
		}
	}
	return nil, errors.Join(errors.New("the output has no facts"), lines.Err())
}
