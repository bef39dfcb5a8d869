package prometheus

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/fakedocker"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

var (
	pictureFile = flag.String("picture", "", "draw the dashboard into this file, with more traffic")
	traffic     = flag.Duration("traffic", 0, "how long containers are refused before the dashboard is drawn")
)

func TestMain(m *testing.M) {
	lab.Main(m, nil, fmt.Sprintf("/egressbpf-prometheus-%d", os.Getpid()))
}

// hostile is a container's id as nobody should choose it: the name of its cgroup. Docker does not
// know the container. Names of Docker's containers have no such characters.
const hostile = `<script>alert("1") ' \ {{.}} $job`

// scene is a host with the service and containers that ask for what they may not.
type scene struct {
	*lab.Network
	t      *testing.T
	dir    string
	docker *fakedocker.Daemon
	agents map[string]*lab.Agent
	// outside is a process of no container, in the network of one.
	outside *lab.Agent
	id      map[string]string // by name
	// scanner is the name of the container that asks most.
	scanner string
}

const (
	serviceAt    = "127.0.0.1:9750"
	prometheusAt = "127.0.0.1:9090"
)

func newScene(t *testing.T) *scene {
	s := &scene{Network: lab.New(t), t: t, dir: t.TempDir(), agents: map[string]*lab.Agent{}, id: map[string]string{}, scanner: hostile}
	if *pictureFile != "" {
		s.scanner = "scanner"
	}
	policed := lab.Cgroup(t)
	s.docker = fakedocker.New(filepath.Join(s.dir, "docker.sock"))
	check(t, s.docker.Start())
	t.Cleanup(func() { s.docker.Stop() })
	var network *lab.Container
	for i, name := range []string{"shop", "newsletter", "build-agent", s.scanner} {
		id := strings.Repeat(fmt.Sprintf("%x9e1d4b07c2f8a56", i+1), 4)
		if name == hostile {
			id = hostile
		} else {
			s.docker.Add(id, name, nil)
		}
		cgroup := filepath.Join(policed, id)
		check(t, os.Mkdir(cgroup, 0o755))
		network = s.Container(t)
		s.agents[name], s.id[name] = network.Agent(t, cgroup), id
	}
	outside := filepath.Join(filepath.Dir(policed), "outside")
	check(t, os.MkdirAll(outside, 0o755))
	s.outside = network.Agent(t, outside)
	t.Cleanup(s.outside.End)

	config := filepath.Join(s.dir, "config.yaml")
	check(t, os.WriteFile(config, []byte("cgroups: ["+policed+"]\nhost_devices: [br0]\nsmtp: {rate: 30/minute, burst: 5}\n"), 0o600))
	return s
}

// serve runs the service until the test ends. webConfig may be empty.
func (s *scene) serve(webConfig string) {
	s.t.Helper()
	args := []string{"run", "--config", filepath.Join(s.dir, "config.yaml"), "--docker-host", "unix://" + s.docker.Socket, "--web-listen", serviceAt}
	if webConfig != "" {
		args = append(args, "--web-config-file", webConfig)
	}
	// Ends after the service.
	s.t.Cleanup(func() { s.Egressbpf(s.t, "detach") })
	s.start(exec.Command(lab.Binary(s.t), args...))
}

// start starts a server on the host. It ends before the test.
func (s *scene) start(cmd *exec.Cmd) {
	s.t.Helper()
	var log testenv.Log
	cmd.Stdout, cmd.Stderr = &log, &log
	var err error
	s.Host.Do(func() { err = cmd.Start() })
	check(s.t, err)
	s.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if s.t.Failed() {
			s.t.Logf("%s:\n%s", filepath.Base(cmd.Path), &log)
		}
	})
}

