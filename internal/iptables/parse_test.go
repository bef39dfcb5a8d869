package iptables

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/policy"
)

// Each of these spellings says the same.
func TestSpellings(t *testing.T) {
	for name, spellings := range map[string][]string{
		"metadata": {
			"-A DOCKER-USER -d 169.254.169.254/32 -j DROP",
			"-A DOCKER-USER -d 169.254.169.254 -j DROP",
			"--append DOCKER-USER --destination 169.254.169.254/255.255.255.255 --jump DROP",
			"[12:720] -A DOCKER-USER --dst 169.254.169.254/32 -c 1 2 -j REJECT --reject-with icmp-admin-prohibited",
			"-A DOCKER-USER -p all -m iprange --dst-range 169.254.169.254-169.254.169.254 -j DROP",
			"-A DOCKER-USER -j DROP -d 169.254.169.254",
			`-A DOCKER-USER -m comment --comment "-j ACCEPT \"always\"" -d 169.254.169.254/32 -j DROP`,
			"-A DOCKER-USER -m comment --comment -j -d 169.254.169.254/32 -j DROP",
			"-A DOCKER-USER -i docker0 -d 169.254.169.254/32 ! -o docker0 -j DROP",
			"-A DOCKER-USER -s 0.0.0.0/0 -d 169.254.169.254/32 -i + -j DROP",
			"-I DOCKER-USER -d 169.254.169.254/32 -m conntrack --ctstate NEW -j DROP",
			"-N META\n-A DOCKER-USER -g META\n-A META -d 169.254.169.254/32 -j DROP",
			"-A FORWARD -d 169.254.169.254/32 -j DROP\n-A DOCKER-USER -j RETURN",
			"-A DOCKER-USER -j RETURN\n-I DOCKER-USER 1 -d 169.254.169.254/32 -j DROP",
			"COMMIT\n*raw\n-A PREROUTING -d 169.254.169.254/32 -j DROP",
		},
		"mail": {
			"-A DOCKER-USER -p tcp -m tcp --dport 25 --tcp-flags FIN,SYN,RST,ACK SYN -m limit --limit 5/min -j RETURN\n-A DOCKER-USER -p tcp -m tcp --dport 25 -j DROP",
			"-A DOCKER-USER -p tcp --syn --dport 25 -m limit --limit 5/minute --limit-burst 5 -j ACCEPT\n-A DOCKER-USER -p tcp --dport 25 -j DROP",
			"-A DOCKER-USER --protocol 6 --syn --destination-port smtp -m limit --limit 5/m -j ACCEPT\n-A DOCKER-USER -p tcp -m multiport --dports 25:25 -j DROP",
			"-A DOCKER-USER -p tcp -m state --state NEW --dport 25 -m hashlimit --hashlimit 5/min --hashlimit-mode srcip --hashlimit-name x -j RETURN\n-A DOCKER-USER -p tcp --dport 25 -j DROP",
			"-A DOCKER-USER -p tcp --tcp-flags SYN,ACK SYN --dport 25 -m hashlimit --hashlimit-above 5/min --hashlimit-mode srcip --hashlimit-name x -j DROP",
			"-A DOCKER-USER -p tcp -m conntrack --ctstate NEW --dport 25 -m hashlimit ! --hashlimit-upto 5/min --hashlimit-mode srcip --hashlimit-name x -j DROP",
			"-N M\n-A DOCKER-USER -p tcp --dport 25 --syn -j M\n-A M -m limit --limit 5/min -j RETURN\n-A M -j DROP",
			"-N M\n-A DOCKER-USER -p tcp --dport 25 -j M\n-A M -m conntrack --ctstate ESTABLISHED -j ACCEPT\n-A M -m limit --limit 5/min -g M2\n-A M -j DROP\n-A M2 -j RETURN\n-N M2",
			"-A DOCKER-USER -p tcp --dport 25 ! --syn -j RETURN\n-A DOCKER-USER -p tcp --dport 25 -m limit --limit 5/min -j RETURN\n-A DOCKER-USER -p tcp --dport 25 -j DROP",
			"-A DOCKER-USER -p tcp --dport 25 --syn -m recent --set --name x\n-A DOCKER-USER -p tcp --dport 25 --syn -m recent --rcheck --name x --seconds 60 --hitcount 6 -j DROP",
		},
	} {
		var want policy.Config
		for i, text := range spellings {
			r, err := Translate(Source{Name: "dump", Text: "*filter\n:FORWARD ACCEPT [0:0]\n:DOCKER-USER - [0:0]\n-A FORWARD -j DOCKER-USER\n" + strings.TrimSuffix(text, "\nCOMMIT") + "\nCOMMIT\n"})
			if err != nil {
				t.Errorf("%s: %v", text, err)
				continue
			}
			if i == 0 {
				want = r.Config
			}
			// What a limit's DROP and a block's REJECT differ in is not the point here.
			if !reflect.DeepEqual(r.Config, want) {
				t.Errorf("%s %s:\ngot %s\nwant %s\n%v", name, text, r.Config.YAML(nil), want.YAML(nil), r.Notes)
			}
			for _, n := range r.Notes {
				if n.Kind == Unknown {
					t.Errorf("%s: %s", text, n)
				}
			}
		}
	}
}

