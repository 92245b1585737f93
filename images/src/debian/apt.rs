//! Runs apt with the host's mirrors, proxies and keys, but with all its own files in one directory.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use super::DebianError;
use crate::command;

/// Package lists younger than this are not downloaded again, except to refresh.
const MAX_LISTS_AGE: Duration = Duration::from_secs(60 * 60);

/// The keys of Debian's archive. If this file is missing, apt's general keyring has them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt's settings; `@` stands for the directory. The host's hooks are cleared, because they are for the host's own
/// updates.
const SETTINGS: &str = r#"Dir::State "@";
Dir::State::lists "@/lists";
Dir::State::status "@/status";
Dir::State::extended_states "@/extended_states";
Dir::Cache "@";
Dir::Cache::archives "@/archives";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Etc::preferences "@/preferences";
Dir::Etc::preferencesparts "/dev/null";
Dir::Log "@";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Keep-Downloaded-Packages "true";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Update::Error-Mode "any";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
"#;

/// Further settings for source packages. Most hosts don't list these, so they have a list of sources of their own.
const SOURCE_SETTINGS: &str = r#"Dir::State::lists "@/source-lists";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "@/sources.list";
Dir::Etc::sourceparts "/dev/null";
"#;

/// Further settings for another release than the host's.
const RELEASE_SETTINGS: &str = r#"Dir::Etc::sourcelist "@/sources.list";
Dir::Etc::sourceparts "/dev/null";
"#;

/// Prefers Debian's packages to those of other vendors in the host's sources.
const PREFERENCES: &str = "Package: *\nPin: release o=Debian\nPin-Priority: 990\n";

/// The lists to search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lists {
    /// The packages in the host's sources.
    Binary,
    /// The source packages of the host's Debian sources.
    Source,
}

/// apt, with a directory of its own.
#[derive(Debug)]
pub(super) struct Apt {
    pub(super) directory: PathBuf,
    pub(super) progress: fn(&str),
    /// Package lists older than this are downloaded again.
    fresh_since: SystemTime,
}

impl Apt {
    /// Writes apt's settings to `directory`. With `refresh`, all package lists are too old.
    pub(super) fn open(directory: PathBuf, refresh: bool, progress: fn(&str)) -> Result<Self, DebianError> {
        for name in ["archives/partial", "empty/partial", "lists/partial", "source-lists/partial"] {
            let path = directory.join(name);
            fs::create_dir_all(&path).map_err(|source| DebianError::Cache { path, source })?;
        }
        let now = SystemTime::now();
        let fresh_since = if refresh { now } else { now - MAX_LISTS_AGE };
        let this = Self { directory, progress, fresh_since };
        let own = this.directory.to_string_lossy().into_owned();
        let settings = SETTINGS.replace('@', &own);
        this.write("settings", &settings)?;
        this.write("source-settings", &format!("{settings}{}", SOURCE_SETTINGS.replace('@', &own)))?;
        this.write("preferences", PREFERENCES)?;
        this.write("status", "")?;
        Ok(this)
    }

    /// As [`Apt::open`], for this release of Debian, from the mirrors of `host`.
    pub(super) fn of_release(
        directory: PathBuf,
        release: &str,
        host: &Self,
        progress: fn(&str),
    ) -> Result<Self, DebianError> {
        let this = Self::open(directory, false, progress)?;
        let own = this.directory.to_string_lossy().into_owned();
        let settings = format!("{SETTINGS}{RELEASE_SETTINGS}").replace('@', &own);
        this.write("settings", &settings)?;
        if !this.directory.join("sources.list").exists() {
            let _lock = host.lock()?;
            host.update(Lists::Binary)?;
            // Others, such as its updates, belong to a release that is out.
            let of_release = |place: &str| {
                let [uri, name, component] = place.split(' ').collect::<Vec<_>>().try_into().ok()?;
                (!name.contains('-')).then(|| format!("{uri} {release} {component}"))
            };
            let places: Vec<_> = host.debian_places()?.iter().filter_map(|place| of_release(place)).collect();
            this.write("sources.list", &sources("deb", &places))?;
        }
        Ok(this)
    }

    /// Waits until no other process uses the directory. Dropping the file unlocks it.
    pub(super) fn lock(&self) -> Result<File, DebianError> {
        let path = self.directory.join("lock");
        let file = File::create(&path).and_then(|file| file.lock().map(|()| file));
        file.map_err(|source| DebianError::Cache { path, source })
    }

    /// Downloads the files that `apt-get` with these arguments needs, and returns their paths.
    pub(super) fn download(&self, lists: Lists, query: &str, arguments: &[&str]) -> Result<Vec<PathBuf>, DebianError> {
        let plan = self.plan(lists, query, arguments)?;
        let archives = self.directory.join("archives");
        let files: Vec<_> = plan
            .lines()
            .filter(|line| line.starts_with('\''))
            .filter_map(|line| line.split(' ').nth(1))
            .map(|file| archives.join(file))
            .collect();
        if files.is_empty() {
            return Err(DebianError::NotFound { query: query.to_owned() });
        }
        if files.iter().any(|file| !file.exists()) {
            (self.progress)(&format!("downloading {query}"));
        }
        // Even if all files exist, since apt checks that they are complete.
        let mut fetch = self.command("apt-get", lists);
        fetch.arg("--download-only").args(arguments).current_dir(&archives);
        command::output(&mut fetch).map_err(|source| fetch_error(query, source))?;
        Ok(files)
    }

