//! Debian packages: downloaded and verified by the host's own apt, unpacked, never installed.
//!
//! ```text
//!   the host's sources and keys ─▶ apt, with lists, cache and status of our own ─▶ archives/*.deb ─▶ unpacked/…
//!                                                                              └─▶ answers/<question>
//! ```
//!
//! No package counts as installed, so a closure is complete; no privileges are needed, nothing on the host changes, and
//! every hash and signature is checked as ever. What a question was answered with is remembered: the same question
//! needs no network again, until a refresh is asked for.

mod apt;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use self::apt::{Apt, Lists};
use crate::aside::Aside;
use crate::command::{self, CommandError};

/// Why a package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum DebianError {
    /// apt has no such package, or could not fetch it.
    #[error("could not get {what} through apt; it needs a Debian mirror in /etc/apt and the network")]
    Fetch {
        /// What was asked for.
        what: String,
        /// What apt said.
        #[source]
        source: CommandError,
    },
    /// apt knows nothing that fits.
    #[error("apt knows no {what}; it needs a mirror of Debian 12 or newer in /etc/apt")]
    Unknown {
        /// What was asked for.
        what: String,
    },
    /// A package could not be unpacked.
    #[error("could not unpack {}", package.display())]
    Unpack {
        /// The package.
        package: PathBuf,
        /// What dpkg-deb said.
        #[source]
        source: CommandError,
    },
    /// The package cache could not be used.
    #[error("could not use {}", path.display())]
    Cache {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A downloaded package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The `.deb` file.
    pub path: PathBuf,
}

impl Package {
    /// From a file named as apt names them: `name_version_architecture.deb`, a colon written `%3a`.
    fn from_path(path: PathBuf) -> Option<Self> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".deb")?;
        let mut parts = stem.split('_');
        let (name, version) = (parts.next()?.to_owned(), parts.next()?.replace("%3a", ":"));
        Some(Self { name, version, path })
    }
}

/// Packages of the host's Debian release.
#[derive(Debug)]
pub struct Debian {
    apt: Apt,
    refresh: bool,
}

impl Debian {
    /// Keeps lists, packages and answers below `cache` ([`crate::cache_dir`] is the user's own). `progress` hears one
    /// line before each slow step. With `refresh`, lists are fetched and questions asked anew, however new what is
    /// known.
    ///
    /// # Errors
    ///
    /// [`DebianError::Cache`] when the directory can't be made or written.
    pub fn open(cache: &Path, refresh: bool, progress: fn(&str)) -> Result<Self, DebianError> {
        let directory = cache.join("apt");
        for name in ["answers", "unpacked"] {
            let path = directory.join(name);
            fs::create_dir_all(&path).map_err(|source| DebianError::Cache { path, source })?;
        }
        Ok(Self { apt: Apt::open(directory, refresh, progress)?, refresh })
    }

    /// The newest version of one package, without what it depends on.
    ///
    /// # Errors
    ///
    /// apt doesn't know it or can't fetch it.
    pub fn package(&self, name: &str) -> Result<Package, DebianError> {
        let what = package_question(name);
        self.packages(&what, || self.apt.download(Lists::Binary, &what, &["download", name]))?
            .pop()
            .ok_or(DebianError::Unknown { what })
    }

    /// What [`Debian::package`] answered last, if that is still there.
    pub(crate) fn known_package(&self, name: &str) -> Option<Package> {
        self.known(&package_question(name))?.into_iter().find_map(Package::from_path)
    }

    /// The newest version of the package that `name` depends on and whose own name starts with `prefix`; for packages
    /// that only name the current one.
    ///
    /// # Errors
    ///
    /// apt doesn't know either of them or can't fetch it.
    pub fn package_behind(&self, name: &str, prefix: &str) -> Result<Package, DebianError> {
        let what = format!("package {prefix}… behind {name}");
        let ask = || {
            let control = self.apt.show(name)?;
            let found = control
                .lines()
                .filter_map(|line| line.strip_prefix("Depends: "))
                .find_map(|depends| depends.split([',', ' ', '|']).find(|word| word.starts_with(prefix)))
                .ok_or_else(|| DebianError::Unknown { what: what.clone() })?;
            self.apt.download(Lists::Binary, &format!("package {found}"), &["download", found])
        };
        self.packages(&what, ask)?.pop().ok_or_else(|| DebianError::Unknown { what: what.clone() })
    }

