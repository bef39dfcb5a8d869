#!/usr/bin/env bash
#
# Checks the versions of packages, and the packages of amd64 in a folder with lintian and rpmlint.
# Usage: test.sh FOLDER
set -euo pipefail
dir=$(realpath "$(dirname "$0")")
export SOURCE_DATE_EPOCH=1796025060 # 2026-11-30 07:51

# In order. The scripts compare with sort -V, the package managers in their own ways.
versions='
0~20261130075100.gabcdef1       abcdef1
0~20261130075100.gabcdef1.dirty abcdef1-dirty
0.1.0~rc1                       v0.1.0-rc1
0.1.0~rc1+3.gabcdef1            v0.1.0-rc1-3-gabcdef1
0.1.0                           v0.1.0
0.1.0+0.dirty                   0.1.0-dirty
0.1.0+2.gabcdef1                0.1.0-2-gabcdef1
0.1.0+12.gabcdef1               v0.1.0-12-gabcdef1
0.1.0+12.gabcdef1.dirty         v0.1.0-12-gabcdef1-dirty
0.1.1                           v0.1.1
0.10.0                          0.10.0
1.0.0                           v1.0.0
'
fail() { echo "test.sh: $*" >&2; exit 1; }
before=
while read -r want version; do
	got=$("$dir/version.sh" "$version")
	[ "$got" = "$want" ] || fail "$version became $got, want $want"
	if [ -n "$before" ]; then
		dpkg --compare-versions "$before-1" lt "$got-1" || fail "dpkg: $before is not before $got"
		[ "$(rpm --eval "%{lua: print(rpm.vercmp('$before', '$got'))}")" = -1 ] || fail "rpm: $before is not before $got"
		[ "$(printf '%s\n' "$got" "$before" | LC_ALL=C sort -V | head -n 1)" = "$before" ] || fail "sort: $before is not before $got"
	fi
	before=$got
done < <(sed '/^$/d' <<<"$versions")
earlier=$(SOURCE_DATE_EPOCH=$((SOURCE_DATE_EPOCH - 1)) "$dir/version.sh" ffffff1)
dpkg --compare-versions "$earlier" lt "$("$dir/version.sh" abcdef1)" || fail "$earlier is not earlier"
! "$dir/version.sh" 'v1.0.0/x' 2>/dev/null || fail 'a version with a slash'

lintian --allow-root --fail-on error,warning "$1"/egressbpf_*_amd64.deb
out=$(rpmlint --config "$dir/rpmlint.toml" "$1"/egressbpf-*.x86_64.rpm 2>&1) && [[ $out == *' 0 errors, 0 warnings'* ]] || fail "$out"
