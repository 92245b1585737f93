//! Which build has the log of a derivation.

use std::ops::Bound;

use cofferdam_nix::StorePath;
use cofferdam_rpc::Client;
use redb::{ReadableDatabase as _, ReadableTable as _, TableDefinition};

use super::{Result, StorePaths};
use crate::records::BuildId;

pub(super) const LOGS: TableDefinition<'_, (&str, &str), &str> = TableDefinition::new("logs");

/// Builds that are looked for in one go.
const BATCH: usize = 256;

impl StorePaths {
    /// Remembers the latest build of a client's derivation.
    ///
    /// # Errors
    ///
    /// It can't be written.
    pub(crate) fn set_log(&self, client: &Client, derivation: &StorePath, build: BuildId) -> Result<()> {
        let (client, build) = (client.to_string(), build.to_string());
        self.with("write", |database| {
            let write = database.begin_write()?;
            write.open_table(LOGS)?.insert((client.as_str(), derivation.base_name()), build.as_str())?;
            Ok(write.commit()?)
        })
    }

    /// The latest build of a client's derivation.
    ///
    /// # Errors
    ///
    /// It can't be read.
    pub(crate) fn log(&self, client: &Client, derivation: &StorePath) -> Result<Option<BuildId>> {
        let client = client.to_string();
        self.with("read", |database| {
            let table = database.begin_read()?.open_table(LOGS)?;
            Ok(table.get((client.as_str(), derivation.base_name()))?.and_then(|build| build.value().parse().ok()))
        })
    }

    /// Forgets the builds that aren't on record any more. Returns how many.
    ///
    /// # Errors
    ///
    /// They can't be read or written.
    pub(crate) fn prune_logs(&self, is_on_record: impl Fn(BuildId) -> bool) -> Result<u64> {
        let (mut last, mut pruned): (Option<(String, String)>, _) = (None, 0);
        loop {
            let batch = self.with("read", |database| {
                let table = database.begin_read()?.open_table(LOGS)?;
                let begin =
                    last.as_ref().map_or(Bound::Unbounded, |(client, name)| Bound::Excluded((&**client, &**name)));
                let entries = table.range::<(&str, &str)>((begin, Bound::Unbounded))?.take(BATCH).map(|entry| {
                    let (key, build) = entry?;
                    let (client, name) = key.value();
                    Ok(((client.to_owned(), name.to_owned()), build.value().to_owned()))
                });
                entries.collect::<Result<Vec<_>, redb::Error>>()
            })?;
            let Some((newest, _)) = batch.last().cloned() else { return Ok(pruned) };
            last = Some(newest);
            let is_gone = |build: &String| !build.parse().is_ok_and(&is_on_record);
            let gone: Vec<_> = batch.into_iter().filter(|(_, build)| is_gone(build)).collect();
            if !gone.is_empty() {
                pruned += self.with("write", |database| {
                    let (write, mut removed) = (database.begin_write()?, 0);
                    for ((client, name), build) in &gone {
                        // It may have been built again meanwhile.
                        let mut table = write.open_table(LOGS)?;
                        let key = (client.as_str(), name.as_str());
                        if table.get(key)?.is_some_and(|found| found.value() == build) {
                            table.remove(key)?;
                            removed += 1;
                        }
                    }
                    write.commit()?;
                    Ok(removed)
                })?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_nix::Hash;

    use super::*;

    #[test]
    fn the_latest_build_is_known_while_it_is_on_record() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StorePaths::open(dir.path()).unwrap();
        let derivation = |name: &str| StorePath::compute("text", &Hash::of(name.as_bytes()), name).unwrap();
        let build = |number: usize| -> BuildId { format!("01890000-0000-7000-8000-{number:012x}").parse().unwrap() };
        let (alice, bob) = (Client::User(1), Client::User(2));
        let drvs: Vec<_> = (0..600).map(|number| derivation(&format!("{number}.drv"))).collect();
        for (number, drv) in drvs.iter().enumerate() {
            paths.set_log(&alice, drv, build(number)).unwrap();
        }
        paths.set_log(&alice, &drvs[0], build(1000)).unwrap();
        assert_eq!(paths.log(&alice, &drvs[0]).unwrap(), Some(build(1000)));
        assert_eq!(paths.log(&bob, &drvs[0]).unwrap(), None);
        let kept = |id: BuildId| id >= build(500);
        assert_eq!(paths.prune_logs(kept).unwrap(), 499);
        let left = drvs.iter().filter(|drv| paths.log(&alice, drv).unwrap().is_some()).count();
        assert_eq!(left, 101);
        assert_eq!(paths.prune_logs(kept).unwrap(), 0);
    }
}
