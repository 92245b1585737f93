//! The costs of plain Nix as a client.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use cofferdam_proto::{
    cofferdam::v1::{ListRequest, build_service_client::BuildServiceClient as OurClient},
    snix::build::v1::build_service_client::BuildServiceClient as SnixClient,
};
use cofferdam_tests::{
    Cofferdam, Daemon,
    nix::{Nix, Release},
    request::{encoded, shell},
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{
    measure::{ROUNDS, Series, report},
    tree::make_tree,
};

const RELEASE: Release = Release::Forky;

pub(crate) fn nix(directory: &TempDir) -> Result<()> {
    builds()?;
    copies(directory.path())
}

/// The time of trivial builds without their machines', by Nix and by a client as snix has it.
fn builds() -> Result<()> {
    let runtime = Runtime::new()?;
    let _entered = runtime.enter();
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let nix = Nix::new(&cofferdam, &daemon, RELEASE);
    let mut client = SnixClient::new(daemon.peer().raw_channel());
    let [mut ours, mut snix] = [(); 2].map(|()| Series::default());
    for round in 0..ROUNDS {
        let derivation = format!(
            r#"derivation {{
              name = "round-{round}";
              system = "x86_64-linux";
              builder = "/bin/sh";
              args = [ "-c" "echo {round} > $out" ];
            }}"#
        );
        let begun = Instant::now();
        nix.build(&derivation).succeeds();
        let took = begun.elapsed();
        ours.times.push(took.saturating_sub(runtime.block_on(lived(&daemon))?));
        let begun = Instant::now();
        runtime.block_on(client.do_build(encoded(shell(&format!("echo {round} > out"), &["build/out"]))))?;
        let took = begun.elapsed();
        snix.times.push(took.saturating_sub(runtime.block_on(lived(&daemon))?));
    }
    report("build by Nix, less its VM : as snix does", &ours, &snix, "");
    daemon.end().succeeds();
    Ok(())
}

/// How long the machine of the latest build ran.
async fn lived(daemon: &Daemon) -> Result<Duration> {
    let mut client = OurClient::new(daemon.peer().raw_channel());
    let builds = client.list(ListRequest { active: false, limit: 1 }).await?.into_inner().builds;
    let times = builds.first().and_then(|build| build.times.as_ref()).context("no build has ended")?;
    Ok(Duration::from_micros(times.boot_us + times.run_us))
}

/// The times of a closure of 101 paths and 10,000 files to a daemon and back, and of the same between two local stores.
fn copies(directory: &Path) -> Result<()> {
    let tree = directory.join("tree");
    make_tree(&tree)?;
    let expression = format!(
        r#"let
          tree = {};
          path = name: builtins.path {{ inherit name; path = tree + "/${{name}}"; }};
        in builtins.toFile "all" (toString (map path (builtins.attrNames (builtins.readDir tree))))"#,
        tree.display()
    );
    let [mut put, mut get, mut peer_put, mut peer_get] = [(); 4].map(|()| Series::default());
    for _ in 0..ROUNDS {
        let cofferdam = Cofferdam::new();
        let daemon = Daemon::start(&cofferdam, "");
        let nix = Nix::new(&cofferdam, &daemon, RELEASE);
        let [local, first, second, third] =
            ["local", "first", "second", "third"].map(|name| nix.store(name).display().to_string());
        let evaluate = ["--eval", "--read-write-mode", "--json", "--store", &local, "-E", &expression];
        let evaluated = nix.run("nix-instantiate", evaluate).succeeds();
        let path: String = serde_json::from_str(&evaluated.stdout)?;
        let copy = |from: &str, to: &str, series: &mut Series| {
            ::nix::unistd::sync();
            let begun = Instant::now();
            nix.run("nix", ["copy", "--no-check-sigs", "--from", from, "--to", to, &path]).succeeds();
            series.times.push(begun.elapsed());
        };
        let daemons = nix.builder();
        copy(&local, &daemons, &mut put);
        copy(&local, &first, &mut peer_put);
        copy(&daemons, &second, &mut get);
        copy(&local, &third, &mut peer_get);
        let query = ["--store", &second, "--query", "--requisites", &path];
        let requisites = nix.run("nix-store", query).succeeds().stdout.lines().count();
        ensure!(requisites == 101, "{requisites} paths came");
        daemon.end().succeeds();
    }
    report("10,000 files to a daemon : local stores", &put, &peer_put, "");
    report("10,000 files from a daemon : the same", &get, &peer_get, "");
    Ok(())
}