// provoke has the containers be refused until stop is called.
func (s *scene) provoke() (stop func()) {
	const pause = 100 * time.Millisecond
	metadata := netip.AddrPortFrom(lab.Metadata4, 80)
	toHost := lab.Link{Device: "eth0", Source: net.HardwareAddr{2, 0, 0, 0, 0x90, 0x99}, Gateway: net.HardwareAddr{2, 0, 0, 0, 0x90, 1}}
	packet := lab.Header{Src: netip.MustParseAddr("10.90.0.77"), Dst: lab.Metadata4, Proto: unix.IPPROTO_ICMP}.Finished(lab.Echo(false))
	ended := make(chan struct{})
	var running sync.WaitGroup
	for name, act := range map[string]func(a *lab.Agent, round int){
		"shop": func(a *lab.Agent, round int) {
			if round%20 == 0 {
				a.Connect(metadata)
			}
		},
		"newsletter": func(a *lab.Agent, round int) {
			if round%5 == 0 {
				a.ConnectAtOnce(netip.AddrPortFrom(lab.Mail4, 25), 1+round/50%3)
			}
		},
		"build-agent": func(a *lab.Agent, round int) {
			if round/80%2 == 0 {
				a.Connect(metadata)
				raw := a.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
				raw.Send(lab.Echo(false), netip.AddrPortFrom(lab.Metadata4, 0))
				raw.Close()
			}
		},
		s.scanner: func(a *lab.Agent, round int) {
			a.Connect(metadata)
			if round%10 == 0 {
				// Refused, unless this kernel lacks the defence.
				_ = a.Send("AF_PACKET", toHost, packet)
			}
			if round%10 == 5 {
				if err := s.outside.Send("AF_PACKET", toHost, packet); err != nil {
					s.t.Error(err)
				}
			}
		},
	} {
		agent := s.agents[name]
		running.Go(func() {
			for round := 0; ; round++ {
				select {
				case <-ended:
					return
				case <-time.After(pause):
					act(agent, round)
				}
			}
		})
	}
	stop = sync.OnceFunc(func() { close(ended); running.Wait() })
	s.t.Cleanup(stop)
	return stop
}

// prometheus runs the real Prometheus, which scrapes the service and loads the alerts.
func (s *scene) prometheus(scrape string) *api {
	s.t.Helper()
	rules, err := filepath.Abs(rulesFile)
	check(s.t, err)
	config := fmt.Sprintf(`
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs:
  - job_name: egressbpf
    static_configs: [{targets: [%s]}]
%s`, rules, serviceAt, scrape)
	path := filepath.Join(s.dir, "prometheus.yml")
	check(s.t, os.WriteFile(path, []byte(config), 0o600))
	promtool(s.t, "", "check", "config", path)
	s.start(exec.Command(tool(s.t, "prometheus"), "--config.file", path, "--web.listen-address", prometheusAt,
		"--storage.tsdb.path", filepath.Join(s.dir, "data"), "--log.level", "warn"))
	dial := func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		s.Host.Do(func() { c, err = new(net.Dialer).DialContext(ctx, network, addr) })
		return c, err
	}
	return &api{t: s.t, client: &http.Client{Transport: &http.Transport{DialContext: dial}, Timeout: 10 * time.Second}}
}

// api is Prometheus's HTTP API.
type api struct {
	t      *testing.T
	client *http.Client
}

// series is one of the results of a query.
type series struct {
	Metric map[string]string `json:"metric"`
	Value  sample            `json:"value"`
	Values []sample          `json:"values"`
}

type sample struct{ at, value float64 }

func (s *sample) UnmarshalJSON(text []byte) (err error) {
	var value string
	if err := json.Unmarshal(text, &[]any{&s.at, &value}); err != nil {
		return err
	}
	s.value, err = strconv.ParseFloat(value, 64)
	return err
}

// ask asks the API, and decodes the data of the answer.
func (a *api) ask(path string, parameters url.Values, data any) error {
	resp, err := a.client.Get("http://" + prometheusAt + "/api/v1/" + path + "?" + parameters.Encode())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	answer := struct {
		Status, Error string
		Warnings      []string
		Data          any
	}{Data: data}
	if err := json.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("%s: %w", body, err)
	}
	if answer.Status != "success" || len(answer.Warnings) > 0 {
		return fmt.Errorf("%s: %s %v", answer.Status, answer.Error, answer.Warnings)
	}
	return nil
}

// query asks for the result of an expression now.
func (a *api) query(expr string) (result []series, err error) {
	err = a.ask("query", url.Values{"query": {expr}}, &struct{ Result *[]series }{&result})
	return result, err
}

// over asks for the results of an expression during a time until now.
func (a *api) over(expr string, period, every time.Duration) (result []series, err error) {
	now := time.Now()
	err = a.ask("query_range", url.Values{
		"query": {expr}, "step": {fmt.Sprint(every.Seconds())},
		"start": {now.Add(-period).Format(time.RFC3339Nano)}, "end": {now.Format(time.RFC3339Nano)},
	}, &struct{ Result *[]series }{&result})
	return result, err
}

// eventually waits until nothing is wrong.
func (a *api) eventually(what string, wrong func() error) {
	a.t.Helper()
	var err error
	defer func() {
		if err != nil {
			a.t.Log(err)
		}
	}()
	testenv.Eventually(a.t, what, func() bool { err = wrong(); return err == nil })
}

// number asks for the only number that an expression results in.
func (a *api) number(expr string) (float64, error) {
	result, err := a.query(expr)
	if err == nil && len(result) != 1 {
		err = fmt.Errorf("%s: %d results", expr, len(result))
	}
	if err != nil {
		return 0, err
	}
	return result[0].Value.value, nil
}

