// Command pictures writes the pictures of the documentation: what egressbpf shows of made-up
// containers. It needs chromium and tmux.
//
// Usage: pictures DIRECTORY
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"

	"github.com/egressbpf/egressbpf/internal/web"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "pictures:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) > 1 && os.Args[1] == web.ServeArg {
		return web.Serve(os.Args[2:])
	}
	if len(os.Args) > 1 && os.Args[1] == topArg {
		return runTop(context.Background())
	}
	if len(os.Args) != 2 {
		return fmt.Errorf("want one argument: the directory for the pictures")
	}
	if err := drawTop(context.Background(), os.Args[1]); err != nil {
		return err
	}
	return drawPage(context.Background(), os.Args[1])
}

// screens are those for which the page is drawn.
var screens = []struct {
	name          string
	width, height int64
	scheme        string
	options       []chromedp.EmulateViewportOption
}{
	{"desktop", 1280, 800, "light", nil},
	{"phone", 390, 844, "dark", []chromedp.EmulateViewportOption{chromedp.EmulateMobile, chromedp.EmulateScale(2)}},
}

// prefers has the browser prefer light or dark.
func prefers(scheme string) step {
	return command(emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
}

// drawPage writes page-desktop.png and page-phone.png.
func drawPage(ctx context.Context, dir string) error {
	var recent web.Recent
	for _, r := range records() {
		recent.Add(r)
	}
	url, stop, err := serve(ctx, page, &recent)
	if err != nil {
		return err
	}
	defer stop()
	for _, screen := range screens {
		b, close, err := newBrowser(ctx)
		if err != nil {
			return err
		}
		defer close()
		err = b.run(
			chromedp.EmulateViewport(screen.width, screen.height, screen.options...), prefers(screen.scheme), chromedp.Navigate(url),
			shows(fmt.Sprintf(`document.getElementById("live").textContent == "live" && document.querySelectorAll("#records li").length == %d`, len(records()))),
		)
		var picture []byte
		if err == nil {
			picture, err = chromedp.Run(b.ctx, chromedp.CaptureScreenshot())
		}
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", screen.name, err, b.complained())
		}
		if err := os.WriteFile(filepath.Join(dir, "page-"+screen.name+".png"), picture, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// serve serves a page at an address of this machine until stop is called.
func serve(ctx context.Context, page func() web.Page, recent *web.Recent) (url string, stop func(), err error) {
	s, err := web.Open("0", "", source(page, recent), slog.Default())
	if err != nil {
		return "", nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	return "http://" + s.Addr().String() + "/", func() { cancel(); <-done }, nil
}
