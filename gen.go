// Package egressbpf stops containers from reaching cloud metadata services and
// from sending spam, with eBPF programs on their parent cgroup.
//
// The programs are C in bpf/; this file turns them into the committed objects
// and Go types beside them. Building the command needs neither.
package egressbpf

//go:generate -command compile go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -go-package bpf -output-dir bpf
//go:generate compile -type reason -type drops -type traffic -type counters -type sums -type bucket -type container -type device -type container_flag -type without_state -type rule_flag -type prefix -type rule -type port_key -type ticket -type announcement -type mail_key -type opening -type permit -type pod -type flow_key -type hook -type event -type audience -type telling -type seen_key -type sighting Egress bpf/egress.bpf.c -- -std=gnu17 -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
//go:generate compile -no-global-types -type scope_kind -type scope -type name_key -type past Cgroups bpf/cgroups.bpf.c -- -std=gnu17 -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
//go:generate compile -no-global-types Families bpf/families.bpf.c -- -std=gnu17 -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
//go:generate compile -no-global-types -type device_name Host bpf/host.bpf.c -- -std=gnu17 -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
//go:generate compile -no-global-types Tc bpf/tc.bpf.c -- -std=gnu17 -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
//go:generate compile -no-global-types -type request -type cargo Control bpf/control.bpf.c -- -std=gnu17 -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
//go:generate compile -no-global-types Tunnels bpf/tunnels.bpf.c -- -std=gnu17 -O2 -g -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
