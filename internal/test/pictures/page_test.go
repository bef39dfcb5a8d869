package main

import (
	"fmt"
	"image/png"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/web"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && slices.Contains([]string{web.ServeArg, topArg}, os.Args[1]) {
		main()
		return
	}
	os.Exit(m.Run())
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open opens a page in a browser of its own.
func open(t *testing.T, page web.Page, recent *web.Recent, before ...step) *browser {
	t.Helper()
	url, stop, err := serve(t.Context(), func() web.Page { return page }, recent)
	check(t, err)
	t.Cleanup(stop)
	b, close, err := newBrowser(t.Context())
	check(t, err)
	t.Cleanup(close)
	t.Cleanup(func() {
		if text := b.complained(); text != "" {
			t.Errorf("the browser complains:\n%s", text)
		}
	})
	check(t, b.run(append(before, chromedp.Navigate(url))...))
	return b
}

// value returns the value of an expression in JavaScript.
func value[V any](t *testing.T, b *browser, expression string) (v V) {
	t.Helper()
	v, err := chromedp.Run(b.ctx, chromedp.Evaluate[V](expression))
	check(t, err)
	return v
}

// scripts turns JavaScript on or off.
func scripts(on bool) step {
	return command(emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: !on})
}

const live = `document.getElementById("live").textContent == "live"`

// hostile are names that somebody could give to a container, an image or a process.
var hostile = []string{
	`<img src=x onerror="document.title='owned'">`, `<script>document.title='owned'</script>`, `"><b>'`, "a\nb\r\x00\x1b[2J", "invalid\xff\xfe",
	strings.Repeat("W", 255), strings.Repeat("ü", 127), "\u202egnp.exe", "</title></bdi></table>", "javascript:alert(1)", "&lt;",
}

// hostilePage has them everywhere.
func hostilePage() (web.Page, []events.Record) {
	p := page()
	p.Rows, p.Why, p.Node, p.InForce = nil, hostile, hostile[0], false
	var all []events.Record
	for i, name := range hostile {
		p.Rows = append(p.Rows, web.Row{ID: id(i), Name: name, Image: name, Limit: name})
		p.Defences = append(p.Defences, web.Defence{Name: name, Reason: name})
		r := refusal(0, 0, name, name, name, name, "[fd00:ec2::254]:80")
		r.Container.Name = name
		all = append(all, r)
	}
	p.Containers = len(p.Rows)
	return p, all
}

// Nothing is wider than the screen, whatever it shows.
func TestScreens(t *testing.T) {
	bad, badRecords := hostilePage()
	for what, tt := range map[string]struct {
		page    web.Page
		records []events.Record
	}{"usual": {page(), records()}, "hostile": {bad, badRecords}} {
		for _, screen := range screens {
			var recent web.Recent
			for _, r := range tt.records {
				recent.Add(r)
			}
			b := open(t, tt.page, &recent, chromedp.EmulateViewport(screen.width, screen.height, screen.options...))
			for _, scheme := range []string{"light", "dark"} {
				check(t, b.run(prefers(scheme), shows(live), shows(fmt.Sprintf(`document.querySelectorAll("#records li").length == %d`, len(tt.records)))))
				if scroll, client := value[int](t, b, "document.documentElement.scrollWidth"), value[int](t, b, "document.documentElement.clientWidth"); scroll > client || int64(client) != screen.width {
					t.Errorf("%s, %s: the page is %d wide, the screen %d", what, screen.name, scroll, client)
				}
				dark := value[string](t, b, `getComputedStyle(document.body).backgroundColor`) == "rgb(20, 23, 28)"
				if dark != (scheme == "dark") {
					t.Errorf("%s, %s: dark %v", screen.name, scheme, dark)
				}
			}
		}
	}
}

// Names are shown as they are, and nothing in them runs.
func TestHostileNames(t *testing.T) {
	p, all := hostilePage()
	for _, script := range []bool{true, false} {
		var recent web.Recent
		for _, r := range all {
			recent.Add(r)
		}
		b := open(t, p, &recent, scripts(script))
		if script {
			check(t, b.run(shows(live), shows(fmt.Sprintf(`document.querySelectorAll("#records li").length == %d`, len(all)))))
		}
		check(t, b.run(scripts(true)))
		if title := value[string](t, b, "document.title"); strings.Contains(title, "owned") && !strings.Contains(title, "onerror") {
			t.Errorf("a script has run: title %q", title)
		}
		if n := value[int](t, b, `document.querySelectorAll("img, table b, [onerror], script:not([src])").length`); n != 0 {
			t.Errorf("script %v: %d elements come from names", script, n)
		}
		for at, of := range map[string]string{"#rows th > bdi": "containers", "#records b": "records", "#why li": "reasons"} {
			got := value[[]string](t, b, fmt.Sprintf(`[...document.querySelectorAll(%q)].map(e => e.textContent)`, at))
			for _, name := range hostile {
				want := string([]rune(name)) // each byte that is not UTF-8 is replaced
				if !script {                 // HTML has no NUL, nor CR
					want = strings.NewReplacer("\x00", "\uFFFD", "\r", "\n").Replace(want)
				}
				found := false
				for _, text := range got {
					found = found || text == want
				}
				if !found {
					t.Errorf("script %v: %q is not among the %s %q", script, want, of, got)
				}
			}
		}
	}
}

// What happens while the page is open appears on it.
func TestLive(t *testing.T) {
	var recent web.Recent
	b := open(t, page(), &recent)
	check(t, b.run(shows(live)))
	recent.Add(refusal(0, 0, "curl", events.HookConnect, events.ReasonBlocked, "preset aws", "169.254.169.254:80"))
	check(t, b.run(shows(`document.querySelector("#records li:first-child")?.textContent.includes("curl (4711): connect tcp to 169.254.169.254:80 · blocked by preset aws")`)))
	for range 100 {
		recent.Add(refusal(1, 0, "sendmail", events.HookPacket, events.ReasonRateLimited, "", "192.0.2.25:25"))
	}
	check(t, b.run(shows(`document.querySelectorAll("#records li").length == 50 && !document.getElementById("records").textContent.includes("curl")`)))
}

// The page does without JavaScript.
func TestNoScript(t *testing.T) {
	var recent web.Recent
	for _, r := range records() {
		recent.Add(r)
	}
	b := open(t, page(), &recent, scripts(false))
	text, err := chromedp.Run(b.ctx, chromedp.Text("body"))
	check(t, err)
	refresh, err := chromedp.Run(b.ctx, chromedp.AttributeValue(`meta[http-equiv="refresh"]`, "content"))
	check(t, err)
	for _, want := range []string{"In force", "ci-runner-3", "1204", "curl (4702): connect tcp to 169.254.169.254:80", "387 more refusals"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in %s", want, text)
		}
	}
	if refresh.Value != "10" {
		t.Errorf("it loads again after %q s", refresh.Value)
	}
}

func TestPictures(t *testing.T) {
	dir := t.TempDir()
	check(t, drawPage(t.Context(), dir))
	for _, screen := range screens {
		file, err := os.Open(filepath.Join(dir, "page-"+screen.name+".png"))
		check(t, err)
		defer file.Close()
		picture, err := png.DecodeConfig(file)
		check(t, err)
		if int64(picture.Width)*screen.height != int64(picture.Height)*screen.width {
			t.Errorf("%s: %d by %d", screen.name, picture.Width, picture.Height)
		}
	}
}
