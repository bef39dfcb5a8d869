package prometheus

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

const dashboardFile = "../../../dist/grafana/egressbpf.json"

// board is what the tests need of Grafana's dashboards.
type board struct {
	Title         string `json:"title"`
	SchemaVersion int    `json:"schemaVersion"`
	Editable      bool   `json:"editable"`
	Templating    struct {
		List []variable `json:"list"`
	} `json:"templating"`
	Panels []panel `json:"panels"`
}

type datasource struct {
	Type string `json:"type"`
	UID  string `json:"uid"`
}

type variable struct {
	Name       string     `json:"name"`
	Label      string     `json:"label"`
	Type       string     `json:"type"`
	Datasource datasource `json:"datasource"`
	Multi      bool       `json:"multi"`
	IncludeAll bool       `json:"includeAll"`
	AllValue   string     `json:"allValue"`
	Refresh    int        `json:"refresh"`
	Definition string     `json:"definition"`
}

type panel struct {
	ID          int        `json:"id"`
	Type        string     `json:"type"`
	Title       string     `json:"title"`
	Description string     `json:"description"`
	Datasource  datasource `json:"datasource"`
	Targets     []target   `json:"targets"`
	GridPos     struct {
		X, Y, W, H int
	} `json:"gridPos"`
	FieldConfig struct {
		Defaults struct {
			Unit       string   `json:"unit"`
			Decimals   *int     `json:"decimals"`
			Max        *float64 `json:"max"`
			Thresholds struct {
				Steps []step `json:"steps"`
			} `json:"thresholds"`
			Custom struct {
				Stacking struct {
					Mode string `json:"mode"`
				} `json:"stacking"`
			} `json:"custom"`
		} `json:"defaults"`
		Overrides []struct {
			Matcher struct {
				ID      string `json:"id"`
				Options string `json:"options"`
			} `json:"matcher"`
			Properties []struct {
				ID    string          `json:"id"`
				Value json.RawMessage `json:"value"`
			} `json:"properties"`
		} `json:"overrides"`
	} `json:"fieldConfig"`
	Transformations []struct {
		ID      string `json:"id"`
		Options struct {
			ByField       string            `json:"byField"`
			ExcludeByName map[string]bool   `json:"excludeByName"`
			IndexByName   map[string]int    `json:"indexByName"`
			RenameByName  map[string]string `json:"renameByName"`
		} `json:"options"`
	} `json:"transformations"`
}

type step struct {
	Color string   `json:"color"`
	Value *float64 `json:"value"`
}

