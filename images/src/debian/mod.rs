//! Debian packages. The host's own apt downloads and verifies them; they are unpacked, but never installed.
//!
//! ```text
//!   the host's sources and keys ─▶ apt, with lists, cache and status of its own ─▶ archives/*.deb ─▶ unpacked/…
//!                                                                              └─▶ answers/<query>
//! ```
//!
//! For this apt no package is installed, so a closure is complete. It checks all hashes and signatures as usual, needs no
//! privileges, and changes nothing on the host. Answers to queries are cached: the same query needs no network again,
//! except after a request to refresh.

mod apt;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use self::apt::{Apt, Lists};
use crate::command::{self, CommandError};
use crate::staging::StagingDir;

/// Why a package is not available.
#[derive(Debug, thiserror::Error)]
pub enum DebianError {
    /// apt has no such package, or could not fetch it.
    #[error("apt could not get {query}; this needs the network, and a Debian mirror in /etc/apt")]
    Fetch {
        /// The query.
        query: String,
        /// apt's error.
        #[source]
        source: CommandError,
    },
    /// apt found no package.
    #[error("apt found no {query}; this needs a mirror of Debian 12 or newer in /etc/apt")]
    NotFound {
        /// The query.
        query: String,
    },
    /// A package could not be unpacked.
    #[error("could not unpack {}", package.display())]
    Unpack {
        /// The package.
        package: PathBuf,
        /// dpkg-deb's error.
        #[source]
        source: CommandError,
    },
    /// The package cache could not be used.
    #[error("could not use {}", path.display())]
    Cache {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// A downloaded package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    /// The `.deb` file.
    pub(crate) path: PathBuf,
}

impl Package {
    /// The `.deb` file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Parses a file name of apt: `name_version_architecture.deb`, where `%3a` stands for a colon.
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
    /// Uses the directory `apt` in `cache`; the user's own is [`crate::cache_dir`]. Calls `progress` with one line before
    /// each slow step. With `refresh`, cached lists and answers are not used.
    ///
    /// # Errors
    ///
    /// [`DebianError::Cache`] if the directory can't be created or written.
    pub fn open(cache: &Path, refresh: bool, progress: fn(&str)) -> Result<Self, DebianError> {
        Ok(Self { apt: Apt::open(prepared(cache.join("apt"))?, refresh, progress)?, refresh })
    }

    /// As [`Debian::open`], for packages of another release, as in `trixie`, in a directory of its own.
    ///
    /// # Errors
    ///
    /// As [`Debian::open`], or the host's apt can't tell its mirrors.
    pub fn of_release(cache: &Path, release: &str, progress: fn(&str)) -> Result<Self, DebianError> {
        let host = Self::open(cache, false, progress)?;
        let directory = prepared(cache.join(format!("apt-{release}")))?;
        Ok(Self { apt: Apt::of_release(directory, release, &host.apt, progress)?, refresh: false })
    }

    /// Downloads the newest version of one package, without dependencies.
    ///
    /// # Errors
    ///
    /// apt can't find or download it.
    pub(crate) fn package(&self, name: &str) -> Result<Package, DebianError> {
        let query = package_query(name);
        self.packages(&query, || self.apt.download(Lists::Binary, &query, &["download", name]))?
            .pop()
            .ok_or(DebianError::NotFound { query })
    }

    /// Where the newest version of a package is: the URI at the host's mirror, and its SHA-256 in hexadecimal.
    ///
    /// # Errors
    ///
    /// apt can't find the package, or has no SHA-256 of it.
    pub fn location(&self, name: &str) -> Result<(String, String), DebianError> {
        let query = package_query(name);
        let plan = self.apt.plan(Lists::Binary, &query, &["download", name])?;
        let location = plan.lines().find_map(|line| {
            let (uri, rest) = line.strip_prefix('\'')?.split_once('\'')?;
            let (_, hash) = rest.rsplit_once(" SHA256:")?;
            Some((uri.to_owned(), hash.to_owned()))
        });
        location.ok_or(DebianError::NotFound { query })
    }

    /// The last answer of [`Debian::package`], if the package is still in the cache.
    pub(crate) fn cached_package(&self, name: &str) -> Option<Package> {
        self.cached(&package_query(name))?.into_iter().find_map(Package::from_path)
    }

    /// Downloads the dependency of `name` whose own name starts with `prefix`. Some packages have no contents, and only
    /// depend on the current version of another package.
    ///
    /// # Errors
    ///
    /// apt can't find one of the two, or can't download the dependency.
    pub(crate) fn dependency(&self, name: &str, prefix: &str) -> Result<Package, DebianError> {
        let query = format!("dependency {prefix}… of {name}");
        let ask = || {
            let control = self.apt.show(name)?;
            let found = control
                .lines()
                .filter_map(|line| line.strip_prefix("Depends: "))
                .find_map(|depends| depends.split([',', ' ', '|']).find(|word| word.starts_with(prefix)))
                .ok_or_else(|| DebianError::NotFound { query: query.clone() })?;
            self.apt.download(Lists::Binary, &format!("package {found}"), &["download", found])
        };
        self.packages(&query, ask)?.pop().ok_or_else(|| DebianError::NotFound { query: query.clone() })
    }

