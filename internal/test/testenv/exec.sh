#!/usr/bin/env bash
#
# Runs the tests of a package, for go test -exec. Go compiles several packages at once, but their
# tests run one after the other: some compare all BPF objects of the kernel before and after, or use
# something of which there is one. Only what leaves the kernel alone runs beside them.
set -euo pipefail

case $PWD in
*/internal/test/release) exec nice -n 19 "$@" ;;
esac
exec flock --close "${BASH_SOURCE[0]}" "$@"