type target struct {
	Datasource   datasource `json:"datasource"`
	Expr         string     `json:"expr"`
	RefID        string     `json:"refId"`
	Instant      bool       `json:"instant"`
	LegendFormat string     `json:"legendFormat"`
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func readDashboard(t testing.TB) (b board) {
	t.Helper()
	text, err := os.ReadFile(dashboardFile)
	check(t, err)
	check(t, json.Unmarshal(text, &b))
	return b
}

// variables has what Grafana would put in place of the dashboard's variables. A variable with
// all values selected becomes its allValue.
func (b board) variables(job string, rateInterval, period string) *strings.Replacer {
	all := []string{"$__rate_interval", rateInterval, "$__range", period, "$job", job}
	for _, v := range b.Templating.List {
		if v.IncludeAll && v.Name != "job" {
			all = append(all, "$"+v.Name, v.AllValue)
		}
	}
	return strings.NewReplacer(all...)
}

// deprecated are panels that Grafana has replaced by others.
var deprecated = []string{"graph", "singlestat", "table-old", "grafana-piechart-panel", "grafana-worldmap-panel", "natel-discrete-panel"}

var (
	// ofGrafana are the ids of units that the dashboard may use.
	ofGrafana = []string{"short", "percentunit", "pps", "cps", "Bps"}
	// A selector is a metric's name with matchers, and perhaps a range.
	selector  = regexp.MustCompile(`\b(egressbpf_\w+|up)\b(\{[^}]*\})?(\[[^\]]*\])?`)
	variables = regexp.MustCompile(`\$\{?([a-z_]+)`)
)

// TestDashboard checks what Grafana demands of a dashboard, and what makes one useful: the rules
// of Grafana's own linter for dashboards, without exception.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile(dashboardFile)
	check(t, err)
	plugins.RegisterDefaultPlugins()
	//lint:ignore SA1019 The newer schema is only for newer versions of Grafana.
	var strict dashboard.Dashboard
	// It returns an empty list instead of nil.
	if err := strict.UnmarshalJSONStrict(text); err != nil && err.Error() != "" {
		t.Errorf("not of Grafana's schema: %v", err)
	}
	if err := strict.Validate(); err != nil {
		t.Errorf("not of Grafana's schema: %v", err)
	}

	b := readDashboard(t)
	if b.SchemaVersion != 42 || b.Editable {
		t.Errorf("schema version %d, editable %v, want 42 and not editable: users change a copy", b.SchemaVersion, b.Editable)
	}
	known := []string{"__rate_interval", "__range"}
	for _, v := range b.Templating.List {
		known = append(known, v.Name)
		switch v.Type {
		case "datasource":
			if v.Name != "datasource" || v.Label != "Data source" {
				t.Errorf("variable %s with the label %s: want datasource, Data source", v.Name, v.Label)
			}
		case "query":
			if v.Label != strings.ToUpper(v.Name[:1])+v.Name[1:] || v.Datasource.UID != "${datasource}" || !v.Multi || !v.IncludeAll || v.Refresh != 2 || v.AllValue != ".+" && v.AllValue != ".*" {
				t.Errorf("variable %s: %+v", v.Name, v)
			}
			if !regexp.MustCompile(`^label_values\(egressbpf_\w+(\{.*\})?, ` + v.Name + `\)$`).MatchString(v.Definition) {
				t.Errorf("variable %s: query %s", v.Name, v.Definition)
			}
		default:
			t.Errorf("variable %s: type %s", v.Name, v.Type)
		}
	}
	for _, want := range []string{"datasource", "job", "instance", "container"} {
		if !slices.Contains(known, want) {
			t.Errorf("there is no variable %s", want)
		}
	}

	ids, titles := map[int]bool{}, map[string]bool{}
	taken := map[[2]int]string{}
	for _, p := range b.Panels {
		if ids[p.ID] || titles[p.Title] || p.Title == "" {
			t.Errorf("panel %d, %q: want an id and a title of its own", p.ID, p.Title)
		}
		ids[p.ID], titles[p.Title] = true, true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("panel %q is outside of the page or on panel %q", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if slices.Contains(deprecated, p.Type) || p.Description == "" || p.Datasource.UID != "${datasource}" || len(p.Targets) == 0 {
			t.Errorf("panel %q: type %s, description %q, data source %s, %d queries", p.Title, p.Type, p.Description, p.Datasource.UID, len(p.Targets))
		}
		if unit := p.FieldConfig.Defaults.Unit; !slices.Contains(ofGrafana, unit) {
			t.Errorf("panel %q: unit %q", p.Title, unit)
		}
		refs := map[string]bool{}
		for _, q := range p.Targets {
			if refs[q.RefID] || q.Datasource.UID != "${datasource}" {
				t.Errorf("panel %q: query %q, data source %s", p.Title, q.RefID, q.Datasource.UID)
			}
			refs[q.RefID] = true
			for _, v := range variables.FindAllStringSubmatch(q.Expr, -1) {
				if !slices.Contains(known, v[1]) {
					t.Errorf("panel %q: there is no variable %s", p.Title, v[1])
				}
			}
			for _, s := range selector.FindAllStringSubmatch(q.Expr, -1) {
				name, matchers, rng := s[1], s[2], s[3]
				want := []string{`job=~"$job"`, `instance=~"$instance"`}
				if strings.HasPrefix(name, "egressbpf_container_") {
					want = append(want, `container=~"$container"`)
				}
				for _, m := range want {
					if !strings.Contains(matchers, m) {
						t.Errorf("panel %q: %s is not selected by %s", p.Title, name, m)
					}
				}
				if strings.HasSuffix(name, "_total") && !regexp.MustCompile(`rate\(`+regexp.QuoteMeta(s[0])+`|increase\(`+regexp.QuoteMeta(s[0])).MatchString(q.Expr) {
					t.Errorf("panel %q: the counter %s is shown as it is", p.Title, name)
				}
				if rng != "" && rng != "[$__rate_interval]" && rng != "[$__range]" || strings.Contains(q.Expr, "rate("+s[0]) && rng != "[$__rate_interval]" {
					t.Errorf("panel %q: the range %s of %s is fixed", p.Title, rng, name)
				}
			}
		}
	}
}

// documented are the metrics that there are, with their labels.
func documented(t *testing.T) map[string][]string {
	t.Helper()
	page, err := os.ReadFile("../../../docs/metrics.md")
	check(t, err)
	all := map[string][]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(egressbpf_\\w+)(?:\\{([\\w,]+)\\})?` \\|").FindAllStringSubmatch(string(page), -1) {
		all[row[1]] = strings.Split(row[2], ",")
	}
	if len(all) < 20 {
		t.Fatalf("docs/metrics.md has only %d metrics", len(all))
	}
	return all
}

// TestNames looks for metrics and labels that there are not, of which a query would say nothing.
func TestNames(t *testing.T) {
	metrics := documented(t)
	queries := map[string]string{}
	for _, p := range readDashboard(t).Panels {
		for _, q := range p.Targets {
			queries[fmt.Sprintf("panel %q, %s", p.Title, q.RefID)] = q.Expr
		}
	}
	for _, v := range readDashboard(t).Templating.List {
		queries["variable "+v.Name] = v.Definition
	}
	for _, a := range readRules(t) {
		queries["alert "+a.Alert] = a.Expr
	}
	used := map[string]bool{}
	for what, expr := range queries {
		for _, s := range selector.FindAllStringSubmatch(expr, -1) {
			used[s[1]] = true
			labels, ok := metrics[s[1]]
			if !ok && s[1] != "up" {
				t.Errorf("%s: there is no metric %s", what, s[1])
			}
			for _, m := range regexp.MustCompile(`(\w+)=`).FindAllStringSubmatch(s[2], -1) {
				if !slices.Contains(append(labels, "job", "instance"), m[1]) {
					t.Errorf("%s: %s has no label %s", what, s[1], m[1])
				}
			}
		}
	}
	for name := range metrics {
		// The rest is for people: one picks a container's image or the time of a reload.
		forPeople := []string{"egressbpf_policy_reload_timestamp_seconds", "egressbpf_container_dropped_bytes_total"}
		if !used[name] && !slices.Contains(forPeople, name) {
			t.Errorf("neither the dashboard nor an alert uses %s", name)
		}
	}
}
