//! Real Nix as a client: Debian's package, unpacked and not installed, with a store and a configuration of its own.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Result;
use cofferdam_images::{cache_dir, debian::Debian};

use crate::{Cofferdam, Daemon, Outcome, Running, debian_root, program, recipes, vmm};

/// Releases of Debian, each with a Nix of its time.
#[derive(Debug, Clone, Copy)]
pub enum Release {
    /// Nix 2.8.
    Bookworm,
    /// Nix 2.26.
    Trixie,
    /// Nix 2.34 or later.
    Forky,
}

/// The names by which Nix's one program is called.
const PROGRAMS: [&str; 5] = ["nix", "nix-build", "nix-hash", "nix-instantiate", "nix-store"];

/// An expression in which `make` makes a derivation of a name and a script.
pub fn with_make(expression: &str) -> String {
    let make = r#"name: script: derivation {
        inherit name;
        system = "x86_64-linux";
        builder = "/bin/sh";
        args = [ "-c" script ];
    }"#;
    format!("let make = {make}; in {expression}")
}

const CONFIG: &str = "\
build-users-group =
experimental-features = nix-command
sandbox = false
substitute = false
";

/// A user of Nix, who has a daemon to build with.
#[derive(Debug)]
pub struct Nix<'a> {
    cofferdam: &'a Cofferdam,
    /// Its programs, its configuration, and its stores.
    directory: PathBuf,
    variables: Vec<(&'static str, OsString)>,
}

impl<'a> Nix<'a> {
    /// Nix as this release of Debian has it.
    #[track_caller]
    pub fn new(cofferdam: &'a Cofferdam, daemon: &Daemon, release: Release) -> Self {
        Self::unpacked(cofferdam, release, CONFIG, &daemon.addr())
    }

    /// Nix as this release of Debian has it, with content-addressed derivations.
    #[track_caller]
    pub fn content_addressing(cofferdam: &'a Cofferdam, daemon: &Daemon, release: Release) -> Self {
        let config = format!("{CONFIG}extra-experimental-features = ca-derivations\n");
        Self::unpacked(cofferdam, release, &config, &daemon.addr())
    }

    /// Nix that runs its local builds with `cofferdam nix-external-builder` and these arguments.
    #[track_caller]
    pub fn with_external_builder(cofferdam: &'a Cofferdam, arguments: &[&str]) -> Self {
        let arguments = [&["nix-external-builder"], arguments].concat();
        let builder = serde_json::json!([{ "systems": ["x86_64-linux"], "program": program(), "args": arguments }]);
        let config =
            format!("{CONFIG}extra-experimental-features = external-builders\nexternal-builders = {builder}\n");
        let mut this = Self::unpacked(cofferdam, Release::Forky, &config, "");
        // Below Nix's HOME nothing is installed.
        this.variables.extend(vmm::programs().into_iter().map(|(setting, file)| (setting, file.into_os_string())));
        this
    }

    #[track_caller]
    fn unpacked(cofferdam: &'a Cofferdam, release: Release, config: &str, daemon: &str) -> Self {
        let root = root(release).unwrap_or_else(|error| panic!("there is no Nix: {error:?}"));
        let name = format!("nix-{release:?}").to_lowercase();
        let directory = cofferdam.files().join(&name);
        let place = |name: &str| directory.join(name).into_os_string();
        let programs = PROGRAMS.map(|name| (format!("bin/{name}"), name));
        // What Nix starts for a build elsewhere.
        let hook = ("libexec/nix/build-remote".to_owned(), "build-remote");
        for (path, called) in programs.into_iter().chain([hook]) {
            let script = script(&root, called);
            let path = cofferdam.file(&format!("{name}/{path}"), script);
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it was made just now");
        }
        cofferdam.file(&format!("{name}/config/nix.conf"), config);
        fs::create_dir(directory.join("tmp")).expect("it has a new directory");
        let variables = vec![
            ("COFFERDAM_DAEMON", daemon.into()),
            ("HOME", place("home")),
            ("NIX_BIN_DIR", place("bin")),
            ("NIX_CONF_DIR", place("config")),
            ("NIX_LIBEXEC_DIR", place("libexec")),
            ("NIX_STATE_DIR", place("state")),
            // One that is killed leaves something there.
            ("TMPDIR", place("tmp")),
        ];
        Self { cofferdam, directory, variables }
    }

