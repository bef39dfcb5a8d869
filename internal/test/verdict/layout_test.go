package verdict

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/kernels/facts"
)

func loadSpec(t *testing.T) *ebpf.CollectionSpec {
	t.Helper()
	spec, err := bpf.LoadEgress()
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// TestLayout compares the types that the programs and Go share with those that the programs'
// compiler saw.
func TestLayout(t *testing.T) {
	spec := loadSpec(t)
	for name, value := range map[string]any{
		"container": maps.Container{},
		"flow_key":  bpf.EgressFlowKey{},
		"prefix":    bpf.EgressPrefix{},
		"rule":      bpf.EgressRule{},
		"port_key":  bpf.EgressPortKey{},
		"ticket":    bpf.EgressTicket{},
	} {
		var typ *btf.Struct
		if err := spec.Types.TypeByName(name, &typ); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		checkLayout(t, name, typ, reflect.TypeOf(value))
	}
	for name, entry := range map[string][2]any{
		bpf.EgressMapContainers: {uint64(0), maps.Container{}},
		bpf.EgressMapTotals:     {uint32(0), maps.Sums{}},
		bpf.EgressMapTickets:    {int32(0), bpf.EgressTicket{}},
		bpf.EgressMapRules:      {bpf.EgressPrefix{}, bpf.EgressRule{}},
		bpf.EgressMapPorts:      {bpf.EgressPortKey{}, bpf.EgressRuleFlag(0)},
	} {
		checkLayout(t, name+" key", spec.Maps[name].Key, reflect.TypeOf(entry[0]))
		checkLayout(t, name+" value", spec.Maps[name].Value, reflect.TypeOf(entry[1]))
	}
	for name, value := range map[string]any{
		bpf.EgressVarDefaultLimit: maps.LimitOf(policy.Limit{}),
		bpf.EgressVarSmtpPorts:    maps.Words{},
		bpf.EgressVarSketch:       maps.Sketch{},
		bpf.EgressVarSuspects4:    maps.Suspects{},
		bpf.EgressVarSuspects6:    maps.Suspects{},
		bpf.EgressVarPoliced:      bpf.EgressPolicedCgroup{},
	} {
		checkLayout(t, name, spec.Variables[name].Type.Type, reflect.TypeOf(value))
	}
}

// checkLayout compares the size of a type, and the names and offsets of its members.
func checkLayout(t *testing.T, path string, c btf.Type, g reflect.Type) {
	t.Helper()
	c = btf.UnderlyingType(c)
	if size, err := btf.Sizeof(c); err != nil || size != int(g.Size()) {
		t.Errorf("%s: %d bytes in C (%v), %d in Go", path, size, err, g.Size())
		return
	}
	switch c := c.(type) {
	case *btf.Array:
		if g.Kind() != reflect.Array || g.Len() != int(c.Nelems) {
			t.Errorf("%s: array of %d in C, %s in Go", path, c.Nelems, g)
			return
		}
		checkLayout(t, path+"[]", c.Type, g.Elem())
	case *btf.Struct:
		if g.Kind() != reflect.Struct {
			t.Errorf("%s: struct in C, %s in Go", path, g)
			return
		}
		fields := slices.DeleteFunc(reflect.VisibleFields(g), func(f reflect.StructField) bool { return f.Name == "_" || len(f.Index) > 1 })
		if len(fields) != len(c.Members) {
			t.Errorf("%s: %d members in C, %d in Go", path, len(c.Members), len(fields))
			return
		}
		for i, m := range c.Members {
			f := fields[i]
			if !strings.EqualFold(strings.ReplaceAll(m.Name, "_", ""), f.Name) || uintptr(m.Offset.Bytes()) != f.Offset {
				t.Errorf("%s: %s at %d in C, %s at %d in Go", path, m.Name, m.Offset.Bytes(), f.Name, f.Offset)
			}
			checkLayout(t, path+"."+m.Name, m.Type, f.Type)
		}
	}
}

// TestEnums compares the names of constants with those of the programs.
func TestEnums(t *testing.T) {
	spec := loadSpec(t)
	for name, want := range map[string][]btf.EnumValue{
		"reason": {
			{Name: "REASON_MALFORMED", Value: uint64(bpf.EgressReasonREASON_MALFORMED)},
			{Name: "REASON_BLOCKED", Value: uint64(bpf.EgressReasonREASON_BLOCKED)},
			{Name: "REASON_RATE_LIMITED", Value: uint64(bpf.EgressReasonREASON_RATE_LIMITED)},
			{Name: "REASON_NO_BUCKET", Value: uint64(bpf.EgressReasonREASON_NO_BUCKET)},
			{Name: "REASON_FAMILY", Value: uint64(bpf.EgressReasonREASON_FAMILY)},
			{Name: "REASONS", Value: uint64(bpf.EgressReasonREASONS)},
			{Name: "REASON_NONE", Value: uint64(bpf.EgressReasonREASON_NONE)},
		},
		"rule_flag": {
			{Name: "RULE_ALLOW", Value: uint64(bpf.EgressRuleFlagRULE_ALLOW)},
			{Name: "RULE_BLOCK", Value: uint64(bpf.EgressRuleFlagRULE_BLOCK)},
			{Name: "RULE_BLOCK_SOURCE", Value: uint64(bpf.EgressRuleFlagRULE_BLOCK_SOURCE)},
			{Name: "RULE_EXEMPT", Value: uint64(bpf.EgressRuleFlagRULE_EXEMPT)},
			{Name: "RULE_METADATA", Value: uint64(bpf.EgressRuleFlagRULE_METADATA)},
		},
		"container_flag": {
			{Name: "CONTAINER_METADATA", Value: uint64(maps.MayReachMetadata)},
			{Name: "CONTAINER_LIMIT_SET", Value: uint64(maps.LimitSetByHand)},
			{Name: "CONTAINER_FAMILIES", Value: uint64(maps.AnyFamily)},
		},
	} {
		var enum *btf.Enum
		if err := spec.Types.TypeByName(name, &enum); err != nil {
			t.Error(err)
		} else if !slices.Equal(enum.Values, want) {
			t.Errorf("%s: %v in C, %v in Go", name, enum.Values, want)
		}
	}
}

// TestSwitches loads the programs with each combination of the boolean constants, with a limit
// and without: the verifier sees a different program each time. Features that the kernel lacks
// stay off.
func TestSwitches(t *testing.T) {
	if err := maps.RemoveMemlock(); err != nil {
		t.Fatal(err)
	}
	var switches []string
	for name, v := range loadSpec(t).Variables {
		if v.Size() == 1 {
			switches = append(switches, name)
		}
	}
	slices.Sort(switches)
	if len(switches) == 0 {
		t.Fatal("found no switch")
	}
	missing := map[string]bool{}
	for name, probe := range map[string]error{
		bpf.EgressVarHasSetRetval:   features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval),
		bpf.EgressVarHasCoarseClock: features.HaveProgramHelper(ebpf.CGroupSKB, asm.FnKtimeGetCoarseNs),
		bpf.EgressVarHasCurrent:     features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnGetCurrentComm),
	} {
		if missing[name] = errors.Is(probe, ebpf.ErrNotSupported); probe != nil && !missing[name] {
			t.Fatal(probe)
		}
	}
	for combination := range 1 << len(switches) {
		var on []string
		for i, name := range switches {
			if combination>>i&1 == 1 {
				on = append(on, name)
			}
		}
		if slices.ContainsFunc(on, func(name string) bool { return missing[name] }) {
			continue
		}
		for _, limit := range []policy.Limit{strict, {}} {
			t.Run(fmt.Sprint(on, " ", limit.Rate), func(t *testing.T) {
				t.Parallel()
				spec := loadSpec(t)
				for _, name := range switches {
					if err := spec.Variables[name].Set(slices.Contains(on, name)); err != nil {
						t.Fatal(err)
					}
				}
				if err := spec.Variables[bpf.EgressVarDefaultLimit].Set(maps.LimitOf(limit)); err != nil {
					t.Fatal(err)
				}
				coll, err := ebpf.NewCollection(spec)
				if err != nil {
					t.Fatalf("%+v", err)
				}
				defer coll.Close()
				for name, prog := range coll.Programs {
					info, err := prog.Info()
					if err != nil {
						t.Fatal(err)
					}
					// 0 before 5.16, which does not tell.
					if n, _ := info.VerifiedInstructions(); n > facts.Ceiling {
						t.Errorf("%s: the verifier processed %d instructions, want at most %d", name, n, facts.Ceiling)
					}
				}
			})
		}
	}
}
