//! This host's file tree, read-only, over virtiofs.

use std::{path::Path, sync::Arc, thread, time::Duration};

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::{
    passthrough::{CachePolicy, Config, read_only::PassthroughFsRo},
    vhost_user::VhostUserFsBackendBuilder,
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The guest may cache files for ever, since nothing writes to the files of a test run.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Serves one connection to a new socket, on threads of this process.
pub(super) fn serve(socket: &Path) -> Result<()> {
    // The device holds a descriptor for every file that the guest knows.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let config = Config {
        cache_policy: CachePolicy::Always,
        entry_timeout: TIMEOUT,
        attr_timeout: TIMEOUT,
        ..Config::default()
    };
    let tree = PassthroughFsRo::new(config).context("can't share this host's files")?;
    let backend = VhostUserFsBackendBuilder::default().build(tree).context("can't share this host's files")?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let daemon = VhostUserDaemon::new("host".to_owned(), Arc::new(backend), memory);
    let mut daemon = daemon.map_err(|error| anyhow::anyhow!("can't share this host's files: {error}"))?;
    let mut listener = Listener::new(socket, true).context("can't listen for QEMU")?;
    thread::Builder::new().name("host files".to_owned()).spawn(move || {
        // It ends with QEMU, whose end is reported elsewhere.
        let _ = daemon.start(&mut listener).and_then(|()| daemon.wait());
    })?;
    Ok(())
}
