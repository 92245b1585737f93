//! Root file systems of Debian's packages, which are unpacked and not installed.

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use cofferdam_images::debian::Package;
use serde_json::json;
use sha2::{Digest as _, Sha256};

/// The directories of `/usr` that `/` has links to.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// The links that installing would make: a name in `/usr/bin` and its target.
const ALTERNATIVES: [(&str, &str); 3] = [("awk", "gawk"), ("c++", "g++"), ("cc", "gcc")];

/// What a root doesn't need.
const DOCUMENTATION: [&str; 4] = ["./usr/share/doc", "./usr/share/info", "./usr/share/locale", "./usr/share/man"];

/// Stands for the contents of a root.
pub fn identity(packages: &[Package]) -> String {
    format!("{MERGED:?} {ALTERNATIVES:?} {DOCUMENTATION:?} {packages:?}")
}

/// Unpacks packages into a new directory, without documentation.
///
/// # Errors
///
/// A package can't be unpacked.
pub fn unpack(packages: &[Package], root: &Path) -> Result<()> {
    for name in MERGED {
        fs::create_dir_all(root.join("usr").join(name))?;
        symlink(Path::new("usr").join(name), root.join(name))?;
    }
    for package in packages {
        let mut contents = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(package.path())
            .stdout(Stdio::piped())
            .spawn()
            .context("can't start dpkg-deb")?;
        let pipe = contents.stdout.take().context("it is piped")?;
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--keep-directory-symlink"]).args(DOCUMENTATION.map(|path| format!("--exclude={path}")));
        tar.arg("--directory").arg(root).stdin(pipe);
        let unpacked = tar.status().context("can't start tar")?.success();
        ensure!(contents.wait()?.success() && unpacked, "can't unpack {}", package.path().display());
    }
    for (name, target) in ALTERNATIVES {
        if root.join("usr/bin").join(target).exists() {
            symlink(target, root.join("usr/bin").join(name))?;
        }
    }
    Ok(())
}

/// Unpacks the tarball of a source package into a directory.
///
/// # Errors
///
/// The tarball can't be unpacked.
pub fn unpack_source(tarball: &Path, directory: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--strip-components=1", "--file"]).arg(tarball).arg("--directory").arg(directory);
    ensure!(tar.status().context("can't start tar")?.success(), "can't unpack {}", tarball.display());
    Ok(())
}

/// Writes a root as `docker save` does.
///
/// # Errors
///
/// The root can't be read, or the image can't be written.
pub fn save(root: &Path, image: &Path) -> Result<()> {
    let layer = image.with_extension("layer");
    let packed =
        Command::new("tar").arg("--create").arg("--file").arg(&layer).arg("--directory").arg(root).arg(".").status();
    ensure!(packed.context("can't start tar")?.success(), "can't pack {}", root.display());
    let (mut file, mut hasher, mut piece) = (File::open(&layer)?, Sha256::new(), vec![0; 1024 * 1024]);
    while let length @ 1.. = file.read(&mut piece)? {
        hasher.update(&piece[..length]);
    }
    let id = format!("sha256:{}", data_encoding::HEXLOWER.encode(&hasher.finalize()));
    let rootfs = json!({ "type": "layers", "diff_ids": [id] });
    let config = json!({ "os": "linux", "architecture": "amd64", "config": {}, "rootfs": rootfs }).to_string();
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": ["toolchain:latest"], "Layers": ["layer.tar"] }]).to_string();
    let mut archive = tar::Builder::new(File::create(image)?);
    archive.append_path_with_name(&layer, "layer.tar")?;
    for (name, text) in [("config.json", config), ("manifest.json", manifest)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, text.as_bytes())?;
    }
    archive.into_inner()?;
    Ok(fs::remove_file(layer)?)
}
