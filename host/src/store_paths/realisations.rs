//! What outputs have become whose paths follow from their contents.

use std::ops::Bound;

use cofferdam_nix::{OutputId, Realisation};
use cofferdam_rpc::Client;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction};

use super::{PATHS, Result, StorePaths, StorePathsError};

pub(super) const REALISATIONS: TableDefinition<'_, (&str, &str), &str> = TableDefinition::new("realisations");

/// Bytes that each client's realisations take.
pub(super) const BYTES: TableDefinition<'_, &str, u64> = TableDefinition::new("bytes of realisations");

/// Most of these bytes.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// Realisations that are looked at in one transaction, for which others wait.
const BATCH: usize = 256;

/// A client, and an output's id.
type Key = (String, String);

impl StorePaths {
    /// Remembers realisations of a client, all or none. What was known of these outputs before is forgotten.
    ///
    /// # Errors
    ///
    /// There are too many of them, or they can't be written.
    pub(crate) fn realise(&self, client: &Client, realisations: &[Realisation]) -> Result<()> {
        let client = client.to_string();
        let is_taken = self.with("write", |database| {
            let write = database.begin_write()?;
            let mut added = 0;
            {
                let mut table = write.open_table(REALISATIONS)?;
                for realisation in realisations {
                    let (id, json) = (realisation.id.to_string(), realisation.to_json());
                    added += size(&id, &json);
                    let before = table.insert((client.as_str(), id.as_str()), json.as_str())?;
                    added -= before.map_or(0, |before| size(&id, before.value()));
                }
            }
            let is_taken = add(&write, &client, added)? <= MAX_BYTES;
            if is_taken {
                write.commit()?;
            } else {
                write.abort()?;
            }
            Ok(is_taken)
        })?;
        if is_taken { Ok(()) } else { Err(StorePathsError::Full { client, limit: MAX_BYTES }) }
    }

    /// What an output has become for a client. Its path may not be valid any more.
    ///
    /// # Errors
    ///
    /// It can't be read.
    pub(crate) fn realisation(&self, client: &Client, id: &OutputId) -> Result<Option<Realisation>> {
        let (client, id) = (client.to_string(), id.to_string());
        let json = self.with("read", |database| {
            let table = database.begin_read()?.open_table(REALISATIONS)?;
            Ok(table.get((client.as_str(), id.as_str()))?.map(|json| json.value().to_owned()))
        })?;
        Ok(json.and_then(|json| Realisation::from_json(&json).ok()))
    }

    /// Forgets the realisations whose paths aren't registered any more.
    pub(super) fn prune_realisations(&self) -> Result<()> {
        let mut last = None;
        loop {
            last = self.with("write", |database| prune_after(database, last.as_ref()))?;
            if last.is_none() {
                return Ok(());
            }
        }
    }
}

/// Looks at the realisations after this one. Returns the last one, unless all have been looked at.
fn prune_after(database: &Database, last: Option<&Key>) -> Result<Option<Key>, redb::Error> {
    let write = database.begin_write()?;
    let (mut seen, mut key, mut gone) = (0, None, Vec::new());
    {
        let (table, paths) = (write.open_table(REALISATIONS)?, write.open_table(PATHS)?);
        let begin = last.map_or(Bound::Unbounded, |(client, id)| Bound::Excluded((&**client, &**id)));
        for entry in table.range::<(&str, &str)>((begin, Bound::Unbounded))?.take(BATCH) {
            let (found, json) = entry?;
            let (client, id) = found.value();
            let at = (client.to_owned(), id.to_owned());
            let is_there = match Realisation::from_json(json.value()) {
                Ok(realisation) => paths.get((client, realisation.path.base_name()))?.is_some(),
                Err(_) => false,
            };
            if !is_there {
                gone.push((at.clone(), size(id, json.value())));
            }
            (seen, key) = (seen + 1, Some(at));
        }
    }
    for ((client, id), bytes) in &gone {
        write.open_table(REALISATIONS)?.remove((client.as_str(), id.as_str()))?;
        add(&write, client, -bytes)?;
    }
    if gone.is_empty() {
        write.abort()?;
    } else {
        write.commit()?;
    }
    Ok(key.filter(|_| seen == BATCH))
}

