//! Assembles the build's root as [`crate::plan`] says.
//!
//! ```text
//!   /skeleton    tmpfs: N the front of a read-only area, N.lower a bind of a directory of the inputs
//!   /scratch     disk: N the front of a writable area, N.work what overlayfs needs beside its upper
//!   /inputs      virtiofs
//!   /paths       virtiofs: N the Nth path of the host
//!   /build-root  what the build gets to see as /
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
};

use cofferdam_protocol::{INPUTS_TAG, PATHS_TAG, Specification, Step};
use nix::{
    mount::{MsFlags, mount},
    sys::stat::{Mode, SFlag, makedev, mknod},
};

use crate::{
    BUILD_GID, BUILD_UID, INPUTS, PATHS, ROOT, SCRATCH, SHELL, SKELETON, boot,
    error::{Context as _, SetupError, is_wrong_place},
    plan::{Area, Content, Kind, Owner, Placement, Plan, Source},
};

/// No set-user-id program and no device of the build's making works.
const TAME: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Name, major, minor of the device nodes that a build gets.
const DEVICES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// The same of the one for builds that ask for it.
const KVM_DEVICE: (&str, u64, u64) = ("kvm", 10, 232);

/// Name and target of the symlinks in `/dev`.
const DEVICE_LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// An assembled root.
#[derive(Debug)]
pub(crate) struct Root {
    /// Where, below the root, `/proc` has to be mounted.
    pub(crate) processes: PathBuf,
    /// Opened, gives a new pseudo-terminal of those that the build sees.
    pub(crate) terminals: PathBuf,
    /// Where, below the root, the build can write, and the directories that hold what it has written there.
    pub(crate) writable: BTreeMap<PathBuf, PathBuf>,
}

/// Mounts the inputs and assembles the root.
pub(crate) fn assemble(specification: &Specification) -> Result<Root, SetupError> {
    mount_share(INPUTS_TAG, INPUTS)?;
    if !specification.host_paths.is_empty() {
        mount_share(PATHS_TAG, PATHS)?;
    }
    if specification.kvm {
        boot::load_kvm().context(Step::Root, || "load the kernel's KVM")?;
    }
    let plan = Plan::new(specification, &|path| Kind::of(&Path::new(INPUTS).join(path)))?;
    attach(Some("skeleton"), Path::new(SKELETON), "tmpfs", TAME, Some("mode=0755"))
        .context(Step::Root, || "mount a tmpfs")?;
    let fronts = plan.areas.iter().enumerate().map(|(n, area)| make_front(n, area)).collect::<Result<Vec<_>, _>>()?;
    for directory in &plan.directories {
        let front = &fronts[directory.area];
        if let Err(error) = front.make_directory(&directory.path, directory.owner, directory.shared) {
            let step = if is_wrong_place(&error) { Step::Places } else { Step::Root };
            let at = front.at.join(&directory.path);
            return Err(error).context(step, || format!("make {at:?} in the build's root"));
        }
    }
    for file in &plan.files {
        fronts[file.area].place(file)?;
    }
    for (number, (area, front)) in plan.areas.iter().zip(&fronts).enumerate() {
        mount_area(area, front, plan.is_bare(number), specification.kvm)
            .context(Step::Root, || format!("mount {:?} in the build's root", area.at))?;
    }
    let devices = plan.areas.iter().find(|area| area.content == Content::Devices).map(|area| area.at.as_path());
    let is_writable = |area: &Area| matches!(area.content, Content::Front { writable: true, .. });
    let writable = plan.areas.iter().zip(fronts).filter(|(area, _)| is_writable(area));
    Ok(Root {
        processes: plan.processes().unwrap_or(Path::new("proc")).to_path_buf(),
        terminals: Path::new(ROOT).join(devices.unwrap_or(Path::new("dev"))).join("pts/ptmx"),
        writable: writable.map(|(area, front)| (area.at.clone(), front.path)).collect(),
    })
}

fn mount_share(tag: &str, at: &str) -> Result<(), SetupError> {
    attach(Some(tag), Path::new(at), "virtiofs", TAME | MsFlags::MS_RDONLY, None)
        .context(Step::Inputs, || format!("mount the virtiofs device {tag:?}"))
}

/// The directory that an area shows.
struct Front<'a> {
    at: &'a Path,
    path: PathBuf,
    /// The inputs that shine through.
    lower: Option<PathBuf>,
    /// Owner of what is made on the way to something placed, unless the inputs have a directory there.
    owner: Owner,
    number: usize,
}

fn make_front(number: usize, area: &Area) -> Result<Front<'_>, SetupError> {
    let (base, owner, shared) = match area.content {
        Content::Front { writable: true, shared, .. } => (SCRATCH, Owner::Build, shared),
        _ => (SKELETON, Owner::Machine, false),
    };
    let lower = match &area.content {
        Content::Front { lower: Some(lower), .. } => Some(Path::new(INPUTS).join(lower)),
        _ => None,
    };
    let front = Front { at: &area.at, path: Path::new(base).join(number.to_string()), lower, owner, number };
    make_directory(&front.path, owner, shared).context(Step::Root, || format!("make {:?}", front.path))?;
    Ok(front)
}

