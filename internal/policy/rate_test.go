package policy

import (
	"testing"
	"time"
)

func TestParseRate(t *testing.T) {
	for in, want := range map[string]Rate{
		"unlimited":      {},
		"1/second":       {1, time.Second},
		"5/minute":       {5, time.Minute},
		"120/hour":       {120, time.Hour},
		"1000000/day":    {1_000_000, 24 * time.Hour},
		"1000000/second": {1_000_000, time.Second},
	} {
		got, err := ParseRate(in)
		if err != nil || got != want || got.Unlimited() != (in == "unlimited") {
			t.Errorf("%s: got %+v, %v, want %+v", in, got, err, want)
		}
		text, err := got.MarshalText()
		if err != nil || string(text) != in {
			t.Errorf("%s: marshalled to %s, %v", in, text, err)
		}
		var again Rate
		if err := again.UnmarshalText(text); err != nil || again != got {
			t.Errorf("%s: got %+v, %v after a round trip", in, again, err)
		}
	}
	const form, count = "want N/second, N/minute, N/hour, N/day or unlimited", "want a number from 1 to 1000000"
	for in, want := range map[string]string{
		"":                            form,
		"5":                           form,
		"5/":                          form,
		"5 per minute":                form,
		"5/minutes":                   form,
		"5/Minute":                    form,
		"5/minute ":                   form,
		"5/minute/2":                  form,
		"5/week":                      form,
		"Unlimited":                   form,
		"unlimited/day":               count,
		"/minute":                     count,
		" 5/minute":                   count,
		"5 /minute":                   count,
		"+5/minute":                   count,
		"-5/minute":                   count,
		"05/minute":                   count,
		"5.5/minute":                  count,
		"1e3/minute":                  count,
		"1000001/minute":              count,
		"18446744073709551621/minute": count,
		"0/minute":                    "--block 0.0.0.0/0:25/tcp",
	} {
		r, err := ParseRate(in)
		mentions(t, err, want)
		mentions(t, err, `"`+in+`": `)
		if r != (Rate{}) {
			t.Errorf("%q: got %+v beside the error", in, r)
		}
	}
}

// The remedy for a rate of 0 must work as printed.
func TestZeroRateRemedyParses(t *testing.T) {
	_, err := ParseRate("0/day")
	for _, s := range []string{"0.0.0.0/0:25/tcp", "[::/0]:25/tcp"} {
		mentions(t, err, "--block "+s)
		if _, err := ParseRule(s); err != nil {
			t.Error(err)
		}
	}
}

func TestRateValidate(t *testing.T) {
	for _, r := range []Rate{
		{0, time.Minute},
		{5, 0},
		{5, 2 * time.Minute},
		{5, -time.Minute},
		{1_000_001, time.Second},
	} {
		if r.Validate() == nil || r.Unlimited() {
			t.Errorf("%+v: want an error", r)
		}
		if text, err := r.MarshalText(); err == nil {
			t.Errorf("%+v: marshalled to %s, want an error", r, text)
		}
	}
}

func TestLimitValidate(t *testing.T) {
	day := 24 * time.Hour
	for _, tt := range []struct {
		limit Limit
		want  string // "": valid
	}{
		{Limit{Rate{5, time.Minute}, 5}, ""},
		{Limit{Rate{5, time.Minute}, 1}, ""},
		{Limit{Rate{5, time.Minute}, 0}, "burst: 0: want 1 to 1000000"},
		{Limit{Rate{5, time.Minute}, 1_000_000}, ""},
		{Limit{Rate{5, time.Minute}, 1_000_001}, "burst: 1000001: want 1 to 1000000"},
		{Limit{Rate{}, 1_000_000}, ""},
		{Limit{Rate{}, 0}, "burst: 0"},
		{Limit{Rate{0, time.Minute}, 5}, "rate: "},
		// 100 years are 36,500 days and 876,000 hours.
		{Limit{Rate{1, day}, 36_500}, ""},
		{Limit{Rate{1, day}, 36_501}, "burst: 36501 takes more than 100 years to refill at 1/day: want at most 36500"},
		{Limit{Rate{2, day}, 73_000}, ""},
		{Limit{Rate{2, day}, 73_001}, "want at most 73000"},
		{Limit{Rate{1, time.Hour}, 876_000}, ""},
		{Limit{Rate{1, time.Hour}, 876_001}, "want at most 876000"},
		{Limit{Rate{1, time.Minute}, 1_000_000}, ""},
		{Limit{Rate{1_000_000, time.Second}, 1}, ""},
	} {
		err := tt.limit.Validate()
		if tt.want != "" {
			mentions(t, err, tt.want)
		} else if err != nil {
			t.Errorf("%+v: %v", tt.limit, err)
		}
	}
}
