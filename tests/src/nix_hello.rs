//! GNU hello, built by Nix with a daemon as `tests/recipes/nix/hello.nix` says.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use cofferdam_images::{cache_dir, debian::Debian};

use crate::{
    Cofferdam, Daemon, debian_root,
    nix::{Nix, Release},
    recipes,
};

/// Its name among the recipes.
pub const NAME: &str = "nix-hello";

/// The packages of the toolchain. Their dependencies come along.
const PACKAGES: [&str; 14] = [
    "bash",
    "binutils",
    "coreutils",
    "diffutils",
    "findutils",
    "gawk",
    "gcc",
    "grep",
    "gzip",
    "libc6-dev",
    "make",
    "patchelf",
    "sed",
    "tar",
];

const GREETING: &str = "Hello, world!\n";

/// Builds it, runs it in a build and here, and returns the time of the builds.
///
/// # Errors
///
/// Something can't be fetched, a build failed, or what it made is not right.
pub fn build() -> Result<Duration> {
    let debian = Debian::open(&cache_dir(), false, |line| eprintln!("  {line}"))?;
    let packages = debian.closure(&PACKAGES)?;
    let identity = format!("for Nix {}", debian_root::identity(&packages));
    let unpacked = recipes::cache(&identity, |staging| debian_root::unpack(&packages, &staging.join("root")))?;
    let expression = format!(
        "import {}/recipes/nix/hello.nix {{ debian = {}/root; tarball = {}; }}",
        env!("CARGO_MANIFEST_DIR"),
        unpacked.display(),
        debian.source("hello")?.display()
    );

    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "[build]\nmemory = '1G'");
    let nix = Nix::new(&cofferdam, &daemon, Release::Forky);
    let begun = Instant::now();
    let built = nix.build(&expression).succeeds();
    let took = begun.elapsed();
    let [glibc, greeting, hello] = built.stdout.lines().collect::<Vec<_>>()[..] else {
        bail!("three paths were to be built: {built}");
    };

    let store = nix.store("local");
    let query = |what: &str, path: &str| {
        let told =
            nix.run("nix-store", [Path::new("--store"), &store, "--query".as_ref(), what.as_ref(), path.as_ref()]);
        told.succeeds().stdout.lines().map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let needed = BTreeSet::from([glibc.to_owned(), hello.to_owned()]);
    for what in ["--references", "--requisites"] {
        let found = query(what, hello);
        ensure!(found == needed, "{what} of {hello} are {found:?}, not {needed:?}");
    }
    let place = |path: &str| format!("{}{path}", store.display());
    let greeting = fs::read_to_string(place(greeting))?;
    ensure!(greeting == GREETING, "in a build it says {greeting:?}");
    let mut here = Command::new(place(&format!("{glibc}/lib/ld-linux-x86-64.so.2")));
    here.arg("--library-path").arg(place(&format!("{glibc}/lib"))).arg(place(&format!("{hello}/bin/hello")));
    let here = here.output().context("it can't be run here")?;
    let said = String::from_utf8_lossy(&here.stdout);
    ensure!(here.status.success() && said == GREETING, "here it says {said:?} ({})", here.status);
    daemon.end().succeeds();
    Ok(took)
}