    /// The named packages and all that they depend on, as if nothing were installed; what is only recommended is left
    /// out.
    ///
    /// # Errors
    ///
    /// apt can't resolve or fetch them.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<Package>, DebianError> {
        let what = format!("{} and what they need", names.join(" "));
        let arguments = [&["install", "--yes"], names].concat();
        self.packages(&what, || self.apt.download(Lists::Binary, &what, &arguments))
    }

    /// The upstream tarball that a source package is made from.
    ///
    /// # Errors
    ///
    /// apt doesn't know the source package or can't fetch it.
    pub fn source(&self, name: &str) -> Result<PathBuf, DebianError> {
        let what = format!("source of {name}");
        let files = self.answer(&what, || self.apt.download(Lists::Source, &what, &["source", "--tar-only", name]))?;
        let is_tarball = |path: &PathBuf| {
            let file = path.to_string_lossy();
            file.contains(".orig.tar.") && !file.ends_with(".asc")
        };
        files.into_iter().find(is_tarball).ok_or(DebianError::Unknown { what })
    }

    /// Unpacks a package into a directory, which may exist and hold others.
    ///
    /// # Errors
    ///
    /// [`DebianError::Unpack`]; the directory may hold a part then.
    pub fn unpack(package: &Package, directory: &Path) -> Result<(), DebianError> {
        command::output(Command::new("dpkg-deb").arg("--extract").arg(&package.path).arg(directory))
            .map(drop)
            .map_err(|source| DebianError::Unpack { package: package.path.clone(), source })
    }

    /// A directory that holds just this package, unpacked once and kept.
    pub(crate) fn unpacked(&self, package: &Package) -> Result<PathBuf, DebianError> {
        let parent = self.apt.directory.join("unpacked");
        let kept = parent.join(package.path.file_stem().unwrap_or_default());
        if kept.exists() {
            return Ok(kept);
        }
        let _lock = self.apt.lock()?;
        if !kept.exists() {
            let failed = |source| DebianError::Cache { path: parent.clone(), source };
            let aside = Aside::create(parent.join("new")).map_err(failed)?;
            Self::unpack(package, aside.path())?;
            fs::rename(aside.path(), &kept).map_err(failed)?;
        }
        Ok(kept)
    }

    fn packages(
        &self,
        question: &str,
        ask: impl FnOnce() -> Result<Vec<PathBuf>, DebianError>,
    ) -> Result<Vec<Package>, DebianError> {
        Ok(self.answer(question, ask)?.into_iter().filter_map(Package::from_path).collect())
    }

    /// What `question` was answered with before, if all of it is still there; else what `ask` finds.
    fn answer(
        &self,
        question: &str,
        ask: impl FnOnce() -> Result<Vec<PathBuf>, DebianError>,
    ) -> Result<Vec<PathBuf>, DebianError> {
        let known = || if self.refresh { None } else { self.known(question) };
        if let Some(paths) = known() {
            return Ok(paths);
        }
        let _lock = self.apt.lock()?;
        // Another process may have asked the same while this one waited.
        if let Some(paths) = known() {
            return Ok(paths);
        }
        let paths = ask()?;
        let file_names = paths.iter().filter_map(|path| path.file_name());
        let text: String = file_names.map(|name| format!("{}\n", name.to_string_lossy())).collect();
        self.apt.write(&answer_file(question), &text)?;
        Ok(paths)
    }

    fn known(&self, question: &str) -> Option<Vec<PathBuf>> {
        let text = fs::read_to_string(self.apt.directory.join(answer_file(question))).ok()?;
        let paths: Vec<_> = text.lines().map(|line| self.apt.directory.join("archives").join(line)).collect();
        (!paths.is_empty() && paths.iter().all(|path| path.exists())).then_some(paths)
    }
}

fn package_question(name: &str) -> String {
    format!("package {name}")
}

fn answer_file(question: &str) -> String {
    format!("answers/{}", question.replace([' ', '/'], "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_versions_are_read_from_file_names() {
        let path = PathBuf::from("/cache/busybox-static_1%3a1.35.0-4+b1_amd64.deb");
        let package = Package::from_path(path.clone()).unwrap();
        assert_eq!(package, Package { name: "busybox-static".into(), version: "1:1.35.0-4+b1".into(), path });
        assert_eq!(Package::from_path("lua5.4_5.4.4.orig.tar.gz".into()), None);
    }

    #[test]
    fn an_answer_is_remembered_until_a_file_of_it_is_gone_or_a_refresh_is_asked_for() {
        let cache = tempfile::tempdir().unwrap();
        let asked = std::cell::Cell::new(0);
        let file = cache.path().join("apt/archives/a_1_all.deb");
        let packages = |refresh| {
            let debian = Debian::open(cache.path(), refresh, |_| {}).unwrap();
            let ask = || {
                asked.set(asked.get() + 1);
                fs::write(&file, "").unwrap();
                Ok(vec![file.clone()])
            };
            debian.packages("package a", ask).unwrap()
        };
        assert_eq!(packages(false), packages(false));
        assert_eq!(asked.get(), 1);
        fs::remove_file(&file).unwrap();
        packages(false);
        assert_eq!(asked.get(), 2);
        packages(true);
        assert_eq!(asked.get(), 3);
    }
}
