#!/usr/bin/env bash
#
# Prints the licences of what is linked into the command for an architecture: they ask for
# their text to be with the binary.
set -euo pipefail
cd "$(dirname "$0")/../.."

[ $# = 1 ] || { echo 'usage: third-party.sh ARCH' >&2; exit 2; }

printf 'Go\n\n'
cat "$(go env GOROOT)/LICENSE"
GOOS=linux CGO_ENABLED=0 GOARCH=$1 go list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}} {{.Dir}}{{end}}{{end}}' \
	./cmd/egressbpf | sort -u | while read -r module number dir; do
	printf '\n\n%s %s\n' "$module" "$number"
	found=$(find "$dir" -maxdepth 1 \( -iname 'licen[cs]e*' -o -iname 'copying*' -o -iname 'notice*' \) -type f | LC_ALL=C sort)
	[ -n "$found" ] || { echo "third-party.sh: $module has no licence" >&2; exit 1; }
	while IFS= read -r file; do printf '\n' && cat "$file"; done <<<"$found"
done