/// Bytes that a realisation takes.
fn size(id: &str, json: &str) -> i64 {
    i64::try_from(id.len() + json.len()).unwrap_or(i64::MAX)
}

/// Counts bytes of a client. Returns how many there are then.
fn add(write: &WriteTransaction, client: &str, added: i64) -> Result<u64, redb::Error> {
    let mut table = write.open_table(BYTES)?;
    let before = table.get(client)?.map_or(0, |bytes| bytes.value());
    let bytes = before.saturating_add_signed(added);
    table.insert(client, bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use cofferdam_castore::{Node, Store, SymlinkTarget};
    use cofferdam_nix::{Hash, PathInfo, StorePath};

    use super::{super::Known, *};

    const ALICE: Client = Client::User(1);
    const BOB: Client = Client::User(2);

    fn path(name: &str) -> StorePath {
        StorePath::compute("source", &Hash::of(name.as_bytes()), name).unwrap()
    }

    fn realisation(number: usize, name: &str) -> Realisation {
        let id = OutputId { derivation: Hash::of(&number.to_le_bytes()), output: "out".to_owned() };
        Realisation::new(id, path(name))
    }

    fn register(paths: &StorePaths, client: &Client, name: &str) {
        let node = Node::Symlink { target: SymlinkTarget::try_from(b"a".to_vec()).unwrap() };
        let info = PathInfo {
            deriver: None,
            nar_hash: Hash::of(b""),
            nar_size: 1,
            references: BTreeSet::new(),
            registration_time: 7,
            ultimate: true,
            signatures: BTreeSet::new(),
            content_address: None,
        };
        paths.register(client, &[(path(name), Known { node, info })]).unwrap();
    }

    #[test]
    fn realisations_are_their_clients_and_go_with_their_paths() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StorePaths::open(dir.path()).unwrap();
        register(&paths, &ALICE, "kept");
        let all: Vec<_> =
            (0..600).map(|number| realisation(number, if number % 3 == 0 { "kept" } else { "gone" })).collect();
        paths.realise(&ALICE, &all).unwrap();
        paths.realise(&BOB, &all[..1]).unwrap();
        assert_eq!(paths.realisation(&ALICE, &all[5].id).unwrap().as_ref(), Some(&all[5]));
        assert_eq!(paths.realisation(&BOB, &all[5].id).unwrap(), None);
        paths.prune(&Store::memory()).unwrap();
        let left = |client: &Client| {
            all.iter().filter(|found| paths.realisation(client, &found.id).unwrap().is_some()).count()
        };
        assert_eq!((left(&ALICE), left(&BOB)), (200, 0));
    }

    #[test]
    fn a_clients_realisations_are_bounded_and_what_is_forgotten_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StorePaths::open(dir.path()).unwrap();
        let large = |number| {
            let mut large = realisation(number, "a");
            large.signatures.insert("s".repeat(60 * 1024));
            large
        };
        let all: Vec<_> = (0..1100).map(large).collect();
        let full = paths.realise(&ALICE, &all).unwrap_err().to_string();
        assert_eq!(full, "the realisations of user:1 must take at most 67108864 bytes");
        assert_eq!(paths.realisation(&ALICE, &all[0].id).unwrap(), None);
        paths.realise(&ALICE, &all[..1000]).unwrap();
        // Once more they take nothing.
        paths.realise(&ALICE, &all[..1000]).unwrap();
        paths.realise(&ALICE, &all[1000..]).unwrap_err();
        paths.realise(&BOB, &all[1000..]).unwrap();
        paths.prune(&Store::memory()).unwrap();
        paths.realise(&ALICE, &all[..1000]).unwrap();
    }
}
