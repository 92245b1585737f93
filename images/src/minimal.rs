//! The minimal kernel, compiled from Debian's kernel source with the configuration in `images/kernel/config`.
//!
//! ```text
//!   linux-source package ─┐
//!   images/kernel/config ─┴─▶ allnoconfig, checked ─▶ make vmlinux ─▶ <cache>/kernel/<hash of both>/vmlinux
//! ```

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::command::{self, CommandError};
use crate::debian::{Debian, DebianError, Package};
use crate::staging::StagingDir;

const SOURCE_PACKAGE: &str = "linux-source-6.12";

/// `CONFIG_NAME=value  # reason`, one a line.
const CONFIG: &str = include_str!("../kernel/config");

/// Must be increased when the same source and configuration shall produce a different kernel.
const RECIPE: u32 = 1;

/// Why the kernel could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum MinimalError {
    /// The source is not available.
    #[error("could not get the kernel's source")]
    Source(#[source] DebianError),
    /// A step of the compilation failed.
    #[error("could not {step} the minimal kernel; `images/setup.sh kernel` installs what compiling it needs")]
    Step {
        /// unpack, configure, compile, strip.
        step: &'static str,
        /// The program's error.
        #[source]
        source: CommandError,
    },
    /// The finished configuration has other values for these options.
    #[error("the kernel's source does not accept options of images/kernel/config: {}", options.join(", "))]
    NotInEffect {
        /// The options as in `images/kernel/config`.
        options: Vec<String>,
    },
    /// A file could not be read or written.
    #[error("could not use {}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> MinimalError {
    move |source| MinimalError::File { path: path.to_owned(), source }
}

/// The kernel's path, if it has been compiled from this configuration and the source package in the cache.
pub(crate) fn compiled(cache: &Path, debian: &Debian) -> Option<PathBuf> {
    let path = kernel_dir(cache, &debian.cached_package(SOURCE_PACKAGE)?).join("vmlinux");
    path.exists().then_some(path)
}

/// Compiles the kernel unless that was done before, and returns the path of its ELF file. Compiling takes minutes on all
/// cores, and 3 GiB of disk.
///
/// # Errors
///
/// A step failed. Nothing incomplete is left.
pub fn compile(cache: &Path, debian: &Debian, progress: fn(&str)) -> Result<PathBuf, MinimalError> {
    let package = debian.package(SOURCE_PACKAGE).map_err(MinimalError::Source)?;
    let directory = kernel_dir(cache, &package);
    let vmlinux = directory.join("vmlinux");
    let parent = cache.join("kernel");
    fs::create_dir_all(&parent).map_err(file_error(&parent))?;
    let lock = parent.join("lock");
    let _lock = File::create(&lock).and_then(|file| file.lock().map(|()| file)).map_err(file_error(&lock))?;
    if vmlinux.exists() {
        return Ok(vmlinux);
    }
    progress(&format!(
        "compiling the minimal kernel from {} {}, once, which takes some minutes; --kernel debian takes seconds",
        package.name, package.version
    ));
    let work = StagingDir::create(parent.join("compiling")).map_err(file_error(&parent))?;
    let (source, result) = (work.path().join("source"), work.path().join("result"));
    for path in [&source, &result] {
        fs::create_dir(path).map_err(file_error(path))?;
    }
    unpack(&package, work.path(), &source)?;
    configure(&source)?;
    make(&source, "compile", &["vmlinux", &format!("-j{}", thread::available_parallelism().map_or(1, usize::from))])?;
    step("strip", Command::new("strip").arg("-o").arg(result.join("vmlinux")).arg(source.join("vmlinux")))?;
    fs::copy(source.join(".config"), result.join("config")).map_err(file_error(&result))?;
    fs::rename(&result, &directory).map_err(file_error(&directory))?;
    Ok(vmlinux)
}

fn kernel_dir(cache: &Path, package: &Package) -> PathBuf {
    let inputs = format!("{RECIPE}\n{} {}\n{}", package.name, package.version, kconfig());
    cache.join("kernel").join(&blake3::hash(inputs.as_bytes()).to_hex()[..16])
}

fn unpack(package: &Package, work: &Path, source: &Path) -> Result<(), MinimalError> {
    Debian::unpack(package, work).map_err(MinimalError::Source)?;
    let tarball = work.join(format!("usr/src/{}.tar.xz", package.name));
    step("unpack", Command::new("tar").arg("-xJf").arg(tarball).arg("--strip-components=1").arg("-C").arg(source))
}

/// Configures the kernel with these options and nothing else, and checks that all of them are in effect.
fn configure(source: &Path) -> Result<(), MinimalError> {
    let wanted = source.join("cofferdam.config");
    fs::write(&wanted, kconfig()).map_err(file_error(&wanted))?;
    make(source, "configure", &["KCONFIG_ALLCONFIG=cofferdam.config", "allnoconfig"])?;
    let path = source.join(".config");
    let result = fs::read_to_string(&path).map_err(file_error(&path))?;
    let options = not_in_effect(&result);
    if options.is_empty() { Ok(()) } else { Err(MinimalError::NotInEffect { options }) }
}

fn make(source: &Path, name: &'static str, arguments: &[&str]) -> Result<(), MinimalError> {
    let mut make = Command::new("make");
    // Without these, the kernel would contain the time, user and host name.
    make.env("LC_ALL", "C").env("KBUILD_BUILD_TIMESTAMP", "1970-01-01").env("KBUILD_BUILD_VERSION", "1");
    make.env("KBUILD_BUILD_USER", "cofferdam").env("KBUILD_BUILD_HOST", "cofferdam");
    step(name, make.arg("-s").args(arguments).current_dir(source))
}

fn step(step: &'static str, command: &mut Command) -> Result<(), MinimalError> {
    command::output(command).map(drop).map_err(|source| MinimalError::Step { step, source })
}

/// The configuration's options: name, value, reason.
fn options() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    CONFIG.lines().filter(|line| line.starts_with("CONFIG_")).filter_map(|line| {
        let (name, rest) = line.split_once('=')?;
        let (value, reason) = rest.split_once('#').unwrap_or((rest, ""));
        Some((name, value.trim(), reason.trim()))
    })
}

/// The configuration in the syntax of Linux, which has no comments after options.
fn kconfig() -> String {
    let mut text = String::new();
    for (name, value, _) in options() {
        // Writing to a string can't fail.
        let _ = match value {
            "n" => writeln!(text, "# {name} is not set"),
            _ => writeln!(text, "{name}={value}"),
        };
    }
    text
}

/// The options that have other values in a finished `.config`.
fn not_in_effect(config: &str) -> Vec<String> {
    let found = |name: &str| config.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    options()
        .filter(|(name, value, _)| found(name).unwrap_or("n") != *value)
        .map(|(name, value, _)| format!("{name}={value}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_option_has_a_reason_and_is_listed_once() {
        let mut seen = BTreeSet::new();
        for (name, value, reason) in options() {
            assert!(!reason.is_empty(), "{name} has no reason");
            assert!(!value.is_empty() && seen.insert(name), "{name} is listed twice or has no value");
        }
        let lines = CONFIG.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        assert_eq!(lines.count(), seen.len());
    }

    #[test]
    fn a_missing_or_changed_option_is_reported() {
        let kept = kconfig();
        assert_eq!(not_in_effect(&kept), [""; 0]);
        let changed = kept.replace("CONFIG_EXT4_FS=y\n", "").replace("# CONFIG_MODULES is not set", "CONFIG_MODULES=y");
        assert_eq!(not_in_effect(&changed), ["CONFIG_EXT4_FS=y", "CONFIG_MODULES=n"]);
    }
}
