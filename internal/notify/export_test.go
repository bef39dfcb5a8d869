package notify

// Scrub is what removes secrets from errors.
var Scrub = scrub
