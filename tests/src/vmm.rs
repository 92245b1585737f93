//! The VMM under test.

use std::{env, path::PathBuf, sync::LazyLock};

use cofferdam::machine::vmm::{self, Choice, Kind};

use crate::program::MEND;

/// The variable that names the VMM to test, as `--vmm` does. Without it each command chooses by itself.
pub const SETTING: &str = "COFFERDAM_TEST_VMM";

static CHOICE: LazyLock<Result<Choice, String>> = LazyLock::new(|| {
    let asked = match asked() {
        None => None,
        Some("qemu") => Some(Kind::Qemu),
        Some("cloud-hypervisor") => Some(Kind::CloudHypervisor),
        Some(other) => return Err(format!("{SETTING} must be \"qemu\" or \"cloud-hypervisor\", not {other:?}")),
    };
    vmm::choose(asked).map_err(|error| format!("{error}\n{MEND}"))
});

/// The requested VMM, by its name for `--vmm`.
pub fn asked() -> Option<&'static str> {
    static ASKED: LazyLock<Option<String>> = LazyLock::new(|| env::var(SETTING).ok());
    ASKED.as_deref()
}

/// The VMM that runs the builds.
pub fn choice() -> &'static Choice {
    CHOICE.as_ref().unwrap_or_else(|error| panic!("{error}"))
}

/// The processes of a build's VMM: the file name of each executable, and its name in messages.
pub fn processes() -> Vec<(String, &'static str)> {
    let program = choice().program.canonicalize().expect("the VMM is there");
    let file_name = program.file_name().expect("it is a file").to_string_lossy().into_owned();
    match choice().kind {
        Kind::CloudHypervisor => vec![(file_name, "cloud-hypervisor")],
        Kind::Qemu => {
            vec![(file_name, "qemu"), ("vhost-device-vsock".to_owned(), "vhost-device-vsock")]
        }
    }
}

/// The files that `cofferdam` needs and that aren't in PATH, by the variables that name them.
pub fn programs() -> Vec<(&'static str, PathBuf)> {
    match choice().kind {
        Kind::CloudHypervisor => vec![(setting(), choice().program.clone())],
        Kind::Qemu => {
            let device = vmm::survey().qemu.vsock_device.expect("QEMU was chosen");
            vec![("COFFERDAM_VHOST_DEVICE_VSOCK", device.program)]
        }
    }
}

/// The variable that names the VMM's file to `cofferdam`.
pub fn setting() -> &'static str {
    match choice().kind {
        Kind::CloudHypervisor => "COFFERDAM_CLOUD_HYPERVISOR",
        Kind::Qemu => "COFFERDAM_QEMU",
    }
}
