//! Mounts the build's root by its [`Plan`].
//!
//! ```text
//!   /skeleton    tmpfs: N is the upper layer of a read-only mount, N.lower a bind mount of a directory of the inputs
//!   /scratch     disk: layers/N is the upper layer of a writable mount, layers/N.work the work directory of its overlay
//!   /inputs      virtiofs
//!   /paths       virtiofs: N is the Nth host path
//!   /build-root  the build's /; a tmpfs in it has the secrets
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
};

use cofferdam_protocol::{BUILD_GID, BUILD_UID, INPUTS_TAG, PATHS_TAG, Secret, Specification, Step};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, SFlag, makedev, mknod},
};

use crate::{
    boot,
    error::{Context as _, SetupError, is_path_error},
    layout::{INPUTS, LAYERS, PATHS, ROOT, SHELL, SKELETON},
    plan::{Content, Kind, Mount, NewFile, Owner, Plan, Source},
};

/// Disables set-user-id programs, and device nodes.
const RESTRICTED: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Name, major and minor of the device nodes in `/dev`.
const DEVICES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// The same, in builds that ask for `/dev/kvm`.
const KVM_DEVICE: (&str, u64, u64) = ("kvm", 10, 232);

/// Names and targets of the symlinks in `/dev`.
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
    /// Mount point of procfs, relative to the root. Only the build's init can mount it.
    pub(crate) proc: PathBuf,
    /// The same of sysfs.
    pub(crate) sys: PathBuf,
    /// `ptmx` of the build's own devpts.
    pub(crate) ptmx: PathBuf,
    /// Mount point of the secrets, if there are any.
    secrets: Option<PathBuf>,
    /// The writable mount points, relative to the root, and the upper layer of each.
    pub(crate) writable: BTreeMap<PathBuf, PathBuf>,
}

/// Mounts the inputs. Nothing may look into them before there is a request: the device answers only then.
pub(crate) fn mount_inputs() -> Result<(), SetupError> {
    mount_share(INPUTS_TAG, INPUTS)
}

/// Plans the root over the mounted inputs.
pub(crate) fn plan(specification: &Specification) -> Result<Plan<'_>, SetupError> {
    if !specification.host_paths.is_empty() {
        mount_share(PATHS_TAG, PATHS)?;
    }
    if specification.kvm {
        boot::load_kvm().context(Step::Root, || "provide /dev/kvm")?;
    }
    plan_over_inputs(specification)
}

/// Plans the root over what is mounted in place of the inputs.
pub(crate) fn plan_over_inputs(specification: &Specification) -> Result<Plan<'_>, SetupError> {
    Plan::new(specification, &|path| Kind::of(&Path::new(INPUTS).join(path)))
}

/// Assembles the planned root.
pub(crate) fn assemble(plan: &Plan<'_>, specification: &Specification) -> Result<Root, SetupError> {
    mount_at(Some("skeleton"), Path::new(SKELETON), "tmpfs", RESTRICTED, Some("mode=0755"))
        .context(Step::Root, || "mount a tmpfs")?;
    let uppers =
        plan.mounts.iter().enumerate().map(|(n, mount)| make_upper(n, mount)).collect::<Result<Vec<_>, _>>()?;
    for directory in &plan.directories {
        let upper = &uppers[directory.mount];
        if let Err(error) = upper.make_directory(&directory.path, directory.owner, directory.shared) {
            let step = if is_path_error(&error) { Step::Places } else { Step::Root };
            let at = upper.at.join(&directory.path);
            return Err(error).context(step, || format!("make {at:?} in the build's root"));
        }
    }
    let mut shell = None;
    for file in &plan.files {
        let upper = &uppers[file.mount];
        if upper.make_file(file)? && matches!(file.source, Source::Shell) && !upper.is_writable() {
            shell = Some(upper.at.join(&file.path));
        }
    }
    for (number, (mount, upper)) in plan.mounts.iter().zip(&uppers).enumerate() {
        mount_planned(mount, upper, plan.has_empty_upper(number), specification)
            .context(Step::Root, || format!("mount {:?} in the build's root", mount.at))?;
    }
    if let Some(at) = shell {
        bind_read_only(Path::new(SHELL), &Path::new(ROOT).join(at)).context(Step::Root, || "mount /bin/sh")?;
    }
    let mount_point = |content, default| plan.mount_point(content).unwrap_or(Path::new(default));
    let is_writable = |mount: &Mount| matches!(mount.content, Content::Layers { writable: true, .. });
    let writable = plan.mounts.iter().zip(uppers).filter(|(mount, _)| is_writable(mount));
    Ok(Root {
        proc: mount_point(&Content::Proc, "proc").to_path_buf(),
        sys: mount_point(&Content::Sys, "sys").to_path_buf(),
        ptmx: Path::new(ROOT).join(mount_point(&Content::Devices, "dev")).join("pts/ptmx"),
        secrets: plan.mount_point(&Content::Secrets).map(|at| Path::new(ROOT).join(at)),
        writable: writable.map(|(mount, upper)| (mount.at.clone(), upper.path)).collect(),
    })
}