    /// What `apt-get` with these arguments would download. The relevant lines are: 'URI' file-name size hash.
    pub(super) fn plan(&self, lists: Lists, query: &str, arguments: &[&str]) -> Result<String, DebianError> {
        self.update(lists)?;
        // apt leaves out files that it finds in its archives, so it gets an empty directory.
        let empty = self.directory.join("empty");
        let mut plan = self.command("apt-get", lists);
        plan.arg(format!("-oDir::Cache::archives={}", empty.display())).arg("--print-uris").args(arguments);
        command::text(plan.current_dir(&empty)).map_err(|source| fetch_error(query, source))
    }

    /// The control file of the package's newest version.
    pub(super) fn show(&self, package: &str) -> Result<String, DebianError> {
        self.update(Lists::Binary)?;
        command::text(self.command("apt-cache", Lists::Binary).args(["show", "--no-all-versions", package]))
            .map_err(|source| fetch_error(&format!("package {package}"), source))
    }

    fn update(&self, lists: Lists) -> Result<(), DebianError> {
        let stamp = self.directory.join(match lists {
            Lists::Binary => "lists/fetched",
            Lists::Source => "source-lists/fetched",
        });
        let fetched = stamp.metadata().and_then(|data| data.modified());
        if fetched.is_ok_and(|fetched| (self.fresh_since..=SystemTime::now()).contains(&fetched)) {
            return Ok(());
        }
        if lists == Lists::Source {
            self.update(Lists::Binary)?;
            self.list_sources()?;
        }
        (self.progress)(match lists {
            Lists::Binary => "downloading Debian's package lists",
            Lists::Source => "downloading Debian's lists of source packages",
        });
        // Another vendor's source may be unavailable. If a needed list is missing, the query fails later.
        match command::output(self.command("apt-get", lists).arg("update")) {
            Ok(_) => fs::write(&stamp, "").map_err(|source| DebianError::Cache { path: stamp, source }),
            Err(error) => {
                (self.progress)(&format!(
                    "some package lists could not be downloaded; continuing without them: {error}"
                ));
                Ok(())
            }
        }
    }

    /// Writes the sources of the source packages: those of the host's Debian packages.
    fn list_sources(&self) -> Result<(), DebianError> {
        self.write("sources.list", &sources("deb-src", &self.debian_places()?))
    }

    /// The host's sources of Debian packages, as in `URI bookworm main`.
    fn debian_places(&self) -> Result<Vec<String>, DebianError> {
        let format = "$(CREATED_BY)|$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)";
        let targets = command::text(self.command("apt-get", Lists::Binary).args(["indextargets", "--format", format]))
            .map_err(|source| fetch_error("the list of sources", source))?;
        let places = targets.lines().filter_map(|line| line.strip_prefix("Packages|Debian|"));
        Ok(places.map(|place| place.replace('|', " ")).collect())
    }

    fn command(&self, program: &str, lists: Lists) -> Command {
        let settings = match lists {
            Lists::Binary => "settings",
            Lists::Source => "source-settings",
        };
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command.arg("-qq").arg("--config-file").arg(self.directory.join(settings));
        command
    }

    /// Replaces a file atomically, and only if its contents change.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<(), DebianError> {
        let path = self.directory.join(name);
        if fs::read_to_string(&path).is_ok_and(|found| found == text) {
            return Ok(());
        }
        let written = || -> io::Result<()> {
            let file = tempfile::NamedTempFile::new_in(&self.directory)?;
            fs::write(file.path(), text)?;
            file.persist(&path)?;
            Ok(())
        };
        written().map_err(|source| DebianError::Cache { path, source })
    }
}

/// A list of sources of this kind, for `URI RELEASE COMPONENT`.
fn sources(kind: &str, places: &[String]) -> String {
    let signed_by = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    let mut lines: Vec<_> = places.iter().map(|place| format!("{kind} {signed_by}{place}\n")).collect();
    lines.sort_unstable();
    lines.dedup();
    lines.concat()
}

fn fetch_error(query: &str, source: command::CommandError) -> DebianError {
    DebianError::Fetch { query: query.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// Uses the host's apt, with no sources.
    #[test]
    fn a_refresh_downloads_lists_of_any_age_once() {
        let cache = tempfile::tempdir().unwrap();
        let stamp = cache.path().join("lists/fetched");
        let fetched = || stamp.metadata().unwrap().modified().unwrap();
        let earlier = SystemTime::now() - MAX_LISTS_AGE / 2;
        for (refresh, fetches) in [(false, false), (true, true)] {
            let apt = Apt::open(cache.path().to_owned(), refresh, |_| {}).unwrap();
            let mut settings = File::options().append(true).open(cache.path().join("settings")).unwrap();
            settings.write_all(b"Dir::Etc::sourcelist \"/dev/null\"; Dir::Etc::sourceparts \"/dev/null\";").unwrap();
            File::create(&stamp).unwrap().set_modified(earlier).unwrap();
            apt.update(Lists::Binary).unwrap();
            assert_eq!(fetched() != earlier, fetches);
            let last = fetched();
            apt.update(Lists::Binary).unwrap();
            assert_eq!(fetched(), last);
        }
    }
}
