//! Named roots, which are in this user's own store. With a daemon, they are copied to the daemon's store.

use cofferdam_castore::{LocalStore, Node, copy::copy};

use super::Roots;
use crate::{
    cli::{CliError, ClientArgs, interrupt::blocking, store},
    state::StoreAddrs,
};

/// From this similarity on, a name may be meant.
const SIMILAR: f64 = 0.75;

/// The store that has the names.
fn addrs(client: &ClientArgs) -> StoreAddrs {
    match client.daemon() {
        Some(_) => client.store.addrs(),
        None => client.store_addrs(),
    }
}

fn names(client: &ClientArgs) -> Result<Vec<(String, Node)>, CliError> {
    let local: Option<LocalStore> = addrs(client).open_local()?;
    let Some(local) = local else { return Ok(Vec::new()) };
    let roots = local.roots().map_err(|error| CliError::failed("can't read the named roots", error))?;
    Ok(roots.into_iter().map(|(name, node)| (name.to_string(), node)).collect())
}

/// The root with a name, if there is one. Its contents are in the store then.
pub(super) async fn find(roots: &Roots<'_>, name: &str) -> Result<Option<Node>, CliError> {
    let found = names(roots.client)?.into_iter().find(|(of, _)| of == name);
    let Some((_, node)) = found else { return Ok(None) };
    if roots.client.store_addrs() == addrs(roots.client) {
        return Ok(Some(node));
    }
    if let Node::Directory { digest, .. } = &node
        && let found = roots.store.directories.get(digest).await
        && found.map_err(|error| CliError::failed("can't read from the store", error))?.is_some()
    {
        return Ok(Some(node));
    }
    let (from, to) = (addrs(roots.client).open()?, roots.store.clone());
    let watch = store::Watch::new("copying the root", roots.progress, roots.cancel);
    let nodes = vec![node.clone()];
    blocking(roots.cancel, move || copy(&from, &to, &nodes, &watch)).await?;
    Ok(Some(node))
}

/// The error for a name that no root has.
pub(super) fn unknown(client: &ClientArgs, name: &str) -> CliError {
    let known = names(client).unwrap_or_default();
    let similarity = |other: &str| strsim::jaro_winkler(name, other);
    let closest =
        known.iter().map(|(other, _)| other).max_by(|one, other| similarity(one).total_cmp(&similarity(other)));
    let error = CliError::wrong(format!("there is no root {name:?}, and no directory of that name"));
    error.try_this(match closest.filter(|closest| similarity(closest) >= SIMILAR) {
        Some(closest) => format!("did you mean {closest:?}?"),
        None => {
            "`cofferdam store root list` for the names; or a ./DIRECTORY, tar:FILE, docker-archive:FILE, oci:PATH or \
                 oci://HOST/NAME:TAG"
                .to_owned()
        }
    })
}
