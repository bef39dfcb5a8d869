#!/usr/bin/env bash
#
# Runs a program as root on one of Debian's kernels, in QEMU.  See usage.
set -euo pipefail

# One kernel a line: its name for run.sh, the Debian suite that it comes from, its
# architecture, and its flavour.  With --root it is the plain kernel instead of the cloud
# kernel, since only that has 9p.  What backports and sid hold changes with time; so these
# are named after the suite.
kernels='
5.10            bullseye          amd64  cloud-amd64
6.1             bookworm          amd64  cloud-amd64
6.12            trixie            amd64  cloud-amd64
backports       trixie-backports  amd64  cloud-amd64
sid             sid               amd64  cloud-amd64
6.1-arm64       bookworm          arm64  cloud-arm64
6.12-arm64      trixie            arm64  cloud-arm64
sid-arm64       sid               arm64  cloud-arm64
6.12-arm64-16k  trixie            arm64  arm64-16k
'

# Kernels that are passing through: backports keeps older series for a while.
readonly passing=trixie-backports

# The guest loads these before the binary starts.
loaded_modules=(veth bridge nf_defrag_ipv4 nf_defrag_ipv6 nf_conntrack nf_tables)

# The guest's kernel loads these by itself when something needs them, as on a real
# host.  Modules that a kernel does not have are left out.
extra_modules=(dummy tun vxlan 8021q macvlan ipvlan br_netfilter sch_ingress cls_bpf
    act_bpf nft_ct nft_chain_nat nft_masq crc32c_generic)

# With --root, these are loaded first, to reach the root, where all others are.
# libcrc32c needs crc32c_generic if the kernel does not have it built in, here and above.
root_modules=(virtio_pci 9pnet_virtio 9p overlay)
root_extra_modules=(crc32c_generic)

# The Debian packages whose commands are used here, apart from the essential ones.
packages=(qemu-system-x86 qemu-system-arm busybox-static debian-archive-keyring xz-utils python-apt-common)

# The exit code of the harness itself, not of the binary.
readonly harness_failed=125

