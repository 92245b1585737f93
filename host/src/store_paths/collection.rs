//! What a garbage collection keeps for the store paths, and which of them it leaves.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use cofferdam_castore::{Node, Store};
use cofferdam_nix::StorePath;
use redb::{Database, ReadableDatabase as _, ReadableTable as _};

use super::{Known, PATHS, Result, StorePaths, decode, is_there};

/// Paths that are looked at in one transaction, for which others wait.
const BATCH: usize = 256;

impl StorePaths {
    /// The contents of all paths that were registered since this time, in seconds since 1970, and of what these refer to.
    ///
    /// # Errors
    ///
    /// They can't be read.
    pub(crate) fn since(&self, seconds: u64) -> Result<Vec<Node>> {
        self.with("read", |database| {
            let table = database.begin_read()?.open_table(PATHS)?;
            let (mut nodes, mut of_client, mut last) = (Vec::new(), BTreeMap::new(), String::new());
            for entry in table.iter()? {
                let (key, value) = entry?;
                let (client, name) = key.value();
                if client != last {
                    keep_recent(&of_client, seconds, &mut nodes);
                    of_client.clear();
                    client.clone_into(&mut last);
                }
                of_client.extend(decode(value.value()).map(|known| (name.to_owned(), known)));
            }
            keep_recent(&of_client, seconds, &mut nodes);
            Ok(nodes)
        })
    }

    /// Forgets the paths whose contents the store lacks, and the realisations that name them. Returns how many paths.
    ///
    /// # Errors
    ///
    /// They can't be read or written.
    pub(crate) fn prune(&self, store: &Store) -> Result<u64> {
        let (mut last, mut pruned) = (None, 0);
        loop {
            let batch = self.with("write", |database| prune_after(database, store, last.as_ref()))?;
            pruned += batch.1;
            match batch.0 {
                Some(key) => last = Some(key),
                None => break,
            }
        }
        self.prune_realisations()?;
        Ok(pruned)
    }
}

/// Looks at the paths after this one. Returns the last one, unless all have been looked at, and how many were forgotten.
fn prune_after(database: &Database, store: &Store, last: Option<&Key>) -> Result<(Option<Key>, u64), redb::Error> {
    let write = database.begin_write()?;
    let (mut seen, mut key, mut gone) = (0, None, Vec::new());
    {
        let table = write.open_table(PATHS)?;
        let begin = last.map_or(Bound::Unbounded, |(client, name)| Bound::Excluded((&**client, &**name)));
        for entry in table.range::<(&str, &str)>((begin, Bound::Unbounded))?.take(BATCH) {
            let (found, value) = entry?;
            let (client, name) = found.value();
            let at = (client.to_owned(), name.to_owned());
            if let Some(known) = decode(value.value())
                && !is_there(store, &known.node).map_err(redb::Error::Io)?
            {
                gone.push(at.clone());
            }
            (seen, key) = (seen + 1, Some(at));
        }
    }
    for (client, name) in &gone {
        write.open_table(PATHS)?.remove((client.as_str(), name.as_str()))?;
    }
    if gone.is_empty() {
        write.abort()?;
    } else {
        write.commit()?;
    }
    Ok((key.filter(|_| seen == BATCH), gone.len() as u64))
}

/// A client, and the base name of one of its paths.
type Key = (String, String);

/// Adds the contents of the recent ones of a client's paths, and of what these refer to.
fn keep_recent(paths: &BTreeMap<String, Known>, seconds: u64, nodes: &mut Vec<Node>) {
    let recent = paths.iter().filter(|(_, known)| known.info.registration_time >= seconds);
    let mut left: Vec<_> = recent.map(|(name, _)| name.as_str()).collect();
    let mut seen: BTreeSet<_> = left.iter().copied().collect();
    while let Some(known) = left.pop().and_then(|name| paths.get(name)) {
        nodes.push(known.node.clone());
        let references = known.info.references.iter().map(StorePath::base_name);
        left.extend(references.filter(|name| paths.contains_key(*name) && seen.insert(name)));
    }
}
