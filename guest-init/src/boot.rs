//! From the first instruction of guest-init to a machine that can connect to the host.

use std::{
    fs::{self, OpenOptions},
    io,
    os::fd::{AsRawFd as _, IntoRawFd as _},
    path::Path,
    time::Duration,
};

use nix::{
    fcntl::{OFlag, open},
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        stat::{Mode, umask},
    },
    time::{ClockId, clock_settime},
    unistd::{chdir, chroot, pause},
};

use crate::layout::{INPUTS, PATHS, ROOT, SCRATCH, SKELETON};

/// Where the modules are.
const MODULES: &str = "/lib";

/// What modules are for. The file of this name lists those of [`MODULES`] to load, one a line, in order. It is empty or
/// missing if the kernel has them built in.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Modules {
    /// Every machine, before it connects to the host.
    Machine,
    /// The scratch disk.
    Scratch,
    /// A build with a network.
    Network,
    /// A build that runs machines of its own. There is one for each vendor's processors.
    Kvm,
}

impl Modules {
    fn file(self) -> &'static str {
        match self {
            Self::Machine => "/modules.order",
            Self::Scratch => "/scratch.order",
            Self::Network => "/network.order",
            Self::Kvm => "/kvm.order",
        }
    }

    /// Loads them. If another thread loads one of them just now, waits until it has.
    pub(crate) fn load(self) -> io::Result<()> {
        let order = match fs::read_to_string(self.file()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            other => other?,
        };
        for name in order.lines() {
            match (self, load_module(name)) {
                // For another vendor's processors.
                (Self::Kvm, Err(nix::Error::EOPNOTSUPP | nix::Error::ENODEV)) => {}
                (_, loaded) => {
                    let named = |error| io::Error::new(io::Error::from(error).kind(), format!("{name}: {error}"));
                    loaded.map_err(named)?;
                }
            }
        }
        Ok(())
    }
}

/// The device node of KVM.
const KVM: &str = "/dev/kvm";

/// Second mount point of the initramfs, see [`leave_rootfs`].
const BASE: &str = "/base";

/// Mount points and types.
const FILE_SYSTEMS: [(&str, &str); 4] =
    [("/dev", "devtmpfs"), ("/proc", "proc"), ("/sys", "sysfs"), ("/sys/fs/cgroup", "cgroup2")];

const MAX_USER_NAMESPACES: &str = "/proc/sys/user/max_user_namespaces";

/// Kernel settings: a file and its value. Files that the kernel lacks are skipped.
const SETTINGS: [(&str, &str); 3] = [
    // Exempts guest-init from the OOM killer.
    ("/proc/self/oom_score_adj", "-1000"),
    // Making namespaces and cgroups waits for RCU many times, some clock ticks each time.
    ("/sys/kernel/rcu_expedited", "1"),
    // User namespaces open privileged kernel interfaces to the build, see [`allow_user_namespaces`].
    (MAX_USER_NAMESPACES, "0"),
];

/// Why the machine can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// A file system could not be mounted.
    #[error("can't mount {kind} at {at}")]
    Mount {
        /// The file system's type.
        kind: &'static str,
        /// The mount point.
        at: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel refused a setting.
    #[error("can't write {value:?} to {path}")]
    Setting {
        /// The file.
        path: &'static str,
        /// The setting's value.
        value: &'static str,
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("can't {action}")]
    Other {
        /// A verb phrase.
        action: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Mounts the file systems that guest-init needs.
pub(crate) fn prepare() -> Result<(), BootError> {
    umask(Mode::empty());
    leave_rootfs().map_err(|source| BootError::Other { action: "leave the kernel's rootfs", source })?;
    for (at, kind) in FILE_SYSTEMS {
        mount_at(at, kind).map_err(|source| BootError::Mount { kind, at, source })?;
        if kind == "devtmpfs" {
            open_standard_descriptors()
                .map_err(|source| BootError::Other { action: "open the console or /dev/null", source })?;
        }
    }
    for (path, value) in SETTINGS {
        match fs::write(path, value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(|source| BootError::Setting { path, value, source })?,
        }
    }
    for directory in [INPUTS, PATHS, SCRATCH, SKELETON, ROOT] {
        make(directory).map_err(|source| BootError::Other { action: "make a mount point", source })?;
    }
    Ok(())
}

/// Loads KVM's modules, so that [`KVM`] exists.
pub(crate) fn load_kvm() -> io::Result<()> {
    Modules::Kvm.load()?;
    if fs::exists(KVM)? {
        return Ok(());
    }
    Err(io::Error::other("the guest's kernel has no KVM, or its processor has no virtualisation"))
}

/// Lets the build make user namespaces, this many at a time.
pub(crate) fn allow_user_namespaces(most: u32) -> io::Result<()> {
    fs::write(MAX_USER_NAMESPACES, most.to_string())
}

/// Sets the machine's clock to a time since 1970.
pub(crate) fn set_clock(time: Duration) -> io::Result<()> {
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time.into())?)
}

/// Powers the machine off. It never resets it, because some VMMs boot the guest again after a reset.
pub(crate) fn power_off() -> ! {
    let _ = reboot(RebootMode::RB_POWER_OFF);
    loop {
        pause();
    }
}

/// Changes to a bind mount of the initramfs, because `pivot_root` can't move the kernel's rootfs itself.
fn leave_rootfs() -> io::Result<()> {
    make(BASE)?;
    mount(Some("/"), BASE, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    chdir(BASE)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    Ok(chdir("/")?)
}

fn mount_at(at: &str, kind: &str) -> io::Result<()> {
    make(at)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    Ok(mount(Some(kind), at, Some(kind), flags, None::<&str>)?)
}

fn make(directory: &str) -> io::Result<()> {
    match fs::create_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// The kernel may start guest-init with descriptors 0 to 2 closed. They must not become a pipe or the connection.
fn open_standard_descriptors() -> io::Result<()> {
    loop {
        let open = |path| OpenOptions::new().read(true).write(true).open(path);
        let file = open("/dev/console").or_else(|_| open("/dev/null"))?;
        if file.as_raw_fd() > 2 {
            return Ok(());
        }
        // Stays open until the machine powers off.
        let _ = file.into_raw_fd();
    }
}

fn load_module(name: &str) -> nix::Result<()> {
    let path = Path::new(MODULES).join(name);
    let module = open(&path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    match finit_module(&module, c"", ModuleInitFlags::empty()) {
        // Built in, or already loaded.
        Err(nix::Error::EEXIST) => Ok(()),
        other => other,
    }
}
