//! Images and source trees, from the command line.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Result, ensure};
use cofferdam_tests::{debian_root, image, program};
use tempfile::TempDir;

use super::{
    measure::{ROUNDS, Series, report},
    tree::{FILES, make_tree},
};

/// The program with a state directory of its own.
fn cofferdam(state: &Path) -> Command {
    let mut command = Command::new(program());
    command.env("COFFERDAM_STATE_DIR", state).env("COFFERDAM_IMAGE", image().0);
    command
}

/// Imports an OCI image into an empty store; the peer unpacks it.
pub(crate) fn import_image(directory: &TempDir) -> Result<()> {
    let place = |name: &str| directory.path().join(name);
    make_tree(&place("root"))?;
    debian_root::save(&place("root"), &place("saved.tar"))?;
    let [saved, layout, copied] = [
        format!("docker-archive:{}", place("saved.tar").display()),
        format!("oci:{}:1", place("layout").display()),
        format!("dir:{}", place("copied").display()),
    ];
    let skopeo = |from: &str, to: &str| {
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--quiet", "--dest-compress-format", "gzip", from, to]);
        command
    };
    Series::default().run(&mut skopeo(&saved, &layout))?;
    let [mut ours, mut peer, mut syncing] = [(); 3].map(|()| Series::default());
    for _ in 0..ROUNDS {
        nix::unistd::sync();
        ours.run(cofferdam(&place("state")).args(["import", "--format", "oci"]).arg(place("layout")))?;
        nix::unistd::sync();
        peer.run(&mut skopeo(&layout, &copied))?;
        let mut unpacked = Series::default();
        for entry in fs::read_dir(place("copied"))?.collect::<Result<Vec<_>, _>>()? {
            fs::create_dir_all(place("unpacked"))?;
            // The layers; the manifest, the configuration and the version are no archives.
            if entry.metadata()?.len() > 100_000 {
                let mut tar = Command::new("tar");
                tar.arg("-xzf").arg(entry.path()).arg("-C").arg(place("unpacked"));
                unpacked.run(&mut tar)?;
            }
        }
        ensure!(unpacked.times.len() == 1, "skopeo wrote {} layers", unpacked.times.len());
        let begun = Instant::now();
        nix::unistd::sync();
        if let Some(last) = peer.times.last_mut() {
            *last += unpacked.times[0];
            syncing.times.push(*last + begun.elapsed());
        }
        for name in ["state", "copied", "unpacked"] {
            fs::remove_dir_all(place(name))?;
        }
    }
    report("import an OCI image : skopeo, tar x", &ours, &peer, "≤ 1");
    report("import an OCI image : the same, sync", &ours, &syncing, "");
    Ok(())
}

/// What a source tree adds to a build that looks at each of its files once; the peer copies it and does the same.
pub(crate) fn source_tree(directory: &TempDir) -> Result<()> {
    let place = |name: &str| directory.path().join(name);
    make_tree(&place("tree"))?;
    fs::create_dir(place("empty"))?;
    let find = format!("[ $(find . -type f | wc -l) = {FILES} ]");
    let build = |source: &Path, script: &str| {
        let mut command = cofferdam(&place("state"));
        command.args(["run", "--bin-sh", "--source"]).arg(source).args(["--", "/bin/sh", "-c", script]);
        command
    };
    let [mut with, mut without, mut copying, mut finding] = [(); 4].map(|()| Series::default());
    for _ in 0..ROUNDS {
        nix::unistd::sync();
        with.run(&mut build(&place("tree"), &find))?;
        without.run(&mut build(&place("empty"), "true"))?;
        fs::remove_dir_all(place("state"))?;
        nix::unistd::sync();
        copying.run(Command::new("cp").arg("-r").arg(place("tree")).arg(place("copy")))?;
        finding.run(Command::new("sh").args(["-c", &find]).current_dir(place("copy")).stdout(Stdio::null()))?;
        fs::remove_dir_all(place("copy"))?;
    }
    let added = with.times.iter().zip(&without.times).map(|(with, without)| with.saturating_sub(*without)).collect();
    let peer = copying.times.iter().zip(&finding.times).map(|(copying, finding)| *copying + *finding).collect();
    report("--source of 10,000 files, find : cp, find", &Series::of(added), &Series::of(peer), "");
    Ok(())
}
