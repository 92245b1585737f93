# What people and CI run. Every recipe works on a bare Debian 12 with a Rust toolchain and root.

# List the recipes.
default:
    @just --list

# Install what building and running needs from Debian's packages.
setup:
    images/setup.sh

# The same for tests.
setup-tests:
    images/setup.sh test

# Compile a real C program inside a microVM and watch it.
demo: setup
    cargo run --release --package cofferdam-tests --bin demo

# Run every test, VMs included.
test: setup-tests
    cargo test --workspace

# Run the whole-system tests with cloud-hypervisor; without KVM, inside an emulated machine, replaced when it hangs.
[positional-arguments]
test-cloud-hypervisor *ARGS: setup-tests
    cargo run --package cofferdam-tests --bin test-cloud-hypervisor -- "$@"

# Run a command where KVM works: in an emulated machine that sees this host's files.
[positional-arguments]
nested *ARGS: setup
    cargo run --release --package cofferdam-tests --bin nested -- "$@"

# Check formatting, lints, documentation, dependencies and spelling.
lint:
    .ci/lint

# Fuzz every decoder, or those named after the number, for so many seconds (a minute by default), and add to the corpus.
[positional-arguments]
fuzz *ARGS: setup-tests
    cargo run --package cofferdam-fuzz --bin cofferdam-fuzz -- "$@"

# Measure cost as ratios against a peer in the same run; arguments name parts, as in `just bench import scan`.
bench *ARGS: setup-tests
    cargo run --release --package cofferdam-tests --bin bench -- {{ ARGS }}

# Follow the recipes of docs/recipes.md, the long ones and Nix's included; arguments name them, as in `just recipes npm nix-hello`.
[positional-arguments]
recipes *ARGS: setup-tests
    cargo run --release --package cofferdam-tests --bin recipes -- "$@"

# Run CPython's and libuv's tests in a chroot and in a build, and list those that differ; --all for all of CPython's.
likeness *ARGS: setup-tests
    cargo run --release --package cofferdam-tests --bin likeness -- {{ ARGS }}

# Have a daemon run many builds, kill its processes at random, and check for leftovers.
soak *ARGS: setup-tests
    cargo run --release --package cofferdam-tests --bin soak -- {{ ARGS }}

# Look at the daemon's page with Debian's package `chromium`, and keep pictures of it in a directory (target/page by default).
[positional-arguments]
page-check *ARGS: setup-tests
    cargo run --package cofferdam-tests --bin page-check -- "$@"

# The first of the benchmarks with cloud-hypervisor; without KVM, inside an emulated machine.
bench-cloud-hypervisor: setup-tests
    cargo build --release --package cofferdam-tests --bin bench
    cargo run --release --package cofferdam-tests --bin test-cloud-hypervisor -- --bench

# Make the guest image and print where it is. The first time compiles its kernel, which takes some minutes; `just image --kernel debian` doesn't.
image *ARGS:
    images/setup.sh kernel
    cargo run --release --package cofferdam-images -- {{ ARGS }}

# Make the Debian package in target/package.
package:
    images/setup.sh package
    debian/rules clean binary
    lintian --fail-on error target/package/*.deb

# Make the package twice, at two places, and compare the bytes; half an hour.
package-twice:
    images/setup.sh package
    debian/twice

# Try the package in a fresh Debian 12: install, build, upgrade, remove, purge.
package-trial: package
    debian/trial target/package/*.deb

# Make an archive of the protocol's files, for clients in other languages.
protocol:
    host/proto/bundle.sh

# Make an OCI image of the daemon, with QEMU and the package, in target/package.
container: package
    images/oci.sh
