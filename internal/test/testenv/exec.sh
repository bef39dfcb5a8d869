#!/usr/bin/env bash
#
# Runs the tests of a package, for go test -exec. Go compiles several packages at once, but their
# tests run one after the other: some compare all BPF objects of the kernel before and after, or use
# something of which there is one. Only what leaves the kernel alone runs beside them. The time limit of
# go test counts the wait, so a test has its own here.
set -euo pipefail

set -- "$@" -test.timeout=60m
case $PWD in
*/internal/test/release) exec nice -n 19 "$@" ;;
*/internal/docker | */internal/iptables | */internal/top) exec "$@" ;;
esac
exec flock --close "${BASH_SOURCE[0]}" "$@"
