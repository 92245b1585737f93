use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use cofferdam_images::Image;

use crate::{
    machine::{jail, vmm},
    request::AbsolutePath,
};

/// How this host runs its builds.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The guest image.
    pub image: Image,
    /// The VMM that runs every build.
    pub vmm: vmm::Choice,
    /// Where run directories are made; private to this user.
    pub run_dir: PathBuf,
    /// The model of CPU that builds see, see [`vmm::Config::cpu_model`].
    pub cpu_model: Option<String>,
    /// Whether guests' memory is made of huge pages, see [`vmm::Config::hugepages`].
    pub hugepages: bool,
    /// Time that a guest has to boot and connect.
    pub connect_timeout: Duration,
    /// What builds may be shown of the host if they ask for it, see [`Host::ro_paths`](crate::request::Host::ro_paths).
    pub ro_paths: BTreeMap<AbsolutePath, PathBuf>,
    /// See [`Host::withholds_network`](crate::request::Host::withholds_network).
    pub withhold_network: bool,
    /// See [`Host::network`](crate::request::Host::network).
    pub network: bool,
    /// See [`Host::nested`](crate::request::Host::nested).
    pub nested: bool,
    /// Whether builds can make user namespaces, as their own sandboxes need.
    pub user_namespaces: bool,
    /// What helper processes are allowed, and what must separate them.
    pub jail: jail::Rules,
}

impl Settings {
    /// Time to boot by default; emulation on a busy host is slow.
    pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

    /// The defaults, for one image, VMM and place for run directories.
    pub fn new(image: Image, vmm: vmm::Choice, run_dir: PathBuf) -> Self {
        Self {
            image,
            vmm,
            run_dir,
            cpu_model: None,
            hugepages: false,
            connect_timeout: Self::CONNECT_TIMEOUT,
            ro_paths: BTreeMap::new(),
            withhold_network: false,
            network: false,
            nested: false,
            user_namespaces: false,
            jail: jail::Rules { walls: jail::Walls::None, ..jail::Rules::default() },
        }
    }
}
