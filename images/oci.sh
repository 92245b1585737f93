#!/bin/sh
# Makes an OCI image of the daemon, from Debian's packages and this project's: target/package/cofferdam.oci.tar.
#
# Equal packages make equal images.
set -eu
cd "$(dirname "$0")/.."

output=target/package
package=$(find "$output" -name 'cofferdam_*_amd64.deb')
[ "$(printf '%s\n' "$package" | wc -l)" = 1 ] && [ -n "$package" ] || {
    echo "oci: $output must have one package; run: just package" >&2
    exit 1
}
SOURCE_DATE_EPOCH=$(dpkg-parsechangelog -STimestamp)
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Without the recommended packages, which are for QEMU with a screen.
mmdebstrap --quiet --variant=minbase --include="ca-certificates,qemu-system-x86,uidmap,$PWD/$package" \
    --hook-dir=/usr/share/mmdebstrap/hooks/file-mirror-automount \
    --customize-hook='chroot "$1" install -d -m 0700 -o cofferdam -g cofferdam /var/lib/cofferdam' \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/* "$1"/var/log/*' \
    bookworm "$work/root.tar"

umoci init --layout "$work/oci"
umoci new --image "$work/oci:cofferdam"
umoci raw add-layer --image "$work/oci:cofferdam" "$work/root.tar"
created=$(date --utc --date="@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
umoci config --image "$work/oci:cofferdam" --created "$created" --no-history --architecture amd64 --os linux \
    --config.user cofferdam --config.env COFFERDAM_STATE_DIR=/var/lib/cofferdam --config.env COFFERDAM_LOG=info \
    --config.volume /var/lib/cofferdam \
    --config.entrypoint /usr/bin/cofferdam --config.cmd daemon --config.cmd --config --config.cmd /etc/cofferdam/daemon.toml
umoci gc --layout "$work/oci"
tar --create --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" \
    --file "$output/cofferdam.oci.tar" --directory "$work/oci" .
echo "$output/cofferdam.oci.tar"
