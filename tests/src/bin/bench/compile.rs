//! A real compilation.

use std::{fs, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use cofferdam_images::{cache_dir, debian::Debian};
use cofferdam_tests::{debian_root, image, program};
use tempfile::TempDir;

use super::measure::{LARGE_ROUNDS, Series, report};

const PACKAGES: [&str; 8] = ["binutils", "coreutils", "dash", "gcc", "libc6-dev", "make", "mount", "util-linux"];

/// Compiles Lua as the demo does, and prints the nanoseconds that it took.
const MAKE: &str = "begun=$(date +%s%N) && make -j2 -C $1 posix > /dev/null && echo took $(($(date +%s%N) - begun))";

/// In the build's own root: the toolchain is an input, the sources are copied to the scratch disk.
const INPUTS: &str = "cp -r --no-preserve=mode /lua/src . && exec sh -c \"$0\" make src";

/// The same with everything on a tmpfs of the guest.
const TMPFS: &str =
    "mkdir root && mount -t tmpfs tmpfs root && cp -r --no-preserve=ownership /bin /lib /lib64 /usr root &&
    cp -r --no-preserve=mode /lua/src root && mkdir root/dev root/tmp && mount --rbind /dev root/dev &&
    exec chroot root sh -c \"$0\" make /src";

pub(crate) fn lua(directory: &TempDir) -> Result<()> {
    let root = directory.path().join("root");
    let debian = Debian::open(&cache_dir(), false, |line| eprintln!("  {line}"))?;
    debian_root::unpack(&debian.closure(&PACKAGES)?, &root)?;
    let sources = root.join("lua");
    fs::create_dir(&sources)?;
    debian_root::unpack_source(&debian.source("lua5.4")?, &sources)?;
    let compile = |script: &str| {
        let mut command = Command::new(program());
        command.env("COFFERDAM_STATE_DIR", directory.path().join("state")).env("COFFERDAM_IMAGE", image().0);
        // Both have the same namespaces.
        command.args(["run", "--user-namespaces", "--memory", "2G", "--root"]).arg(&root).arg("--");
        command.args(["unshare", "--map-root-user", "--mount", "sh", "-c", script, MAKE]);
        let output = command.output().context("can't start cofferdam")?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "Lua wasn't compiled: {log}");
        let took = log.lines().find_map(|line| line.strip_prefix("took ")?.trim().parse().ok());
        Ok(Duration::from_nanos(took.with_context(|| format!("the build doesn't say how long it took: {log}"))?))
    };
    let (mut ours, mut peer) = (Series::default(), Series::default());
    for _ in 0..LARGE_ROUNDS {
        ours.times.push(compile(INPUTS)?);
        peer.times.push(compile(TMPFS)?);
    }
    report("compile Lua : on the guest's tmpfs", &ours, &peer, "≤ 1.05");
    Ok(())
}
