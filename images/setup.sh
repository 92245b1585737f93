#!/bin/sh
# Installs everything that this project needs on Debian 12, except a Rust toolchain. Running it again is safe: if
# everything is installed, it changes nothing and takes milliseconds.
#
#   images/setup.sh            to build, run and test
#   images/setup.sh kernel     also to compile the minimal kernel
set -eu

vsock_version=0.3.0
s3s_version=0.14.1
tools=${XDG_CACHE_HOME:-$HOME/.cache}/cofferdam/tools

# build-essential     linker for Rust, compiler for the kernel
# pkg-config, libcap-ng-dev   needed by the crate virtiofsd
# qemu-system-x86     the VMM that runs anywhere
# e2fsprogs           mke2fs for the scratch template
# xz-utils            to decompress kernel modules and the kernel's source
# ca-certificates     for cargo to download crates
# python3-grpcio, python3-grpc-tools   for a test with a client in Python
packages='build-essential pkg-config libcap-ng-dev qemu-system-x86 e2fsprogs xz-utils ca-certificates
    python3-grpcio python3-grpc-tools'

case ${1-} in
'') ;;
kernel) packages="$packages bc bison flex libelf-dev" ;;
*)
    echo "usage: images/setup.sh [kernel]" >&2
    exit 2
    ;;
esac

fail() {
    echo "setup: $*" >&2
    exit 1
}

# Prints the packages among its arguments that are not installed.
missing_of() {
    # dpkg-query fails if a package is unknown, but still lists the others.
    installed=$(dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' "$@" 2>/dev/null |
        sed -n 's/^installed //p') || true
    for package in "$@"; do
        printf '%s\n' "$installed" | grep -qx -- "$package" || printf ' %s' "$package"
    done
}

command -v dpkg-query >/dev/null || fail "dpkg is missing: on other distributions, install the equivalents of: $packages"
# shellcheck disable=SC2086 # the list must split
missing=$(missing_of $packages)
if [ -n "$missing" ]; then
    if [ "$(id -u)" -ne 0 ]; then
        fail "packages are missing; as root, run: apt-get install --no-install-recommends$missing"
    fi
    echo "setup: installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -o DPkg::Lock::Timeout=300 update -qq || echo "setup: some package lists could not be updated; continuing with the others" >&2
    # shellcheck disable=SC2086
    apt-get -o DPkg::Lock::Timeout=300 install -qq --no-install-recommends $missing >/dev/null || fail "apt-get could not install$missing"
fi

# Compiles a program into $tools unless it is installed. Arguments: name, version, further arguments for cargo.
install_tool() {
    name=$1 version=$2
    shift 2
    [ ! -x "$tools/bin/$name" ] || ! grep -qs "\"$name $version " "$tools/.crates.toml" || return 0
    command -v cargo >/dev/null || fail "cargo is not in PATH: install a Rust toolchain first"
    echo "setup: compiling $name $version into $tools/bin"
    cargo install --quiet --locked --version "$version" --root "$tools" "$@" "$name" ||
        fail "$name $version could not be compiled"
}

install_tool vhost-device-vsock "$vsock_version"
# An S3 server for tests. A debug build is fast enough, and compiles faster.
install_tool s3s-fs "$s3s_version" --debug --features binary