// waitFor waits until an expression is true.
func (a *api) waitFor(expr string) {
	a.t.Helper()
	a.eventually(expr, func() error {
		result, err := a.query(expr)
		if err == nil && len(result) == 0 {
			err = errors.New("no results")
		}
		return err
	})
}

// TestScrape has the real Prometheus scrape the real service of a real filter, and asks it all
// that the dashboard and the alerts ask.
func TestScrape(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(map[bool]string{false: "plain", true: "TLS and a user"}[secure], func(t *testing.T) {
			s := newScene(t)
			var webConfig, scrape string
			if secure {
				certificate(t, s.dir)
				hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
				check(t, err)
				webConfig = filepath.Join(s.dir, "web.yml")
				check(t, os.WriteFile(webConfig, fmt.Appendf(nil, "tls_server_config: {cert_file: cert.pem, key_file: key.pem}\nbasic_auth_users: {prometheus: %s}\n", hash), 0o600))
				check(t, os.WriteFile(filepath.Join(s.dir, "password"), []byte("secret"), 0o600))
				scrape = fmt.Sprintf("    scheme: https\n    basic_auth: {username: prometheus, password_file: %[1]s/password}\n    tls_config: {ca_file: %[1]s/cert.pem}\n", s.dir)
			}
			s.serve(webConfig)
			prometheus := s.prometheus(scrape)
			prometheus.waitFor(`up{job="egressbpf"} == 1 and egressbpf_enforcing == 1`)
			stop := s.provoke()
			counters := []string{
				`egressbpf_container_refused_connects_total{reason="blocked", container="shop"}`,
				`egressbpf_container_dropped_packets_total{reason="blocked", container="build-agent"}`,
				`egressbpf_container_smtp_connections_total{verdict="rate_limited", container="newsletter"}`,
			}
			for defence, counter := range map[string]string{
				loader.SocketFamilies: "egressbpf_refused_sockets_total", loader.HostSide: "egressbpf_host_dropped_packets_total",
			} {
				// There are no results after a scrape that took too long.
				var active float64
				prometheus.eventually("defence "+defence, func() (err error) {
					active, err = prometheus.number(fmt.Sprintf("egressbpf_defence_active{defence=%q}", defence))
					return err
				})
				if active == 1 {
					counters = append(counters, counter)
				}
			}
			for _, counter := range counters {
				prometheus.waitFor("rate(" + counter + "[5s]) > 0")
			}
			s.checkMetrics()
			s.checkAlerts(prometheus)
			b := readDashboard(t)
			period := time.Minute
			if *traffic > 0 && !secure {
				period = *traffic
				time.Sleep(period)
			}
			answers := s.checkDashboard(b, prometheus, period)
			stop()
			if picture := b.draw(answers, period); *pictureFile != "" && !secure {
				check(t, os.WriteFile(*pictureFile, picture, 0o644))
			} else {
				checkPicture(t, picture)
			}
		})
	}
}

// checkMetrics has promtool judge what the command prints.
func (s *scene) checkMetrics() {
	s.t.Helper()
	text := s.Egressbpf(s.t, "--docker-host", "unix://"+s.docker.Socket, "stats", "--output", "prometheus")
	if !strings.Contains(text, `container="newsletter"`) {
		s.t.Errorf("no names in\n%s", text)
	}
	if complaints := promtool(s.t, text, "check", "metrics"); complaints != "" {
		s.t.Error(complaints)
	}
}

