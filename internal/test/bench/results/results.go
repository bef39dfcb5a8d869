// Package results is the form in which raw measurements are kept.
package results

import (
	"encoding/json"
	"fmt"
	"os"
	"time"
)

// Results are the measurements of one run of the benchmarks.
type Results struct {
	Machine Machine   `json:"machine"`
	Costs   []Cost    `json:"costs"`
	Limits  []Limiter `json:"limiters"`
}

// Machine says where, when and of what the measurements were taken.
type Machine struct {
	Time    time.Time `json:"time"`
	Version string    `json:"version"` // of egressbpf
	Kernel  string    `json:"kernel"`
	CPU     string    `json:"cpu"` // the model
	CPUs    int       `json:"cpus"`
	// Tools are the versions of what egressbpf is compared with, by name.
	Tools map[string]string `json:"tools"`
	// Busy is how many CPUs other processes used before the run, on average.
	Busy float64 `json:"busy"`
}

// Cost is what one operation costs with one filter in force.
type Cost struct {
	// Part is the part of the run: "programs", "traffic" or "commands". Costs are
	// comparable within a part alone.
	Part      string `json:"part"`
	Operation string `json:"operation"`
	Filter    string `json:"filter"`
	// Containers is how many containers there are; CPUs how many send.
	Containers int `json:"containers"`
	CPUs       int `json:"cpus"`
	// Prefixes is how many prefixes of each family are blocked; 0 where it is the metadata
	// service alone.
	Prefixes int `json:"prefixes,omitempty"`
	// Unit is that of Samples: "ns", for each operation.
	Unit string `json:"unit"`
	// Samples has a value for each round. In a round everything is built anew, and what
	// has the same index was measured in turns.
	Samples []float64 `json:"samples"`
	// Instructions is how many instructions the kernel's verifier looked at; 0 where
	// no program was measured alone.
	Instructions uint32 `json:"instructions,omitempty"`
	// Missing says why there are no samples.
	Missing string `json:"missing,omitempty"`
}

// Limiter is how exact one limiter of new connections is.
type Limiter struct {
	Filter string `json:"filter"`
	// PerSecond and Burst are the limit.
	PerSecond float64 `json:"per_second"`
	Burst     int     `json:"burst"`
	CPUs      int     `json:"cpus"`
	// Asked are the connections asked for in Seconds, Admitted those that a server saw,
	// and Allowed is what the limit allows in that time: the burst and the rate.
	Seconds  float64 `json:"seconds"`
	Asked    int     `json:"asked"`
	Admitted int     `json:"admitted"`
	Allowed  float64 `json:"allowed"`
	Missing  string  `json:"missing,omitempty"`
}

// Read reads results from a file.
func Read(path string) (r Results, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("read results from %s: %w", path, err)
	}
	return r, nil
}

// Write writes results to a file.
func (r Results) Write(path string) error {
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
