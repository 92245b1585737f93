//! What the daemon's clients see of its store.

use std::{convert::Infallible, fs, io, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use cofferdam_castore::{
    LocalStore, Node, PathComponent, Store, Views,
    views::{Grants, Shared},
};
use cofferdam_rpc::Listener;
use tokio::task::spawn_blocking;
use tokio_util::task::AbortOnDropHandle;

use super::{
    config::{Isolation, SharedRoot, StoreConfig},
    failed,
};
use crate::build::failure::Failure;

/// How often roots are looked at.
const ROOTS_INTERVAL: Duration = Duration::from_secs(1);

/// Renews what is shared, until it is dropped.
type Renewing = Option<AbortOnDropHandle<Infallible>>;

/// The views of clients that connect to these listeners.
pub(super) async fn of(
    config: &StoreConfig,
    store: &Store,
    state: &Path,
    listeners: &[Listener],
) -> Result<(Views, Renewing), Failure> {
    let isolation = config.isolation.unwrap_or_else(|| default(listeners));
    tracing::info!(?isolation, "store opened");
    if isolation == Isolation::None {
        return Ok((Views::whole(store.clone()), None));
    }
    let local = config.addrs.open_local()?;
    let blobs = local.as_ref().map(LocalStore::dir);
    let grants = Grants::open(&state.join("grants.redb"), blobs);
    let grants = grants.map_err(|error| failed("can't tell who may see what of the store", &error))?;
    let views = Views::divided(store.clone(), grants);
    let Some(local) = local.filter(|_| !config.shared.is_empty()) else { return Ok((views, None)) };
    let names = config.shared.iter().map(|SharedRoot(name)| name.clone()).collect();
    let mut roots = Roots { store: local, names, views: views.clone(), found: None };
    let work = move || roots.renew().map(|()| roots);
    let renewed = spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
    let roots = renewed.map_err(|error| failed("can't share roots of the store", &error))?;
    Ok((views, Some(AbortOnDropHandle::new(tokio::spawn(roots.watch())))))
}

/// One user's own socket needs no isolation.
fn default(listeners: &[Listener]) -> Isolation {
    if listeners.iter().all(is_private) { Isolation::None } else { Isolation::Tenants }
}

/// Whether nobody but root and one user can connect.
fn is_private(listener: &Listener) -> bool {
    let Listener::Unix(listener) = listener else { return false };
    let metadata = listener.local_addr().ok().and_then(|addr| fs::metadata(addr.as_pathname()?).ok());
    metadata.is_some_and(|metadata| metadata.permissions().mode() & 0o077 == 0)
}

/// The roots that all clients see.
struct Roots {
    store: LocalStore,
    names: Vec<PathComponent>,
    views: Views,
    /// Those that are there, with their nodes. `None` before they were looked for.
    found: Option<Vec<(PathComponent, Node)>>,
}

impl Roots {
    async fn watch(mut self) -> Infallible {
        loop {
            tokio::time::sleep(ROOTS_INTERVAL).await;
            let renewed = spawn_blocking(move || {
                if let Err(error) = self.renew() {
                    tracing::warn!(error = &error as &dyn std::error::Error, "can't look at the roots of the store");
                }
                self
            });
            match renewed.await {
                Ok(roots) => self = roots,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }
    }

    /// Shares what is below the roots, if a root has changed.
    fn renew(&mut self) -> io::Result<()> {
        let mut roots = self.store.roots()?;
        roots.retain(|(name, _)| self.names.contains(name));
        if self.found.as_ref() == Some(&roots) {
            return Ok(());
        }
        for name in self.names.iter().filter(|name| !roots.iter().any(|(found, _)| found == *name)) {
            tracing::warn!("the root \"{name}\" in [store] shared is not there; `cofferdam store root add` adds it");
        }
        let nodes: Vec<_> = roots.iter().map(|(_, node)| node.clone()).collect();
        let (shared, missing): (Shared, _) = self.store.everything_below(&nodes)?;
        if let Some(digest) = missing {
            tracing::warn!("a root in [store] shared lacks the directory {digest}");
        }
        tracing::info!(roots = roots.len(), objects = shared.len(), "roots shared");
        self.views.share(shared);
        self.found = Some(roots);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, UnixListener};

    use super::*;

    #[tokio::test]
    async fn only_ones_own_socket_needs_no_isolation() {
        let dir = tempfile::tempdir().unwrap();
        let socket = |mode| {
            let path = dir.path().join(format!("{mode:o}"));
            let listener = UnixListener::bind(&path).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            Listener::Unix(listener)
        };
        assert_eq!(default(&[socket(0o600)]), Isolation::None);
        for mode in [0o660, 0o606, 0o666] {
            assert_eq!(default(&[socket(mode)]), Isolation::Tenants, "{mode:o}");
        }
        let tcp = Listener::Tcp(TcpListener::bind("127.0.0.1:0").await.unwrap());
        assert_eq!(default(&[socket(0o400), tcp]), Isolation::Tenants);
    }
}