    /// Downloads the named packages and all their dependencies, but no recommended packages.
    ///
    /// # Errors
    ///
    /// apt can't find or download one of them.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<Package>, DebianError> {
        let query = format!("{} and dependencies", names.join(" "));
        let arguments = [&["install", "--yes"], names].concat();
        self.packages(&query, || self.apt.download(Lists::Binary, &query, &arguments))
    }

    /// Downloads the upstream tarball of a source package.
    ///
    /// # Errors
    ///
    /// apt can't find or download the source package.
    pub fn source(&self, name: &str) -> Result<PathBuf, DebianError> {
        let query = format!("source of {name}");
        let files =
            self.answer(&query, || self.apt.download(Lists::Source, &query, &["source", "--tar-only", name]))?;
        let is_tarball = |path: &PathBuf| {
            let file = path.to_string_lossy();
            file.contains(".orig.tar.") && !file.ends_with(".asc")
        };
        files.into_iter().find(is_tarball).ok_or(DebianError::NotFound { query })
    }

    /// Unpacks a package into a directory, which may contain other packages.
    ///
    /// # Errors
    ///
    /// [`DebianError::Unpack`]. The package may be partly unpacked then.
    pub fn unpack(package: &Package, directory: &Path) -> Result<(), DebianError> {
        command::output(Command::new("dpkg-deb").arg("--extract").arg(&package.path).arg(directory))
            .map(drop)
            .map_err(|source| DebianError::Unpack { package: package.path.clone(), source })
    }

    /// A directory in the cache that contains the unpacked package.
    pub(crate) fn unpacked(&self, package: &Package) -> Result<PathBuf, DebianError> {
        let parent = self.apt.directory.join("unpacked");
        let unpacked = parent.join(package.path.file_stem().unwrap_or_default());
        if unpacked.exists() {
            return Ok(unpacked);
        }
        let _lock = self.apt.lock()?;
        if !unpacked.exists() {
            let failed = |source| DebianError::Cache { path: parent.clone(), source };
            let staging = StagingDir::create(parent.join("new")).map_err(failed)?;
            Self::unpack(package, staging.path())?;
            fs::rename(staging.path(), &unpacked).map_err(failed)?;
        }
        Ok(unpacked)
    }

    fn packages(
        &self,
        query: &str,
        ask: impl FnOnce() -> Result<Vec<PathBuf>, DebianError>,
    ) -> Result<Vec<Package>, DebianError> {
        Ok(self.answer(query, ask)?.into_iter().filter_map(Package::from_path).collect())
    }

    /// The cached answer to `query` if its files still exist, or else the result of `ask`.
    fn answer(
        &self,
        query: &str,
        ask: impl FnOnce() -> Result<Vec<PathBuf>, DebianError>,
    ) -> Result<Vec<PathBuf>, DebianError> {
        let cached = || if self.refresh { None } else { self.cached(query) };
        if let Some(paths) = cached() {
            return Ok(paths);
        }
        let _lock = self.apt.lock()?;
        // Another process may have cached the answer while this one waited.
        if let Some(paths) = cached() {
            return Ok(paths);
        }
        let paths = ask()?;
        let file_names = paths.iter().filter_map(|path| path.file_name());
        let text: String = file_names.map(|name| format!("{}\n", name.to_string_lossy())).collect();
        self.apt.write(&answer_file(query), &text)?;
        Ok(paths)
    }

    fn cached(&self, query: &str) -> Option<Vec<PathBuf>> {
        let text = fs::read_to_string(self.apt.directory.join(answer_file(query))).ok()?;
        let paths: Vec<_> = text.lines().map(|line| self.apt.directory.join("archives").join(line)).collect();
        (!paths.is_empty() && paths.iter().all(|path| path.exists())).then_some(paths)
    }
}

/// The same directory, with the directories in it.
fn prepared(directory: PathBuf) -> Result<PathBuf, DebianError> {
    for name in ["answers", "unpacked"] {
        let path = directory.join(name);
        fs::create_dir_all(&path).map_err(|source| DebianError::Cache { path, source })?;
    }
    Ok(directory)
}

fn package_query(name: &str) -> String {
    format!("package {name}")
}

fn answer_file(query: &str) -> String {
    format!("answers/{}", query.replace([' ', '/'], "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_versions_are_parsed_from_file_names() {
        let path = PathBuf::from("/cache/busybox-static_1%3a1.35.0-4+b1_amd64.deb");
        let package = Package::from_path(path.clone()).unwrap();
        assert_eq!(package, Package { name: "busybox-static".into(), version: "1:1.35.0-4+b1".into(), path });
        assert_eq!(Package::from_path("lua5.4_5.4.4.orig.tar.gz".into()), None);
    }

    #[test]
    fn an_answer_is_cached_until_a_file_is_missing_or_a_refresh() {
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
