package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// patience is how long a browser may take for a step.
const patience = 3 * time.Minute

// browser is a Chromium with one tab.
type browser struct {
	ctx context.Context
	mu  sync.Mutex
	// complaints are what it has written to its console, and exceptions.
	complaints []string
}

// newBrowser starts a Chromium. The caller calls close.
func newBrowser(ctx context.Context) (b *browser, close func(), err error) {
	dir, err := os.MkdirTemp("", "chromium")
	if err != nil {
		return nil, nil, err
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.NoSandbox, // which root cannot have
		chromedp.Flag("disable-dev-shm-usage", true),
		// It has no business elsewhere.
		chromedp.Flag("host-resolver-rules", "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
		chromedp.Flag("disable-component-update", true),
		chromedp.Env("TZ=UTC", "LANG=C.UTF-8", "TMPDIR="+dir),
	)
	ctx, stop := context.WithTimeout(ctx, 2*patience)
	ctx, end := chromedp.NewExecAllocator(ctx, options...)
	ctx, closeTab := chromedp.NewContext(ctx)
	close = func() { closeTab(); end(); stop(); os.RemoveAll(dir) }
	b = &browser{ctx: ctx}
	listening := chromedp.Listen(ctx, func(event any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch e := event.(type) {
		case *runtime.EventConsoleAPICalled:
			b.complaints = append(b.complaints, fmt.Sprint(e.Type, ": ", e.Args))
		case *runtime.EventExceptionThrown:
			b.complaints = append(b.complaints, e.ExceptionDetails.Text)
		case *log.EventEntryAdded:
			b.complaints = append(b.complaints, e.Entry.Text+" "+e.Entry.URL)
		}
	})
	if err := cmp.Or(listening, b.run(command(log.Enable, cdp.Empty{}))); err != nil {
		close()
		return nil, nil, fmt.Errorf("start chromium: %w", err)
	}
	return b, close, nil
}

// step is something that a browser does.
type step = chromedp.Action[chromedp.Void]

// run runs steps, one after the other.
func (b *browser) run(steps ...step) error { return chromedp.Do(b.ctx, steps...) }

// command is a command of the DevTools protocol.
func command[P any](c cdp.Command[P, cdp.Empty], params P) step {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, c, params)
		return err
	})
}

// complained returns what the browser complains of.
func (b *browser) complained() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.complaints, "\n")
}

// shows waits until an expression in JavaScript is true. chromedp.Poll would have the page make
// code of a text, which the page does not allow.
func shows(expression string) step {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		again := time.NewTicker(20 * time.Millisecond)
		defer again.Stop()
		for {
			if is, err := chromedp.Evaluate[bool]("!!("+expression+")")(ctx, t); is || err != nil {
				return err
			}
			select {
			case <-again.C:
			case <-ctx.Done():
				return fmt.Errorf("%s: %w", expression, ctx.Err())
			}
		}
	})
}
