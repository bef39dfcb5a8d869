#!/usr/bin/env bash
# Installs missing packages of Debian or Ubuntu.
# Usage: install.sh [COMMAND:]PACKAGE...
# A package is missing if COMMAND is missing or, without a COMMAND, if the package is not
# installed. Services of the packages are not started.
set -euo pipefail

# look FOR... sets missing, and fails if nothing is.
look() {
	missing=()
	local arg package
	for arg; do
		package=${arg#*:}
		if [ "$package" != "$arg" ]; then
			PATH=$PATH:/usr/sbin:/sbin command -v "${arg%%:*}" >/dev/null || missing+=("$package")
		else
			dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q ' installed$' || missing+=("$package")
		fi
	done
	[ ${#missing[@]} -gt 0 ]
}
look "$@" || exit 0
# One at a time.
exec {lock}<"${BASH_SOURCE[0]}"
flock "$lock"
look "$@" || exit 0

sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)
command -v apt-get >/dev/null || { echo "install first: ${missing[*]}" >&2; exit 1; }
echo "installing ${missing[*]}" >&2

# See invoke-rc.d(8).
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	trap '"${sudo[@]}" rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
	"${sudo[@]}" chmod 755 "$policy"
fi
log=$(mktemp)
if ! { "${sudo[@]}" apt-get update &&
	"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
	cat "$log" >&2
	rm -f "$log"
	exit 1
fi
rm -f "$log"
