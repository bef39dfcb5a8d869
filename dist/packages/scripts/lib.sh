# What the scripts of both packages share; build.sh puts it before each of them. None of it
# fails because of what is or is not in force: a package manager in the middle of its work is
# no help to anybody. It says what is wrong instead.

# With dpkg --force-script-chrootless, / is not where the package is installed.
[ -z "${DPKG_ROOT:-}" ] || exit 0

version='@VERSION@' # of the package that the script is part of
binary=/usr/sbin/egressbpf
unit=egressbpf.service
pins=/sys/fs/bpf/egressbpf
kept=/var/lib/egressbpf      # the command of a removed package whose filter is in force
notes=/run/egressbpf-package # what one script of a transaction leaves for the next

say() { printf 'egressbpf: %s\n' "$*" >&2; }
note() { { mkdir -p "$notes" && : >"$notes/$1"; } || :; }
noted() { [ -e "$notes/$1" ]; }

# A chroot, in which an image is made, may see what is in force on the host.
on_host() { [ "$(stat -L -c %d:%i /)" = "$(stat -L -c %d:%i /proc/1/root/ 2>/dev/null)" ]; }
in_force() { on_host && [ -d "$pins" ]; }
systemd() { on_host && [ -d /run/systemd/system ]; }

# packaged succeeds if the unit that systemd knows starts this package's command, and not that of
# `make install`.
packaged() {
	case $(systemctl show --property=ExecStart --value "$unit" 2>/dev/null) in
	*"path=$binary "*) return 0 ;;
	?*) return 1 ;;
	esac
	# A unit that was masked while it ran starts nothing.
	case $(readlink "/proc/$(systemctl show --property=MainPID --value "$unit" 2>/dev/null)/exe") in
	"$binary" | "$binary (deleted)") ;;
	*) return 1 ;;
	esac
}

# lost prints the command that the unit names, and succeeds, if that does not exist: a drop-in can name
# the command of `make install`.
lost() {
	named=$(systemctl show --property=ExecStart --value "$unit" 2>/dev/null | sed -n '1s|^{ path=\(/[^ ]*\) ;.*|\1|p')
	[ -n "$named" ] && [ ! -e "$named" ] && echo "$named"
}

# Between two attempts to start, a service is activating.
running() {
	case $(systemctl show --property=ActiveState --value "$unit" 2>/dev/null) in
	active | activating | reloading) ;;
	*) return 1 ;;
	esac
}

# later A B succeeds if version A is later than B.
later() { [ "$1" != "$2" ] && [ "$(printf '%s\n' "$1" "$2" | LC_ALL=C sort -V | tail -n 1)" = "$1" ]; }

# keep_command keeps the installed command, and how to take the filter off with it, or nothing:
# purge would try half a command again and again.
keep_command() {
	{ keep_all && [ -x "$kept/egressbpf" ]; } || { rm -rf "$kept" || :; return 1; } # not -x: noexec
}

# this_filter prints, with the kept command, what each attach changes: the program and its time.
this_filter() { timeout 60 "$kept/egressbpf" status 2>/dev/null | grep '^egress ' || :; }

keep_all() {
	mkdir -p "$kept" && chmod 700 "$kept" &&
		cp "$binary" "$kept/egressbpf" && chmod 700 "$kept/egressbpf" &&
		cp /usr/share/egressbpf/version "$kept/version" &&
		this_filter >"$kept/filter" &&
		cat >"$kept/detach" <<-END &&
			#!/bin/sh
			# The package egressbpf was removed while its filter was in force. This takes the
			# filter off, and removes this folder.
			set -e
			$kept/egressbpf detach
			rm -r $kept
		END
		chmod 700 "$kept/detach"
}

# before_files runs before files are installed or replaced. An earlier version cannot take over
# from a later one by itself: the later one, which is still there, prepares for that.
before_files() {
	# What an interrupted transaction has noted of the service is still to be done.
	rm -f "$notes/install" "$notes/keep" "$notes/handed-over"
	in_force || return 0
	if [ -x "$binary" ] && from=$(cat /usr/share/egressbpf/version 2>/dev/null); then
		command=$binary
	elif [ -x "$kept/egressbpf" ] && from=$(cat "$kept/version" 2>/dev/null); then
		command=$kept/egressbpf
	else
		return 0
	fi
	later "$from" "$version" || return 0
	if systemd && running; then
		# The service of another installation would attach again.
		packaged || return 0
		note start
		systemctl stop "$unit" || :
	fi
	if "$command" detach --hand-over; then
		note handed-over
	else
		[ "$command" != "$binary" ] || keep_command || :
		note keep
		say "version $from could not hand over to version $version. What it had in force stays in force."
		[ ! -x "$kept/detach" ] || say "$kept/detach takes it off."
	fi
}

# after_files runs when all files are there, and puts this version in force if the service runs.
after_files() {
	noted keep || rm -rf "$kept"
	if systemd; then
		systemctl daemon-reload || :
		! noted enable || systemctl --quiet enable "$unit" || :
	fi
	put_in_force
	if [ -e /usr/local/sbin/egressbpf ] || [ -e /usr/local/lib/systemd/system/$unit ]; then
		say "there is another egressbpf in /usr/local, by make install. It goes before this package's:"
		say "the service and the shell start that one. make uninstall removes it, and leaves in force what"
		say "is in force; then systemctl enable --now egressbpf starts this one."
	fi
	rm -rf "$notes"
}

put_in_force() {
	if systemd && named=$(lost); then
		say "the service cannot start again, nor at the next boot: its unit names $named, which does"
		say "not exist. Name $binary instead (systemctl edit egressbpf), then run: systemctl restart egressbpf"
	fi
	verb=
	if systemd && packaged && noted start; then
		verb=start
	elif systemd && running; then
		packaged || return 0
		verb=restart
	fi
	if [ -n "$verb" ]; then
		! systemctl "$verb" "$unit" || return 0
		say "the service did not $verb with version $version: see journalctl -u egressbpf."
		! in_force || say "What was in force before stays in force."
		say "When the cause is mended, run: systemctl restart egressbpf"
	elif in_force; then
		say "a filter is in force without the service, and stays in force as it is. To put version"
		say "$version in force, run one of"
		say "  systemctl enable --now egressbpf    now and from each boot on, with /etc/egressbpf/config.yaml"
		say "  egressbpf attach                    with the --config and flags that it was attached with"
		! noted handed-over || say "Until then, defences can be missing that version $version does not know: see egressbpf status."
	elif noted install; then
		say "nothing is in force yet. To put the filter in force, now and from each boot on, run:"
		say "  systemctl enable --now egressbpf"
	fi
}

# before_removal runs before the package is removed, not replaced. What is in force stays: whoever
# removes the package because of another package must not open the host.
before_removal() {
	rm -rf "$notes"
	if systemd; then
		if packaged; then
			! systemctl --quiet is-enabled "$unit" || note enable
			! running || note start
			systemctl --quiet disable "$unit" || : # fails if it is masked
			systemctl stop "$unit" || :
			systemctl reset-failed "$unit" 2>/dev/null || :
		fi
	elif command -v systemctl >/dev/null; then
		systemctl --quiet disable "$unit" || : # in a chroot
	fi
	in_force || return 0
	if keep_command; then
		say "the filter stays in force. $kept/detach takes it off."
	else
		say "the filter stays in force, and its command could not be kept in $kept. Install the package again"
		say "to take the filter off."
	fi
}

after_removal() {
	rm -rf "$notes"
	! systemd || systemctl daemon-reload || :
}

