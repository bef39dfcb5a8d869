#!/bin/sh
#
# Prints the version of the packages for a version of egressbpf as `git describe --tags
# --always --dirty` prints it. SOURCE_DATE_EPOCH has to be the time of the commit.
#
#   v0.1.0               0.1.0
#   0.1.0-rc1            0.1.0~rc1                     before 0.1.0
#   0.1.0-12-gabcdef1    0.1.0+12.gabcdef1             after 0.1.0, before 0.1.1
#   abcdef1              0~20261130073100.gabcdef1     before every release, by the commit's time
#   …-dirty              ….dirty, or 0.1.0+0.dirty
set -eu

version=${1#v}
dirty=
case $version in *-dirty) dirty=.dirty version=${version%-dirty} ;; esac

case $version in
[0-9]*.[0-9]*)
	since=
	if printf '%s' "$version" | grep -Eq -- '-[0-9]+-g[0-9a-f]+$'; then
		hash=${version##*-}
		version=${version%-*}
		since=+${version##*-}.$hash
		version=${version%-*}
	elif [ -n "$dirty" ]; then
		since=+0
	fi
	version=$(printf '%s' "$version" | sed 's/-/~/; s/-/./g')$since
	;;
*)
	case $version in *[!0-9a-f]* | '') ;; *) version=g$version ;; esac
	version=0~$(date --utc --date="@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).$version
	;;
esac
version=$version$dirty

case $version in
*[!0-9A-Za-z.+~]*)
	echo "version.sh: $1 cannot be the version of a package" >&2
	exit 1
	;;
esac
echo "$version"
