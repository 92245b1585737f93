//! One user of the program: a state directory, and the commands and builds that use it.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::fs::{MetadataExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::unistd::geteuid;
use tempfile::TempDir;

use crate::{
    Build, Outcome, Running, castore::NodeText, copy_program, image, outcome::Expected, processes, processes::Process,
    program, slots::Slots, stretched, vmm,
};

/// A state directory. Dropping it checks that no process and no file of a build is left.
#[derive(Debug)]
pub struct Cofferdam {
    directory: TempDir,
    image: PathBuf,
    /// The command that runs the program as an unprivileged user.
    through: Vec<OsString>,
    /// Variables that name copies of programs.
    copies: Vec<(&'static str, PathBuf)>,
}

impl Default for Cofferdam {
    fn default() -> Self {
        Self::new()
    }
}

impl Cofferdam {
    /// An empty state directory.
    pub fn new() -> Self {
        Self::with_image(image().0)
    }

    /// A state directory whose guests boot from the image in `directory`, which may be missing.
    pub fn with_image(directory: impl Into<PathBuf>) -> Self {
        let image = directory.into();
        let directory = tempfile::Builder::new().prefix("cofferdam-test-").tempdir();
        let directory = directory.expect("a temporary directory can be made");
        for name in ["state", "tmp", "files"] {
            fs::create_dir(directory.path().join(name)).expect("a temporary directory can be written");
        }
        Self { directory, image, through: Vec::new(), copies: Vec::new() }
    }

    /// The state directory of an unprivileged user. If root runs the tests, the user is `nobody`, with copies of files that
    /// may be in root's own directories, and with the group of `/dev/kvm`, as the daemon's unit has it.
    pub fn unprivileged() -> Self {
        let mut this = Self::new();
        if !geteuid().is_root() {
            return this;
        }
        let place = this.directory.path().to_owned();
        let copy = |from: &Path, name: &str| {
            let to = place.join(name);
            copy_program(from, &to);
            to
        };
        let image = place.join("image");
        fs::create_dir(&image).expect("a temporary directory can be written");
        for entry in fs::read_dir(&this.image).expect("the image can be read").flatten() {
            fs::copy(entry.path(), image.join(entry.file_name())).expect("the image can be copied");
        }
        this.image = image;
        for (setting, program) in vmm::programs() {
            let name = program.file_name().expect("it is a file").to_string_lossy().into_owned();
            this.copies.push((setting, copy(&program, &name)));
        }
        let group = fs::metadata("/dev/kvm").map_or(0, |kvm| kvm.gid());
        let groups = if group == 0 { "--clear-groups".to_owned() } else { format!("--groups={group}") };
        let setpriv = ["setpriv", "--reuid=65534", "--regid=65534", &groups, "--no-new-privs"];
        this.through = setpriv.into_iter().map(Into::into).chain([copy(program(), "cofferdam").into()]).collect();
        for path in [&place, &this.image, &place.join("state"), &place.join("tmp"), &place.join("files")] {
            chown(path, Some(65534), Some(65534)).expect("root can give away what it has");
        }
        this
    }

    /// Runs the program by another command, whose last argument it becomes.
    pub fn by(mut self, command: impl IntoIterator<Item = OsString>) -> Self {
        self.through = command.into_iter().chain([program().into()]).collect();
        self
    }

    /// Describes a build.
    pub fn build(&self) -> Build<'_> {
        Build::new(self)
    }

    /// A place for the test's own files.
    pub fn files(&self) -> PathBuf {
        self.directory.path().join("files")
    }