func TestSplit(t *testing.T) {
	for in, want := range map[string][]string{
		`a  b	c`:                  {"a", "b", "c"},
		`"a b" 'c "d"' e"f g"h`:   {"a b", `c "d"`, "ef gh"},
		`"it\'s \"q\" \\ \x" \n`:  {`it's "q" \ x`, `\n`},
		`"" x ''`:                 {"", "x", ""},
		``:                        nil,
		`-m comment --comment ""`: {"-m", "comment", "--comment", ""},
	} {
		got, err := split(in)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: got %q, %v, want %q", in, got, err, want)
		}
	}
	for _, in := range []string{`"`, `a 'b`, `"a\"`} {
		if got, err := split(in); err == nil {
			t.Errorf("%s: got %q, want an error", in, got)
		}
	}
}

func TestNetworks(t *testing.T) {
	for in, want := range map[string]string{
		"1.2.3.4": "1.2.3.4/32", "1.2.3.4/8": "1.0.0.0/8", "1.2.3.4/255.255.0.0": "1.2.0.0/16", "1.2.3.4/0.0.0.0": "0.0.0.0/0",
		"fd00::1": "fd00::1/128", "fd00::1/ffff::": "fd00::/16", "::/0": "::/0",
		"1.2.3.4/255.0.255.0": "", "1.2.3.4/33": "", "1.2.3.4/-1": "", "example.com": "", "1.2.3.4/ffff::": "", "fe80::1%eth0": "", "": "", "1.2.3.4/0.255.0.0": "",
	} {
		got, err := network(in)
		if want == "" && err == nil || want != "" && (err != nil || got.String() != want) {
			t.Errorf("%s: got %v, %v, want %q", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"10.0.0.1-10.0.0.6": "[10.0.0.1/32 10.0.0.2/31 10.0.0.4/31 10.0.0.6/32]", "0.0.0.0-255.255.255.255": "[0.0.0.0/0]",
		"255.255.255.255-255.255.255.255": "[255.255.255.255/32]", "fd00::-fd00::ff": "[fd00::/120]",
		"10.0.0.2-10.0.0.1": "[]", "10.0.0.1-fd00::1": "[]", "x-y": "[]", "10.0.0.1-": "[]",
	} {
		got, err := addressRange(in)
		if fmt.Sprint(got) != want || (err != nil) != (want == "[]") {
			t.Errorf("%s: got %v, %v, want %s", in, got, err, want)
		}
		for _, p := range got {
			if p != netip.PrefixFrom(p.Addr(), p.Bits()).Masked() {
				t.Errorf("%s: %s has host bits", in, p)
			}
		}
	}
}

func TestRates(t *testing.T) {
	for in, want := range map[string]string{
		"5/min": "5/minute", "5/minute": "5/minute", "5/m": "5/minute", "300/hour": "300/hour", "7/sec": "7/second", "7": "7/second",
		"1/day": "1/day", "1/d": "1/day", "2/H": "2/hour",
		"0/min": "", "5/fortnight": "", "512kb/s": "", "-1/min": "", "5/": "", "": "", "9999999/sec": "",
	} {
		got, ok := parseRate(in)
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: got %v, %v, want %s", in, got, ok, want)
		}
	}
}

// What is not a limit of new mail connections, or depends on what a policy cannot
// say, is named and stops nothing.
func TestNotCarriedOver(t *testing.T) {
	for rule, want := range map[string]string{
		"-p tcp --dport 25 -m connlimit --connlimit-above 5 -j DROP":                                                 "--connlimit-above 5",
		"-p tcp --dport 25 -m set --match-set bad dst -j DROP":                                                       "ipset",
		"-m set --match-set cloud dst -j DROP":                                                                       "ipset",
		"-s 172.17.0.5 -p tcp --dport 25 -j DROP":                                                                    "-s 172.17.0.5",
		"-p tcp --dport 80 -m limit --limit 5/min -j DROP":                                                           "what is within the limit",
		"-p tcp --dport 80 -m hashlimit --hashlimit-above 5/min --hashlimit-mode srcip --hashlimit-name x -j DROP":   "only new mail",
		"-d 127.0.0.0/8 -j DROP":                                                                                     "does not forward",
		"-d 224.0.0.0/4 -j DROP":                                                                                     "does not forward",
		"-p tcp --dport 25 -m hashlimit --hashlimit-above 512kb/s --hashlimit-mode srcip --hashlimit-name x -j DROP": "--hashlimit-above 512kb/s",
		"-p tcp --dport 25 -m recent --update --name x --hitcount 5 -j DROP":                                         "-m recent --update",
		"-p tcp --sport 25 -j DROP":                                                                                  "--sport 25",
		"-p tcp --dport 25 -m time --timestart 01:00 -j DROP":                                                        "--timestart 01:00",
		"-i eth0 -p tcp --dport 25 -j DROP":                                                                          "comes in from eth0",
		"-s 203.0.113.9 -p tcp --dport 25 -j DROP":                                                                   "203.0.113.9",
		"-p tcp --dport 25 -m conntrack --ctstate INVALID -j DROP":                                                   "connections that exist",
		"-p tcp -m multiport --dports 1:65535 -j DROP":                                                               "256 ports",
		"-p udp --dport 25 -j DROP":                                                                                  "names no destination",
		"-j REJECT":                                                                                                  "names no destination",
		"-d 1.2.3.4 -j NFQUEUE --queue-num 1":                                                                        "target NFQUEUE",
		"-d 1.2.3.4 -j TARPIT":                                                                                       "target TARPIT",
		"-d 1.2.3.4 -j NOCHAIN":                                                                                      "target NOCHAIN",
		"-d 1.2.3.4":                                                                                                 "no target",
		"-p tcp --dport 25 -m limit --limit 5/min -j RETURN":                                                         "over the limit",
		"-d 169.254.169.254 -j ACCEPT":                                                                               "nothing that the policy stops",
		"-d 169.254.169.254 -p tcp -p udp -j LOG":                                                                    "log",
	} {
		r, err := Translate(Source{Name: "dump", Text: "*filter\n:DOCKER-USER - [0:0]\n-A DOCKER-USER " + rule + "\nCOMMIT\n"})
		if err != ErrNothing {
			t.Errorf("%s: got %v, want ErrNothing\n%s", rule, err, r.Config.YAML(nil))
			continue
		}
		if !slices.ContainsFunc(r.Notes, func(n Note) bool {
			return n.Line == 3 && (n.Kind == NotCarried || n.Kind == Unknown) && strings.Contains(n.Text, want)
		}) {
			t.Errorf("%s: %q is not in %v", rule, want, r.Notes)
		}
	}
}