impl Front<'_> {
    fn make_directory(&self, path: &Path, owner: Owner, shared: bool) -> io::Result<()> {
        self.make_parents(path)?;
        make_directory(&self.path.join(path), owner, shared)
    }

    fn make_parents(&self, path: &Path) -> io::Result<()> {
        for parent in path.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev().skip(1) {
            let over_inputs = self.lower.as_ref().is_some_and(|lower| lower.join(parent).is_dir());
            let owner = if over_inputs { Owner::Machine } else { self.owner };
            make_directory(&self.path.join(parent), owner, false)?;
        }
        Ok(())
    }

    fn place(&self, file: &Placement<'_>) -> Result<(), SetupError> {
        let written = match file.source {
            Source::Request { contents, .. } => self.write(file, 0o644, contents),
            Source::Machine(contents) => self.write(file, 0o644, contents.as_bytes()),
            Source::Shell => File::open(SHELL).and_then(|shell| self.write(file, 0o755, shell)),
        };
        match (file.source, written) {
            (Source::Request { name, .. }, Err(error)) => {
                Err(error).context(Step::AdditionalFiles, || format!("place additional file {name:?}"))
            }
            // The request has put something else there or on the way to it.
            (_, Err(error)) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            (Source::Machine(_), Err(error)) if error.kind() == io::ErrorKind::NotADirectory => Ok(()),
            (Source::Shell, Err(error)) if error.kind() == io::ErrorKind::NotADirectory => {
                Err(error).context(Step::Places, || "place /bin/sh")
            }
            (_, other) => other.context(Step::Root, || format!("place {:?}", self.at.join(&file.path))),
        }
    }

    fn write(&self, file: &Placement<'_>, mode: u32, mut contents: impl io::Read) -> io::Result<()> {
        self.make_parents(&file.path)?;
        let path = self.path.join(&file.path);
        let mut out = OpenOptions::new().write(true).create_new(true).open(&path)?;
        io::copy(&mut contents, &mut out)?;
        dress(&path, file.owner, mode)
    }
}

/// Makes a directory, unless there is one.
fn make_directory(path: &Path, owner: Owner, shared: bool) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        other => other?,
    }
    dress(path, owner, if shared { 0o1777 } else { 0o755 })
}

fn dress(path: &Path, owner: Owner, mode: u32) -> io::Result<()> {
    match owner {
        Owner::Machine => {}
        Owner::Build => chown(path, Some(BUILD_UID), Some(BUILD_GID))?,
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn mount_area(area: &Area, front: &Front<'_>, bare: bool, kvm: bool) -> io::Result<()> {
    let at = Path::new(ROOT).join(&area.at);
    match &area.content {
        // Nothing to put over the inputs: they are mounted read-only already.
        Content::Front { writable: false, lower: Some(_), .. } if bare => bind_lower(front, &at),
        Content::Processes => Ok(()),
        Content::Devices => mount_devices(&at, kvm),
        Content::Host { number, .. } => bind(&Path::new(PATHS).join(number.to_string()), &at),
        Content::Front { writable, lower: None, .. } => {
            bind(&front.path, &at)?;
            if *writable {
                return Ok(());
            }
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | TAME;
            attach(None, &at, "none", flags, None)
        }
        Content::Front { writable, lower: Some(_), .. } => {
            // Overlay gets a name of our own, since the inputs' may hold what its options give a meaning to.
            let below = PathBuf::from(format!("{SKELETON}/{}.lower", front.number));
            fs::create_dir(&below)?;
            bind_lower(front, &below)?;
            mount_overlay(&at, front, &below, *writable)
        }
    }
}

fn mount_overlay(at: &Path, front: &Front<'_>, below: &Path, writable: bool) -> io::Result<()> {
    let (front, below, number) = (front.path.display(), below.display(), front.number);
    if !writable {
        let options = format!("lowerdir={front}:{below}");
        return attach(Some("overlay"), at, "overlay", TAME | MsFlags::MS_RDONLY, Some(&options));
    }
    let work = format!("{SCRATCH}/{number}.work");
    fs::create_dir(&work)?;
    // redirect_dir: directories of the inputs can be renamed. volatile: nothing here outlives the machine.
    let options = format!(
        "lowerdir={below},upperdir={front},workdir={work},redirect_dir=on,metacopy=off,index=off,xino=off,volatile"
    );
    attach(Some("overlay"), at, "overlay", TAME, Some(&options))
}

fn mount_devices(at: &Path, kvm: bool) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    attach(Some("dev"), at, "tmpfs", flags, Some("mode=0755,size=64k,nr_inodes=64"))?;
    for (name, major, minor) in DEVICES.into_iter().chain(kvm.then_some(KVM_DEVICE)) {
        let path = at.join(name);
        mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    }
    for (name, target) in DEVICE_LINKS {
        symlink(target, at.join(name))?;
    }
    for (name, file_system, options) in
        [("shm", "tmpfs", "mode=1777,size=50%"), ("pts", "devpts", "newinstance,ptmxmode=0666,mode=0620")]
    {
        let path = at.join(name);
        fs::create_dir(&path)?;
        let nodev = if name == "shm" { MsFlags::MS_NODEV } else { MsFlags::empty() };
        attach(Some(name), &path, file_system, flags.difference(MsFlags::MS_NOEXEC) | nodev, Some(options))?;
    }
    attach(None, at, "none", flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None)
}

fn bind_lower(front: &Front<'_>, at: &Path) -> io::Result<()> {
    front.lower.as_ref().map_or(Ok(()), |lower| bind(lower, at))
}

fn bind(source: &Path, target: &Path) -> io::Result<()> {
    Ok(mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

fn attach(
    source: Option<&str>,
    target: &Path,
    file_system: &str,
    flags: MsFlags,
    options: Option<&str>,
) -> io::Result<()> {
    Ok(mount(source, target, Some(file_system), flags, options)?)
}