impl Root {
    /// Takes the secrets away, so that they are in no output.
    pub(crate) fn remove_secrets(&self) -> Result<(), SetupError> {
        let Some(at) = &self.secrets else { return Ok(()) };
        umount2(at, MntFlags::MNT_DETACH).context(Step::Root, || format!("unmount {at:?}"))
    }
}

fn mount_share(tag: &str, at: &str) -> Result<(), SetupError> {
    mount_at(Some(tag), Path::new(at), "virtiofs", RESTRICTED | MsFlags::MS_RDONLY, None)
        .context(Step::Inputs, || format!("mount the virtiofs device {tag:?}"))
}

/// The upper layer of a mount.
struct Upper<'a> {
    /// The mount point, relative to the build's root.
    at: &'a Path,
    /// The layer's directory.
    path: PathBuf,
    /// The lower layer's directory.
    lower: Option<PathBuf>,
    /// Owner of the parents that are made here. Parents over a directory of the inputs belong to root, as inputs do.
    owner: Owner,
    /// The mount's index.
    number: usize,
}

fn make_upper(number: usize, mount: &Mount) -> Result<Upper<'_>, SetupError> {
    let (base, owner, shared) = match mount.content {
        Content::Layers { writable: true, shared, .. } => (LAYERS, Owner::Build, shared),
        _ => (SKELETON, Owner::Root, false),
    };
    let lower = match &mount.content {
        Content::Layers { lower: Some(lower), .. } => Some(Path::new(INPUTS).join(lower)),
        _ => None,
    };
    let upper = Upper { at: &mount.at, path: Path::new(base).join(number.to_string()), lower, owner, number };
    make_directory(&upper.path, owner, shared).context(Step::Root, || format!("make {:?}", upper.path))?;
    Ok(upper)
}

impl Upper<'_> {
    fn is_writable(&self) -> bool {
        self.owner == Owner::Build
    }

    fn make_directory(&self, path: &Path, owner: Owner, shared: bool) -> io::Result<()> {
        self.make_parents(path)?;
        make_directory(&self.path.join(path), owner, shared)
    }

    fn make_parents(&self, path: &Path) -> io::Result<()> {
        for parent in path.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev().skip(1) {
            let over_inputs = self.lower.as_ref().is_some_and(|lower| lower.join(parent).is_dir());
            let owner = if over_inputs { Owner::Root } else { self.owner };
            make_directory(&self.path.join(parent), owner, false)?;
        }
        Ok(())
    }

    /// Makes a file, but the shell only as a mount point unless the mount is writable. `false` if another file has its path.
    fn make_file(&self, file: &NewFile<'_>) -> Result<bool, SetupError> {
        let written = match file.source {
            Source::Request { contents, .. } | Source::Default(contents) => self.write(file, 0o644, contents),
            Source::Shell if !self.is_writable() => self.write(file, 0o755, io::empty()),
            Source::Shell => File::open(SHELL).and_then(|shell| self.write(file, 0o755, shell)),
        };
        match (file.source, written) {
            (Source::Request { name, .. }, Err(error)) => {
                Err(error).context(Step::AdditionalFiles, || format!("make additional file {name:?}"))
            }
            // A file of the request has this path, or the path of a parent.
            (_, Err(error)) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            (Source::Default(_), Err(error)) if error.kind() == io::ErrorKind::NotADirectory => Ok(false),
            (Source::Shell, Err(error)) if error.kind() == io::ErrorKind::NotADirectory => {
                Err(error).context(Step::Places, || "make /bin/sh")
            }
            (_, other) => other.map(|()| true).context(Step::Root, || format!("make {:?}", self.at.join(&file.path))),
        }
    }

    fn write(&self, file: &NewFile<'_>, mode: u32, mut contents: impl io::Read) -> io::Result<()> {
        self.make_parents(&file.path)?;
        let path = self.path.join(&file.path);
        let mut out = OpenOptions::new().write(true).create_new(true).open(&path)?;
        io::copy(&mut contents, &mut out)?;
        set_owner_and_mode(&path, file.owner, mode)
    }
}

