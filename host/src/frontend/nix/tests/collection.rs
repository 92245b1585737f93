//! Garbage collections beside connections.

use std::time::Duration;

use cofferdam_castore::{LocalStore, gc::collect};

use super::{
    graph::{FIRST_DRV, SECOND_DRV, add_chain, added_chain, build, skip_build},
    *,
};

/// Collects all garbage, however new, during a build that then fails.
struct Collecting<'a>(&'a LocalStore);

impl Builds for Collecting<'_> {
    fn cpus(&self) -> u32 {
        1
    }

    fn build(&self, _request: wire::BuildRequest, _tell: Tell<'_>) -> Result<Result<Arc<Record>, Failure>, Stop> {
        let garbage = block_on(self.0.store().directories.put(Directory::new())).unwrap();
        assert!(collect(self.0, Duration::ZERO, false).unwrap().directories > 0);
        assert_eq!(block_on(self.0.store().directories.get(&garbage)).unwrap(), None);
        Ok(Err(Failure::executor("queue_full", "too many builds wait")))
    }
}

#[test]
fn a_connection_keeps_what_it_has_brought_while_garbage_is_collected() {
    let dir = tempfile::tempdir().unwrap();
    let local = LocalStore::open(&dir.path().join("blobs"), &dir.path().join("directories.redb")).unwrap();
    let (server, tree) = (Server::with(local.store(), true, false), tree("target"));
    let paths = [FIRST_DRV, SECOND_DRV].map(|path| StorePath::parse(path).unwrap());
    let all = [&tree.path, &paths[0], &paths[1]];
    let mut said = Writer(Vec::new());
    hello(&mut said, Version::minor(34)).unwrap();
    add_multiple(&mut said, true, &[&tree]).unwrap();
    add_chain(&mut said).unwrap();
    build(&mut said, Operation::BuildPaths, &[&format!("{SECOND_DRV}!out")], 0).unwrap();
    query_valid(&mut said, &all).unwrap();
    let mut output = Vec::new();
    let tenant = Tenant::new(ALICE, Arc::clone(&server.nix));
    Session::new(tenant, Collecting(&local), &*said.0, &mut output).run();
    let mut heard = Heard(Reader::new(io::Cursor::new(output)));
    check_hello(&mut heard.0, Version::minor(34)).unwrap();
    added_chain(heard.last());
    skip_build(&mut heard, FIRST_DRV);
    assert!(heard.error().contains("too many builds wait"));
    assert_eq!(heard.last().0.paths("all of them").unwrap().len(), 3);
    heard.end();

    // The connection has ended, so the next collection takes them.
    assert_eq!(collect(&local, Duration::ZERO, false).unwrap().blobs_left, 0);
    let mut heard = server.talk(ALICE, Version::minor(34), |said| query_valid(said, &all));
    assert_eq!(heard.last().0.paths("none").unwrap(), BTreeSet::new());
    assert_eq!(server.nix.paths.prune(&local.store()).unwrap(), 3);
}
