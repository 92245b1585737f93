#!/bin/sh
# Makes an archive of the protocol's files, which import only each other: host/proto/bundle.sh [ARCHIVE]
#
# Equal files make equal archives.
set -eu
archive=$(realpath --canonicalize-missing "${1:-target/package/cofferdam-protocol.tar.gz}")
mkdir -p "$(dirname "$archive")"
cd "$(dirname "$0")"
tar --create --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 --mode=0644 --transform='s,^\.,protocol,' \
    --use-compress-program='gzip --no-name' --file="$archive" ./*.proto
echo "$archive"