    /// Writes one of the test's own files.
    pub fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.files().join(name);
        fs::create_dir_all(path.parent().expect("it is in a directory")).expect("its directory can be made");
        fs::write(&path, contents).expect("the test's directory can be written");
        path
    }

    /// The state directory itself.
    pub fn state_directory(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// The directory of run directories.
    pub fn run_directory(&self) -> PathBuf {
        self.directory.path().join("state/run")
    }

    /// The directory of blobs that are not durable yet.
    pub fn staging_directory(&self) -> PathBuf {
        self.directory.path().join("state/store/blobs/staging")
    }

    /// A command that ends without a VM.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Outcome {
        self.command_with(&[], arguments)
    }

    /// Like [`command`](Self::command), with environment variables.
    pub fn command_with<S: AsRef<OsStr>>(
        &self,
        variables: &[(&str, &Path)],
        arguments: impl IntoIterator<Item = S>,
    ) -> Outcome {
        let mut command = self.prepare();
        command.args(arguments).envs(variables.iter().copied());
        Running::start(command, Expected::default(), None).end()
    }

    /// Starts a command that needs no VM.
    pub fn start_command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Running {
        let mut command = self.prepare();
        command.args(arguments);
        Running::start(command, Expected::default(), None)
    }

    /// Starts another program that executes ours, with environment variables.
    pub fn start_program<'a>(
        &self,
        program: &Path,
        arguments: impl IntoIterator<Item = &'a OsStr>,
        variables: &[(&str, &OsStr)],
    ) -> Running {
        let ours = self.prepare();
        let mut command = Command::new(program);
        for (key, value) in ours.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        command.current_dir(self.files()).args(arguments).envs(variables.iter().copied());
        Running::start(command, Expected::default(), None)
    }

    /// Imports a path, and returns the printed node.
    #[track_caller]
    pub fn import(&self, path: &Path) -> NodeText {
        let printed = self.command([OsStr::new("import"), path.as_os_str()]).succeeds();
        let node = printed.stdout.split_whitespace().next();
        NodeText::printed(node.unwrap_or_else(|| panic!("import printed nothing: {printed}")))
    }

    /// Exports a node to a new path.
    #[track_caller]
    pub fn export(&self, node: &str) -> PathBuf {
        let to = self.fresh("export");
        self.command([OsStr::new("export"), OsStr::new(node), to.as_os_str()]).succeeds();
        to
    }

    /// A path that doesn't exist.
    pub(crate) fn fresh(&self, prefix: &str) -> PathBuf {
        let made = tempfile::Builder::new().prefix(prefix).tempdir_in(self.files());
        let path = made.expect("the test's directory can be written").keep();
        fs::remove_dir(&path).expect("it was made just now");
        path
    }

    /// The program, with the environment of this state directory and without arguments.
    pub fn prepare(&self) -> Command {
        let mut through = self.through.iter();
        let mut command = Command::new(through.next().map_or(program().as_os_str(), OsString::as_os_str));
        command.args(through);
        for variable in
            ["BLOB_SERVICE_ADDR", "DIRECTORY_SERVICE_ADDR", "COFFERDAM_DAEMON", "COFFERDAM_LOG", "XDG_STATE_HOME"]
        {
            command.env_remove(variable);
        }
        command
            .env("COFFERDAM_STATE_DIR", self.directory.path().join("state"))
            .env("COFFERDAM_IMAGE", &self.image)
            .env("TMPDIR", self.directory.path().join("tmp"))
            .envs(self.copies.iter().cloned())
            .current_dir(self.files());
        command
    }

    pub(crate) fn start(&self, command: Command, expected: Expected, slots: Option<Slots>) -> Running {
        Running::start(command, expected, slots)
    }

    /// All processes that belong to this state directory now.
    pub fn processes(&self) -> Vec<Process> {
        processes::of(self.directory.path())
    }

    /// Waits for the build's process with an executable of this name.
    #[track_caller]
    pub fn helper(&self, name: &str, of: &Running) -> Process {
        let deadline = Instant::now() + stretched(Duration::from_secs(30));
        loop {
            let processes = processes::with_children(self.directory.path(), Some(of.pid()));
            let is_it = |process: &&Process| process.name == name && process.parent == of.pid() && process.is_walled;
            if let Some(found) = processes.iter().find(is_it) {
                return found.clone();
            }
            assert!(Instant::now() < deadline, "no {name} among {processes:#?}\n{}", of.stderr_so_far());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until no process is left. The time is [`stretched`].
    #[track_caller]
    pub fn processes_are_gone_within(&self, patience: Duration) {
        let deadline = Instant::now() + stretched(patience);
        while !self.processes().is_empty() {
            assert!(Instant::now() < deadline, "processes are left: {:#?}", self.processes());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Files that killed or failed builds left in run directories, staging areas and the temporary directory.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        let places = [self.run_directory(), self.staging_directory(), self.directory.path().join("tmp")];
        let entries = places.iter().filter_map(|place| fs::read_dir(place).ok()).flatten();
        let paths = entries.map(|entry| entry.expect("the state directory can be read").path());
        // The directory's own lock file stays.
        paths.filter(|path| path.file_name() != Some(OsStr::new("lock"))).collect()
    }

    /// The file of a committed blob, by its digest in hexadecimal.
    pub fn blob(&self, hex: &str) -> PathBuf {
        self.directory.path().join("state/store/blobs/b3").join(&hex[..2]).join(hex)
    }

    /// Checks that the name of every blob in the store is its digest. Returns the names, sorted.
    #[track_caller]
    pub fn verified_blobs(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut open = vec![self.directory.path().join("state/store/blobs/b3")];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten() {
                let path = entry.expect("the store can be read").path();
                if path.is_dir() {
                    open.push(path);
                    continue;
                }
                let name = path.file_name().expect("it is a file").to_string_lossy().into_owned();
                let mut hasher = blake3::Hasher::new();
                let blob = fs::File::open(&path).expect("the store can be read");
                hasher.update_reader(blob).expect("the store can be read");
                assert_eq!(hasher.finalize().to_hex().as_str(), name, "a blob has changed");
                names.push(name);
            }
        }
        names.sort();
        names
    }
}

impl Drop for Cofferdam {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        let processes = self.processes();
        assert!(processes.is_empty(), "processes are left: {processes:#?}");
        let leftovers = self.leftovers();
        assert!(leftovers.is_empty(), "files are left: {leftovers:#?}");
    }
}
