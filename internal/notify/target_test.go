package notify_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/notify"
)

// secret is in the URLs of these tests wherever a secret can be.
const secret = "S3cretS3cretS3cretS3cret"

const (
	slackURL    = "slack://hook:T00000000-B00000000-" + secret + "@webhook"
	telegramURL = "telegram://110201543:AA-" + secret + "_x@telegram?chats=@" + secret
)

func TestParse(t *testing.T) {
	for _, tt := range []struct{ url, shown string }{
		{"smtp://user:" + secret + "@mail.example:587/?from=a@b.example&to=c@d.example", "smtp://mail.example:587"},
		{"smtp://[2001:db8::1]:25/?from=a@b.example&to=c@d.example,e@f.example", "smtp://[2001:db8::1]:25"},
		{slackURL, "slack"},
		{"slack://T00000000/B00000000/" + secret, "slack"},
		{"slack://xoxb:123456789012-1234567890123-" + secret + "@C001CH4NN3L", "slack"},
		{"ntfy://:" + secret + "@ntfy.sh/" + secret, "ntfy://ntfy.sh"},
		{telegramURL, "telegram"},
		{"generic+https://hooks.example/" + secret + "?token=" + secret + "&@Authorization=Bearer+" + secret, "generic://hooks.example"},
		{"generic://hooks.example:8080/x?disabletls=yes&template=json", "generic://hooks.example:8080"},
	} {
		target, err := notify.Parse(tt.url)
		if err != nil {
			t.Errorf("%s: %v", tt.url, err)
			continue
		}
		if target.URL() != tt.url {
			t.Errorf("got the URL %s, want %s", target.URL(), tt.url)
		}
		holder := struct{ Notify []notify.Target }{[]notify.Target{target}}
		text, err := json.Marshal(holder)
		if err != nil {
			t.Fatal(err)
		}
		for _, format := range []string{"%v", "%s", "%+v", "%#v", "%q"} {
			text = fmt.Appendf(text, "\n"+format+" "+format, target, holder)
		}
		if got := target.String(); got != tt.shown || strings.Contains(string(text), secret) {
			t.Errorf("%s is shown as %s, want %s; or as\n%s", tt.url, got, tt.shown, text)
		}
	}
}

// What is refused is told without showing it.
func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct{ url, want string }{
		{"", "not a URL: want one that begins with generic+https://"},
		{secret, "not a URL"},
		{"xoxb:" + secret, "not a URL"},
		{"slack://" + secret + "%zz", "not a URL"},
		{"ntfy://ntfy.sh/" + secret + "\n", "not a URL"},
		{"slakc://" + secret, `unknown service "slakc": want generic+https://`},
		{"logger://", "unknown service"},
		{"matrix://user:" + secret + "@matrix.example", "unknown service"},
		{"https://hooks.example/" + secret, `unknown service "https"`},
		{"slack://" + secret, "slack: "},
		{"slack+https://" + secret, "slack: want generic+https://"},
		{"generic+ftp://host/" + secret, "generic: want generic+https://"},
		{"generic+https:///" + secret, "generic: want a host"},
		{"generic://host/?template=" + secret, "generic: unknown template"},
		{"generic://host/?a=" + secret + ";b", "generic: malformed options"},
		{"ntfy://" + secret + "@/topic", "ntfy: want a host"},
		{"ntfy://ntfy.sh", "ntfy: topic is required"},
		{"ntfy://ntfy.sh/topic?" + secret + "=1", "ntfy: "},
		{"ntfy://ntfy.sh/topic?priority=" + secret, "ntfy: "},
		{"telegram://110201543:" + secret + "@telegram", "telegram: no channels"},
		{"telegram://" + secret + "@telegram?chats=1", "telegram: invalid telegram token"},
		{"smtp://user:" + secret + "@mail.example/?from=a@b.example", "smtp: toAddress missing"},
		{"smtp://user:" + secret + "@mail.example:99999/?from=a@b.example&to=a@b.example", "smtp: want a port"},
		{"smtp://user:" + secret + "@mail.example/?from=a@b.example&to=a@b.example&auth=" + secret, "smtp: "},
		{"smtp://user:" + secret + "@mail.example/?from=a@b.example&to=a@b.example&timeout=" + secret, "smtp: "},
	} {
		_, err := notify.Parse(tt.url)
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s:\n got %v\nwant %s...", tt.url, err, tt.want)
		}
	}
}

func TestDistinct(t *testing.T) {
	var many []notify.Target
	for n := range notify.MaxTargets + 1 {
		target, err := notify.Parse(fmt.Sprint("ntfy://ntfy.sh/", n))
		if err != nil {
			t.Fatal(err)
		}
		many = append(many, target, target)
	}
	if got, err := notify.Distinct(many[:4]); err != nil || len(got) != 2 {
		t.Errorf("got %v, %v, want two", got, err)
	}
	if got, err := notify.Distinct(many); err == nil {
		t.Errorf("got %d targets", len(got))
	}
	if got, err := notify.Distinct([]notify.Target{}); err != nil || got != nil {
		t.Errorf("got %#v, %v, want nil", got, err)
	}
}

func TestScrub(t *testing.T) {
	const (
		mail = "smtp://user:p%2Fq%22Pass@mail.example/?from=a@b.example&to=c@d.example"
		hook = slackURL
	)
	for _, tt := range []struct{ url, text, want string }{
		{mail, "dial tcp: lookup mail.example: no such host", "dial tcp: lookup mail.example: no such host"},
		{mail, `535 go away, p/q"Pass`, "535 go away, ***"},
		{mail, `535 "p/q\"Pass"`, `535 "***"`},
		{mail, "535 p%2Fq%22Pass", "535 ***"},
		{hook, "Post https://hooks.slack.com/services/T00000000/B00000000/" + secret + ": EOF", "Post https://hooks.slack.com/services/***/***/***: EOF"},
		{telegramURL, "https://api.telegram.org/bot110201543:AA-" + secret + "_x/sendMessage", "https://api.telegram.org/bot***/sendMessage"},
		{"smtp://user:abc@mail.example/?from=a@b.example&to=c@d.example", "abc is wrong", "refused (its password is too short to tell why without showing it)"},
		{mail, "two\nlines\x1b[31m\xff", "two lines\uFFFD[31m\uFFFD"},
		{mail, strings.Repeat("x", 1000), strings.Repeat("x", 300) + "..."},
	} {
		if got := notify.Scrub(tt.url, tt.text); got != tt.want {
			t.Errorf("%s: %q\n got %q\nwant %q", tt.url, tt.text, got, tt.want)
		}
	}
}

// No URL makes a library panic or shows its password.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{slackURL, telegramURL, "smtp://a:b@c:1/?from=a@b.c&to=d@e.f", "ntfy://a/b?tags=c,d", "generic+https://a/b?@c=d&$e=f&template=json", "slack://a/b/c", "telegram://a", "smtp://:@"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, url string) {
		target, err := notify.Parse(url)
		if err == nil && target.URL() != url {
			t.Errorf("%q became %q", url, target.URL())
		}
		if err != nil && strings.Contains(url, secret) && strings.Contains(err.Error(), secret) {
			t.Errorf("%q: %v", url, err)
		}
	})
}