/// Makes a directory unless it exists.
fn make_directory(path: &Path, owner: Owner, shared: bool) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        other => other?,
    }
    set_owner_and_mode(path, owner, if shared { 0o1777 } else { 0o755 })
}

fn set_owner_and_mode(path: &Path, owner: Owner, mode: u32) -> io::Result<()> {
    if owner == Owner::Build {
        chown(path, Some(BUILD_UID), Some(BUILD_GID))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn mount_planned(
    mount: &Mount,
    upper: &Upper<'_>,
    has_empty_upper: bool,
    specification: &Specification,
) -> io::Result<()> {
    let at = Path::new(ROOT).join(&mount.at);
    match &mount.content {
        // The inputs are read-only already.
        Content::Layers { writable: false, lower: Some(_), .. } if has_empty_upper => bind_lower(upper, &at),
        Content::Proc | Content::Sys => Ok(()),
        Content::Devices => mount_devices(&at, specification.kvm),
        Content::Secrets => mount_secrets(&at, &specification.secrets),
        Content::HostPath { number, .. } => bind(&Path::new(PATHS).join(number.to_string()), &at),
        Content::Layers { writable, lower: None, .. } => {
            if *writable {
                bind(&upper.path, &at)
            } else {
                bind_read_only(&upper.path, &at)
            }
        }
        Content::Layers { writable, lower: Some(_), .. } => {
            // The inputs' own path may contain characters that are special in the options of overlayfs.
            let lower = PathBuf::from(format!("{SKELETON}/{}.lower", upper.number));
            fs::create_dir(&lower)?;
            bind_lower(upper, &lower)?;
            mount_overlay(&at, upper, &lower, *writable)
        }
    }
}

fn mount_overlay(at: &Path, upper: &Upper<'_>, lower: &Path, writable: bool) -> io::Result<()> {
    let (upper, lower, number) = (upper.path.display(), lower.display(), upper.number);
    if !writable {
        let options = format!("lowerdir={upper}:{lower}");
        return mount_at(Some("overlay"), at, "overlay", RESTRICTED | MsFlags::MS_RDONLY, Some(&options));
    }
    let work = format!("{LAYERS}/{number}.work");
    fs::create_dir(&work)?;
    // redirect_dir lets builds rename directories of the inputs. volatile skips flushes: the disk's contents are lost
    // with the machine.
    let options = format!(
        "lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=on,metacopy=off,index=off,xino=on,volatile"
    );
    mount_at(Some("overlay"), at, "overlay", RESTRICTED, Some(&options))
}

fn mount_devices(at: &Path, kvm: bool) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_at(Some("dev"), at, "tmpfs", flags, Some("mode=0755,size=64k,nr_inodes=64"))?;
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
        mount_at(Some(name), &path, file_system, flags.difference(MsFlags::MS_NOEXEC) | nodev, Some(options))?;
    }
    mount_at(None, at, "none", flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None)
}

fn mount_secrets(at: &Path, secrets: &[Secret]) -> io::Result<()> {
    let flags = RESTRICTED | MsFlags::MS_NOEXEC;
    mount_at(Some("secrets"), at, "tmpfs", flags, Some("mode=0755"))?;
    for Secret { name, contents } in secrets {
        let path = at.join(name);
        OpenOptions::new().write(true).create_new(true).mode(0o400).open(&path)?.write_all(contents)?;
        chown(&path, Some(BUILD_UID), Some(BUILD_GID))?;
    }
    mount_at(None, at, "none", flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None)
}

fn bind_lower(upper: &Upper<'_>, at: &Path) -> io::Result<()> {
    upper.lower.as_ref().map_or(Ok(()), |lower| bind(lower, at))
}

fn bind(source: &Path, target: &Path) -> io::Result<()> {
    Ok(mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

fn bind_read_only(source: &Path, target: &Path) -> io::Result<()> {
    bind(source, target)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | RESTRICTED;
    mount_at(None, target, "none", flags, None)
}

fn mount_at(
    source: Option<&str>,
    target: &Path,
    file_system: &str,
    flags: MsFlags,
    options: Option<&str>,
) -> io::Result<()> {
    Ok(mount(source, target, Some(file_system), flags, options)?)
}