    /// The daemon's address for Nix.
    pub fn builder(&self) -> String {
        format!("ssh-ng://localhost?remote-program={}%20nix-daemon", program().display())
    }

    /// The daemon's address for the holder of a key.
    pub fn builder_for(&self, key: &str) -> String {
        format!("{}%20--client%20{key}", self.builder())
    }

    /// The daemon's address for a client that is to believe that the daemon knows no later version than 1.`minor`.
    pub fn builder_of(&self, minor: u8) -> String {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/nix_minor.py");
        let (script, program) = (script.display(), program());
        format!("ssh-ng://localhost?remote-program=python3%20{script}%20{minor}%20{}%20nix-daemon", program.display())
    }

    /// The daemon's address by the protocol of old.
    pub fn served_builder(&self) -> String {
        format!("ssh://localhost?remote-program={}%20nix-store", program().display())
    }

    /// Has ssh use these options.
    #[must_use]
    pub fn with_ssh(mut self, options: String) -> Self {
        self.variables.push(("NIX_SSHOPTS", options.into()));
        self
    }

    /// The directory of a local store.
    pub fn store(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Starts one of Nix's programs.
    pub fn start<S: AsRef<OsStr>>(&self, name: &str, arguments: impl IntoIterator<Item = S>) -> Running {
        let arguments: Vec<_> = arguments.into_iter().collect();
        let arguments = arguments.iter().map(AsRef::as_ref);
        let variables: Vec<_> = self.variables.iter().map(|(key, value)| (*key, value.as_os_str())).collect();
        self.cofferdam.start_program(&self.directory.join("bin").join(name), arguments, &variables)
    }

    /// Runs one of Nix's programs.
    pub fn run<S: AsRef<OsStr>>(&self, name: &str, arguments: impl IntoIterator<Item = S>) -> Outcome {
        self.start(name, arguments).end()
    }

    /// Builds an expression, which has [`make`](with_make), with the daemon alone, into the local store `local`.
    pub fn build(&self, expression: &str) -> Outcome {
        self.build_at(&self.builder(), expression)
    }

    /// Starts to build an expression on this host, into the local store `local`.
    pub fn start_here(&self, expression: &str) -> Running {
        let store = self.store("local");
        let store = store.to_str().expect("temporary directories are UTF-8");
        self.start("nix-build", ["--no-out-link", "--store", store, "--builders", "", "-E", expression])
    }

    /// As [`Nix::build`], by this address of the daemon.
    pub fn build_at(&self, builder: &str, expression: &str) -> Outcome {
        let (store, builders) = (self.store("local"), format!("{builder} x86_64-linux - 1 1 kvm,ca-derivations"));
        let store = store.to_str().expect("temporary directories are UTF-8");
        let jobs = ["--max-jobs", "0", "--builders", &builders];
        let expression = with_make(expression);
        self.run("nix-build", [&["--no-out-link", "--store", store, "-E", &expression][..], &jobs].concat())
    }
}

/// Runs Nix with the libraries of its own release.
fn script(root: &Path, name: &str) -> String {
    let root = root.display();
    let libraries = format!("{root}/usr/lib/x86_64-linux-gnu:{root}/usr/lib/nix");
    format!(
        "#!/bin/sh\nexec {root}/lib64/ld-linux-x86-64.so.2 --argv0 {name} --library-path {libraries} {root}/usr/bin/nix \"$@\"\n"
    )
}

/// Nix and its libraries, unpacked once.
fn root(release: Release) -> Result<PathBuf> {
    let release = format!("{release:?}").to_lowercase();
    let debian = Debian::of_release(&cache_dir(), &release, |line| eprintln!("  {line}"))?;
    let packages = debian.closure(&["nix-bin"])?;
    let identity = format!("Nix in {}", debian_root::identity(&packages));
    let made = recipes::cache(&identity, |staging| debian_root::unpack(&packages, &staging.join("root")))?;
    Ok(made.join("root"))
}