// checkAlerts runs each alert's expression, and looks at how the alerts that come are told.
func (s *scene) checkAlerts(prometheus *api) {
	s.t.Helper()
	coming := map[string]bool{"EgressbpfBlockedAttempts": true, "EgressbpfContainerKeepsAsking": true, "EgressbpfMailLimited": true}
	// Not every kernel can have all defences.
	var missing float64
	prometheus.eventually("defences", func() (err error) {
		missing, err = prometheus.number("sum(egressbpf_defence_active == bool 0)")
		return err
	})
	coming["EgressbpfDefenceMissing"] = missing > 0
	for _, r := range readRules(s.t) {
		if coming[r.Alert] {
			prometheus.waitFor(r.Expr)
			continue
		}
		prometheus.eventually("not "+r.Alert, func() error {
			result, err := prometheus.query(r.Expr)
			// There may be containers on this machine that are not the test's.
			if err == nil && len(result) > 0 && r.Alert != "EgressbpfUncoveredContainers" {
				err = fmt.Errorf("%s: %v", r.Expr, result)
			}
			return err
		})
	}
	type alert struct {
		Labels, Annotations map[string]string
		State               string
	}
	var alerts struct{ Alerts []alert }
	find := func(name, id string) (alert, bool) {
		i := slices.IndexFunc(alerts.Alerts, func(a alert) bool {
			return a.Labels["alertname"] == name && a.Labels["id"] == id
		})
		if i < 0 {
			return alert{}, false
		}
		return alerts.Alerts[i], true
	}
	testenv.Eventually(s.t, "all alerts that should come", func() bool {
		alerts.Alerts = nil // else what is decoded is merged with it
		err := prometheus.ask("alerts", nil, &alerts)
		note, noted := find("EgressbpfBlockedAttempts", "")
		_, asks := find("EgressbpfContainerKeepsAsking", s.id[s.scanner])
		_, mails := find("EgressbpfMailLimited", s.id["newsletter"])
		return err == nil && noted && note.State == "firing" && asks && mails
	})
	asks, _ := find("EgressbpfContainerKeepsAsking", s.id[s.scanner])
	if want := strconv.Quote(s.scanner); !strings.Contains(asks.Annotations["summary"], want) || !strings.Contains(asks.Annotations["description"], want) || asks.State != "pending" {
		s.t.Errorf("got %+v, want it to be pending, and to tell of %s", asks, want)
	}
	if limited, _ := find("EgressbpfMailLimited", s.id["newsletter"]); limited.State != "pending" || !strings.Contains(limited.Annotations["summary"], `"newsletter"`) {
		s.t.Errorf("got %+v, want it to be pending, and to tell of newsletter", limited)
	}
	var groups struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError string }
		}
	}
	check(s.t, prometheus.ask("rules", nil, &groups))
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			if r.Health != "ok" || r.LastError != "" {
				s.t.Errorf("%s: %s, %s", r.Name, r.Health, r.LastError)
			}
		}
	}
}

// answers are the results of a panel's queries, by panel and refId.
type answers map[int]map[string][]series

// checkDashboard runs each of the dashboard's queries, as Grafana would.
func (s *scene) checkDashboard(b board, prometheus *api, period time.Duration) answers {
	s.t.Helper()
	const rateInterval = "5s"
	variables := b.variables("egressbpf", rateInterval, fmt.Sprintf("%ds", int(period.Seconds())))
	known := map[string]float64{
		"Hosts in force": 1, "Hosts not in force": 0, "Hosts in mode audit": 0, "Targets down": 0, "Policed containers": 4, "Policies refused": 0,
	}
	all := answers{}
	for _, p := range b.Panels {
		all[p.ID] = map[string][]series{}
		for _, q := range p.Targets {
			expr := variables.Replace(q.Expr)
			if strings.Contains(expr, "$") && !strings.Contains(expr, `"$1"`) {
				s.t.Errorf("panel %q: a variable is left in %s", p.Title, expr)
			}
			told := p.Title != "Events lost or left out" || s.tellsOfEvents(prometheus)
			var result []series
			prometheus.eventually(fmt.Sprintf("panel %q, %s", p.Title, q.RefID), func() (err error) {
				if q.Instant {
					result, err = prometheus.query(expr)
				} else {
					result, err = prometheus.over(expr, period, period/120)
				}
				if err == nil && told && len(result) == 0 {
					err = errors.New("no data for " + expr)
				}
				if want, ok := known[p.Title]; ok && err == nil && result[0].Value.value != want {
					err = fmt.Errorf("got %v, want %v for %s", result[0].Value.value, want, expr)
				}
				return err
			})
			all[p.ID][q.RefID] = result
		}
	}
	for _, v := range b.Templating.List {
		if v.Type != "query" {
			continue
		}
		metric, label, _ := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(v.Definition, "label_values("), ")"), ", "+v.Name)
		if label != "" {
			s.t.Errorf("variable %s: %s", v.Name, v.Definition)
		}
		var values []string
		err := prometheus.ask("label/"+v.Name+"/values", url.Values{"match[]": {variables.Replace(metric)}}, &values)
		if err != nil || len(values) == 0 || v.Name == "container" && !slices.Contains(values, "newsletter") {
			s.t.Errorf("variable %s: %v, %v", v.Name, values, err)
		}
	}
	return all
}

// tellsOfEvents says whether the service counts events.
func (s *scene) tellsOfEvents(prometheus *api) bool {
	s.t.Helper()
	result, err := prometheus.query("egressbpf_events_suppressed_total")
	check(s.t, err)
	return len(result) > 0
}

// certificate writes cert.pem and key.pem.
func certificate(t *testing.T, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	host, _, err := net.SplitHostPort(serviceAt)
	check(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "egressbpf"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP(host)}, IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	check(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	check(t, err)
	for name, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: cert}, "key.pem": {Type: "PRIVATE KEY", Bytes: der}} {
		check(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600))
	}
}