usage() {
    cat <<'END'
usage: run.sh [OPTION]... KERNEL BINARY [ARG]...
       run.sh [--root] --download KERNEL
       run.sh --kernels | --packages | --help

Boots KERNEL under emulation (KVM is not needed), runs BINARY as root, prints
what it writes to stdout and stderr, and exits with its exit code.  BINARY is a
static executable of the kernel's architecture or a busybox sh script.  It starts in / with an empty stdin
and no environment but PATH.  An exit code of 125 means that no result came
back: bad usage, a missing tool, a failed download, a kernel panic or a timeout.

  --root              boot into this machine's root: see below
  --env NAME=VALUE    set a variable for BINARY
  --file SRC:DEST     put the file or folder SRC at the absolute path DEST, not
                      with --root
  --append PARAMETER  add to the kernel's command line, e.g. lsm=bpf
  --timeout SECONDS   give up after this time (default 300)
  --kernels           print the names that KERNEL may have
  --packages          print the Debian packages that this needs
  --smp NUMBER        the number of processors (default 2)
  --download          only download what a later run needs

KERNEL may also be a series that --kernels does not print, such as 6.17 or
6.17-arm64, as long as Debian's backports have it.

Inside: procfs, sysfs, devtmpfs, tmpfs on /tmp and /run, cgroup2 on
/sys/fs/cgroup, lo up, no other network device, busybox in /bin.  bpffs,
securityfs and tracefs are not mounted.

With --root, the architecture has to be amd64, the kernel is not the cloud but the plain one, and the root is this
machine's, as far as this user may read it.  BINARY is any executable file here
and keeps its path.  What the guest writes goes to its memory and is lost.
Besides the above there are devpts, bpffs, securityfs, tracefs and all modules of
the kernel, and TMPDIR is set.  These folders are empty tmpfs, because they tell
of this machine's state or because overlayfs, as Docker uses it, needs another
file system than the root's: /run, /var/tmp, /var/lib/docker, /var/lib/containerd.
/tmp is as it is here.
Debian's kernels have AppArmor on: for containers, dockerd wants the package
apparmor on this machine, or --append apparmor=0.

Kernels are downloaded once, through apt and with its signature checks, to
VMTEST_CACHE (default: egressbpf-vmtest in the user's cache folder); remove a
kernel's folder there to get its newest version.  VMTEST_MIRROR is the URL of
the Debian archive to take them from (default: the one this machine's apt knows).
END
}

die() {
    printf 'run.sh: %s\n' "$*" >&2
    exit "$harness_failed"
}

# need COMMAND PACKAGE
need() {
    command -v "$1" >/dev/null || die "$1 not found: install the Debian package $2"
}

# find_kernel KERNEL sets suite, arch, flavour and, for a kernel that is passing through,
# series.
find_kernel() {
    series=
    read -r suite arch flavour < <(awk -v kernel="$1" '$1 == kernel { print $2, $3, $4 }' <<<"$kernels") && return
    [[ $1 =~ ^([0-9]+\.[0-9]+)(-arm64)?$ ]] || die "no kernel $1: see --kernels"
    series=${BASH_REMATCH[1]} suite=$passing arch=${BASH_REMATCH[2]#-}
    arch=${arch:-amd64}
    flavour=cloud-$arch
}

# mirror prints the URL of the Debian archive: the one that apt uses here or, on another
# distribution, the one that its apt knows.
mirror() {
    local codename templates=/usr/share/python-apt/templates/Debian.info
    if [[ -n ${VMTEST_MIRROR:-} ]]; then
        echo "$VMTEST_MIRROR"
        return
    fi
    # shellcheck source=/dev/null
    if codename=$(. /etc/os-release && [[ $ID == debian ]] && echo "${VERSION_CODENAME:-sid}"); then
        apt-get update --print-uris 2>/dev/null |
            sed -En "s#^'(.*)/dists/($codename|stable|testing|unstable)/InRelease' .*#\1#p" | sed -n 1p
    else
        awk '$1 == "BaseURI:" { print $2; exit }' "$templates"
    fi
}

# use_apt SUITE ARCH DIR makes apt commands know that suite alone.  This apt does not touch
# the machine's lists and hooks.  The machine's settings say how to reach an archive
# (proxies), but not which archive to trust.
use_apt() {
    local suite=$1 arch=$2 apt=$3
    local url keyring=/usr/share/keyrings/debian-archive-keyring.gpg

    need apt-get apt
    need xz xz-utils
    [[ -e $keyring ]] ||
        die "$keyring not found: install the Debian package debian-archive-keyring"
    url=$(mirror) || true
    [[ -n $url ]] || die 'no Debian archive found in the apt sources: set VMTEST_MIRROR'

    mkdir -p "$apt"/{state/lists/partial,cache/archives/partial}
    echo "deb [arch=$arch signed-by=$keyring] $url $suite main" >"$apt/sources.list"
    {
        apt-config dump | grep '^Acquire::' | grep -Ev '^Acquire::(Allow|IndexTargets)'
        cat <<END
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "$apt/state";
Dir::State::status "/dev/null";
Dir::Cache "$apt/cache";
APT::Architecture "$arch";
APT::Architectures "$arch";
APT::Sandbox::User "$(id -un)";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
END
    } >"$apt/apt.conf"
    export APT_CONFIG=$apt/apt.conf
    apt-get update -qq >&2 ||
        die "cannot read Debian $suite from $url: if its key is unknown, upgrade the package" \
            "debian-archive-keyring; if it has moved to an archive, set VMTEST_MIRROR"
}

# unpack DIR PACKAGE... downloads packages and unpacks them in DIR.
unpack() {
    local dir=$1 file
    shift
    mkdir -p "$dir/debs"
    (cd "$dir/debs" && apt-get download -qq "$@" >&2) || die "cannot download $*"
    for file in "$dir"/debs/*.deb; do
        dpkg-deb -x "$file" "$dir"
    done
    rm -rf "$dir/debs"
}

# fetch_kernel DIR makes DIR/made from a kernel: its folder of /lib/modules with
# uncompressed modules, vmlinuz, config and the kernel's version.
fetch_kernel() {
    local dir=$1 root=$1/root tree package parts version file

    printf 'run.sh: downloading kernel %s (%s of %s)\n' "$kernel" "$flavour" "$suite" >&2
    use_apt "$suite" "$arch" "$dir/apt"
    if [[ -n $series ]]; then
        package=$(apt-cache pkgnames "linux-image-$series." |
            grep -E "^linux-image-[0-9.]+\+deb[0-9]+-$flavour$" | sort -V | tail -n 1) || true
    else
        # The metapackage depends on the current kernel, in its signed variant.
        package=$(apt-cache depends "linux-image-$flavour" |
            awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ { print $2; exit }')
    fi
    [[ -n $package ]] || die "Debian $suite has no kernel ${series:+$series }$flavour"
    version=${package#linux-image-}
    # Newer releases split the package: vmlinuz and the modules are in its dependencies.
    mapfile -t parts < <(echo "$package" && apt-cache depends "$package" |
        awk -v suffix="-$version" '
            $1 == "Depends:" && substr($2, length($2) - length(suffix) + 1) == suffix { print $2 }')
    unpack "$root" "${parts[@]}"

    # /lib is a link to usr/lib in newer releases, and the newest leave /boot empty.
    [[ -d $root/lib ]] || ln -s usr/lib "$root/lib"
    tree=$root/lib/modules/$version
    for file in vmlinuz config; do
        [[ -e $tree/$file ]] || mv "$root/boot/$file-$version" "$tree/$file"
    done
    # Decompressing takes long, and most modules are drivers of what an emulated machine has not.
    find "$tree/kernel/drivers" -mindepth 1 -maxdepth 1 ! -name net ! -name virtio ! -name char -exec rm -r {} +
    find "$tree/kernel/drivers/net" -mindepth 1 -maxdepth 1 \( -name ethernet -o -name wireless -o -name usb -o -name can -o -name phy \) -exec rm -r {} +
    rm -rf "$tree/kernel/sound"
    find "$tree" -name '*.ko.xz' -exec xz --decompress {} +
    busybox depmod -b "$root" "$version"
    echo "$version" >"$tree/version"
    mv "$tree" "$dir/made"
}

# fetch_busybox DIR makes DIR/made, a static busybox of the kernel's architecture.
fetch_busybox() {
    printf 'run.sh: downloading busybox for %s\n' "$arch" >&2
    use_apt trixie "$arch" "$1/apt"
    unpack "$1/root" busybox-static
    mv -T "$(find "$1/root" -path '*bin/busybox')" "$1/made"
}

# cached FETCH PATH makes PATH by a command unless it exists.
cached() {
    local path=$2
    [[ ! -e $path ]] || return 0
    mkdir -p "${path%/*}"
    exec {lock}>"$path.lock"
    flock "$lock"
    if [[ ! -e $path ]]; then
        fetching=$(mktemp -d "$path.XXXXXX")
        # In a subshell, for what it exports.
        ("$1" "$fetching")
        mv -T "$fetching/made" "$path"
        rm -rf "$fetching"
        fetching=
    fi
    exec {lock}>&-
}

# is_dynamic FILE
is_dynamic() {
    ldd "$1" 2>/dev/null | grep -q '=>'
}

# is_foreign FILE says whether it is an executable of another architecture than the kernel's.
is_foreign() {
    local -A number=([amd64]=62 [arm64]=183) # e_machine of elf(5)
    [[ $(head -c 4 "$1" | tail -c 3) == ELF && $(od -An -t u2 -j 18 -N 2 "$1") -ne ${number[$arch]} ]]
}

# visible PATH fails if a guest with --root has something else there.
visible() {
    local folder
    for folder in /dev /proc /run /sys /var/lib/containerd /var/lib/docker /var/tmp /vmtest; do
        [[ $(realpath -m -- "$1")/ != "$folder"/* && $1/ != "$folder"/* ]] || die "$1 is hidden in the guest"
    done
}

# quote WORD... prints the words as one line of a POSIX shell script.
quote() {
    local word
    for word; do
        printf "'%s' " "${word//\'/\'\\\'\'}"
    done
}

# put SRC DEST copies a file or folder into the initramfs.
put() {
    local dest=$initramfs$2
    mkdir -p "$(dirname "$dest")"
    cp -RL --preserve=mode --remove-destination -T -- "$1" "$dest"
}

# put_modules copies the modules and what they depend on.
put_modules() {
    local from=$kernel_dir to module file
    if [[ -n $root ]]; then
        loaded_modules=("${root_modules[@]}" "${loaded_modules[@]}")
        extra_modules=("${root_extra_modules[@]}")
    fi
    to=$initramfs/lib/modules/$(<"$from/version")
    mkdir -p "$to" "$initramfs/vmtest"
    cp "$from"/modules.{dep,alias,builtin} "$to"
    for module in "${loaded_modules[@]}"; do
        if grep -q "/$module\.ko:" "$from/modules.dep"; then
            echo "$module"
        elif ! grep -q "/$module\.ko$" "$from/modules.builtin"; then
            die "kernel $kernel has no $module"
        fi
    done >"$initramfs/vmtest/modules"
    awk -v names="${loaded_modules[*]} ${extra_modules[*]}" '
        BEGIN { split(names, list, " "); for (i in list) wanted[list[i] ".ko:"] }
        { name = $1; sub(/.*\//, "", name) }
        name in wanted { sub(/:/, ""); for (i = 1; i <= NF; i++) print $i }
    ' "$from/modules.dep" | sort -u | while IFS= read -r file; do
        mkdir -p "$to/${file%/*}"
        cp "$from/$file" "$to/$file"
    done
}

# build_initramfs COMMAND... makes $work/initramfs.cpio, which runs the command.
build_initramfs() {
    local file path=PATH=/bin
    mkdir -p "$initramfs"/{bin,dev,etc,lib,proc,run,sys,tmp,usr,vmtest}
    ln -s bin "$initramfs/sbin"
    ln -s ../bin "$initramfs/usr/bin"
    ln -s ../bin "$initramfs/usr/sbin"
    install -m 755 "$busybox" "$initramfs/bin/busybox"
    ln -s busybox "$initramfs/bin/sh"
    put_modules
    printf '%s\n' "${ports[@]}" >"$initramfs/vmtest/ports"
    if [[ -n $root ]]; then
        install -m 755 "$here/init-root.sh" "$initramfs/init"
        install -m 755 "$here/init.sh" "$initramfs/vmtest/init"
        echo "$kernel_dir" >"$initramfs/vmtest/kernel_dir"
        path=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
        env=(TMPDIR=/var/tmp ${env[@]+"${env[@]}"})
    else
        install -m 755 "$here/init.sh" "$initramfs/init"
        for file in ${files[@]+"${files[@]}"}; do
            put "${file%:*}" "${file##*:}"
        done
        put "$1" "$program"
        chmod 755 "$initramfs$program"
    fi
    {
        echo '#!/bin/sh'
        echo "cd / && exec env -i $(quote "$path" ${env[@]+"${env[@]}"} "$program" "${@:2}")"
    } >"$initramfs/vmtest/command"
    chmod 755 "$initramfs/vmtest/command"
    # Not compressed: under emulation, unpacking takes long.
    (cd "$initramfs" && find . -mindepth 1 -print0 |
        busybox cpio -o -0 -H newc -R 0:0) >"$work/initramfs.cpio" 2>"$work/cpio.log" ||
        die "cannot build the initramfs: $(<"$work/cpio.log")"
    rm -rf "$initramfs"
}

# boot runs the machine.  The console, the binary's output and its exit code have a
# serial port each, so that none can be taken for another.
boot() {
    local status=0 out output machine_flags=(-m 1G)
    append+=(mitigations=off) # against flaws that an emulated processor has not
    [[ -z $root ]] || machine_flags=(-m 3G -device "virtio-9p-pci,fsdev=root,mount_tag=root"
        -fsdev "local,id=root,path=/,readonly=on,security_model=none,multidevs=remap")
    case $arch in
    # Walks of page tables with a fifth level take longer. On a busy machine, the kernel may
    # find that the timer does not work.
    amd64)
        append+=(no_timer_check)
        machine_flags+=(-cpu "max,la57=off" -serial file:/dev/stdout -serial "file:$work/code")
        ;;
    # The usual way to sign pointers is slow to emulate.
    arm64) machine_flags+=(-M virt -cpu "max,pauth-impdef=on" -chardev "file,id=out,path=/dev/stdout"
        -chardev "file,id=code,path=$work/code" -device "pci-serial-2x,chardev1=out,chardev2=code") ;;
    esac
    # The output goes through cat, because QEMU makes the file that it writes to
    # non-blocking, which must not happen to the caller's file.
    exec {out}> >(exec cat)
    output=$!
    timeout --kill-after=5 "$timeout" "$emulator" \
        -accel tcg,thread=multi -smp "$smp" -serial "file:$work/console" "${machine_flags[@]}" \
        -nodefaults -nographic -no-reboot -kernel "$kernel_dir/vmlinuz" -initrd "$work/initramfs.cpio" \
        -append "console=${ports[0]} panic=-1 oops=panic ${append[*]-}" \
        </dev/null 1>&"$out" 2>"$work/qemu.log" &
    machine=$!
    exec {out}>&-
    wait "$machine" || status=$?
    machine=
    wait "$output" || true

    if [[ -f $work/code && $(<"$work/code") =~ ^exit\ ([0-9]+)$ ]]; then
        finished=yes
        exit "${BASH_REMATCH[1]}"
    fi
    {
        cat "$work/qemu.log"
        [[ ! -f $work/console ]] || tail -n 80 "$work/console" | tr -d '\r'
    } >&2
    case $status in
    124) die "kernel $kernel: no result after $timeout s" ;;
    0) die "kernel $kernel: the machine stopped without a result" ;;
    *) die "kernel $kernel: QEMU failed with exit code $status" ;;
    esac
}

# shellcheck disable=SC2317 # the trap calls it
cleanup() {
    local status=$?
    if [[ -n $machine ]]; then
        kill "$machine" 2>/dev/null || true
        wait "$machine" 2>/dev/null || true
    fi
    rm -rf -- ${work:+"$work"} ${fetching:+"$fetching"}
    # The failure of a command of this script must not look like the binary's result.
    [[ -n $finished || $status -ge 128 ]] || exit "$harness_failed"
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
timeout=300
smp=2
root=
download=
env=()
files=()
append=()
work=
fetching=
machine=
finished=

while [[ ${1-} == -* ]]; do
    option=$1
    shift
    case $option in
    --help)
        usage
        exit
        ;;
    --kernels)
        awk 'NF { print $1 }' <<<"$kernels"
        exit
        ;;
    --mirror) # for debian.sh
        mirror
        exit
        ;;
    --packages)
        printf '%s\n' "${packages[@]}"
        exit
        ;;
    --root)
        root=yes
        continue
        ;;
    --download)
        download=yes
        continue
        ;;
    --)
        break
        ;;
    --env | --file | --append | --timeout | --smp)
        [[ $# -gt 0 ]] || die "$option needs a value"
        value=$1
        shift
        ;;
    *) die "unknown option $option: see --help" ;;
    esac
    case $option in
    --env)
        [[ $value == [A-Za-z_]*=* ]] || die "--env $value: want NAME=VALUE"
        env+=("$value")
        ;;
    --file)
        [[ $value == *:/* && ${value##*:} != *..* ]] || die "--file $value: want SRC:DEST, DEST absolute"
        case ${value##*:}/ in
        /proc/* | /sys/* | /dev/* | /tmp/* | /run/* | /vmtest/*)
            die "--file $value: ${value##*:} is hidden in the guest" ;;
        esac
        [[ -e ${value%:*} ]] || die "--file $value: no such file"
        files+=("$value")
        ;;
    --append) append+=("$value") ;;
    --timeout)
        [[ $value =~ ^[1-9][0-9]*$ ]] || die "--timeout $value: want a number of seconds"
        timeout=$value
        ;;
    --smp)
        [[ $value =~ ^[1-9][0-9]*$ ]] || die "--smp $value: want a number"
        smp=$value
        ;;
    esac
done
[[ $# -ge 2 || -n $download && $# -eq 1 ]] || die 'want KERNEL and BINARY: see --help'
kernel=$1
shift
find_kernel "$kernel"
if [[ -n $root ]]; then
    [[ $arch == amd64 ]] || die "--root: not with $kernel, whose architecture is not this machine's"
    flavour=amd64
fi
if [[ -n $download ]]; then
    true
elif [[ ! -f $1 ]]; then
    die "$1: no such file"
elif is_foreign "$1"; then
    die "$1 is not for $arch"
elif [[ -n $root ]]; then
    [[ ${#files[@]} -eq 0 ]] || die '--file: not with --root, where the guest has the files of this machine'
    [[ -x $1 ]] || die "$1 is not executable"
    program=$(realpath -s -- "$1")
    visible "$program"
else
    ! is_dynamic "$1" || die "$1 is not static: for Go, build it with CGO_ENABLED=0"
    program=/vmtest/bin/$(basename "$1")
fi

[[ $(uname -m) == x86_64 ]] || die 'needs an x86-64 machine'
busybox=$(command -v busybox) || die 'busybox not found: install the Debian package busybox-static'
! is_dynamic "$busybox" || die 'busybox is not static: install the Debian package busybox-static'

trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
cache=$(realpath -m -- "${VMTEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/egressbpf-vmtest}")
kernel_dir=$cache/$kernel
[[ -z $root ]] || kernel_dir+=-plain
# The console, the binary's output, and its exit code.
case $arch in
amd64)
    emulator=qemu-system-x86_64 ports=(ttyS0 ttyS1 ttyS2)
    need "$emulator" qemu-system-x86
    ;;
arm64)
    emulator=qemu-system-aarch64 ports=(ttyAMA0 ttyS0 ttyS1)
    need "$emulator" qemu-system-arm
    busybox=$cache/busybox-$arch
    cached fetch_busybox "$busybox"
    ;;
esac
cached fetch_kernel "$kernel_dir"
if [[ -n $download ]]; then
    finished=yes
    exit
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/vmtest.XXXXXX")
initramfs=$work/initramfs
build_initramfs "$@"
boot
