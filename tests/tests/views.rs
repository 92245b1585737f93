//! What clients of one daemon see of each other in its store. One comes over the daemon's socket, the other over TCP.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use cofferdam_castore::{B3Digest, Directory, Node, Store};
use cofferdam_tests::{
    Cofferdam, Daemon, Outcome,
    castore::{NodeText, node_of},
    stretched,
};
use tokio::runtime::Handle;

const SECRET: &str = "the secret of the first client\n";

/// As long as the secret.
const NOBODYS: &str = "what no client has ever stored\n";

/// A client of a daemon.
#[derive(Clone, Copy)]
struct Client<'a> {
    cofferdam: &'a Cofferdam,
    addr: &'a str,
}

impl Client<'_> {
    fn command(self, arguments: &[&str]) -> Outcome {
        let store = ["--blob-service-addr", self.addr, "--directory-service-addr", self.addr];
        self.cofferdam.command(arguments.iter().chain(&store))
    }

    fn import(self, path: &Path) -> NodeText {
        let imported = self.command(&["import", text(path)]).succeeds();
        NodeText::printed(imported.stdout.split_whitespace().next().expect("it prints a node"))
    }

    fn export(self, node: &NodeText) -> Outcome {
        let to = tempfile::tempdir_in(self.cofferdam.files()).expect("the test's directory can be written");
        self.command(&["export", "--json", node.as_str(), text(&to.path().join("out"))])
    }

    /// Prints its input, which is `node`, and keeps it as an output.
    fn copy(self, node: &NodeText) -> Outcome {
        let build = self.cofferdam.build().without_slot().flag("--daemon", self.addr).input_node("in", node);
        build.output("build/out").exported().shell("cp -r /inputs/in out; touch out/made; cat /inputs/in/secret")
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary directories are UTF-8")
}

/// A directory with a file `secret`.
fn tree(cofferdam: &Cofferdam, name: &str, contents: &str) -> PathBuf {
    cofferdam.file(&format!("{name}/secret"), contents);
    cofferdam.files().join(name)
}

/// A directory with the secret in it.
fn secret(cofferdam: &Cofferdam) -> PathBuf {
    tree(cofferdam, "tree", SECRET)
}

/// The digest of a file or directory.
fn digest(node: &NodeText) -> &str {
    node.digest().expect("it is no symlink")
}

/// The same error for every digest.
fn message(outcome: &Outcome, digest: &str) -> String {
    outcome.json().to_string().replace(digest, "DIGEST")
}

/// Puts a directory that names a blob, and not the blob.
async fn put_name_of(addr: &str, contents: &str) -> NodeText {
    let (digest, size) = (B3Digest::of(contents.as_bytes()), contents.len() as u64);
    let secret = Node::File { digest, size, executable: false };
    let directory = Directory::try_from_iter([("secret".try_into().expect("it is a name"), secret)]);
    let directory = directory.expect("it has one entry");
    let size = directory.size();
    let store = Store::from_addrs(addr, addr).expect("a daemon has printed it");
    let digest = store.directories.put(directory).await.expect("it is put");
    NodeText::printed(&format!("dir:{digest}:{size}"))
}

/// The secret is asked for by its digest, as an input, and by a directory that names it. And nothing in the answers tells that
/// somebody has it.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_client_has_put_or_built_is_absent_for_another() {
    let (cofferdam, elsewhere) = (Cofferdam::new(), Cofferdam::new());
    let daemon = Daemon::start(&cofferdam, "listen = ['127.0.0.1:0']\nreuse = 'shared'");
    let [own, theirs] = daemon.addrs(2).try_into().unwrap();
    let owner = Client { cofferdam: &cofferdam, addr: &own };
    let other = Client { cofferdam: &elsewhere, addr: &theirs };
    let node = owner.import(&secret(&cofferdam));
    let built = owner.copy(&node).succeeds().says(SECRET);

    let outputs = built.output().node;
    let unknown = node_of(&tree(&elsewhere, "unknown", NOBODYS));
    let files = [SECRET, NOBODYS].map(|contents| NodeText::file(contents.as_bytes(), false));
    for (theirs, nobodys) in [(&node, &unknown), (&outputs, &unknown), (&files[0], &files[1])] {
        let answers = [theirs, nobodys].map(|node| {
            let exported = other.export(node).exits_with(2).says("is not in the store");
            // The path before it is a temporary one.
            let said = message(&exported, digest(node)).rsplit_once("/out: ").expect("it names the path").1.to_owned();
            [said, message(&other.copy(node).is_refused("missing"), digest(node))]
        });
        assert_eq!(answers[0], answers[1]);
        assert!(answers[0].iter().all(|said| said.contains("DIGEST")), "{answers:?}");
    }
    // A directory that names a file doesn't give its contents, and an equal request doesn't give the result.
    let named = |contents| tokio::task::block_in_place(|| Handle::current().block_on(put_name_of(&theirs, contents)));
    assert_eq!(named(SECRET), node);
    let answers = [(&named(SECRET), &files[0]), (&named(NOBODYS), &files[1])]
        .map(|(directory, file)| message(&other.copy(directory).is_refused("missing"), digest(file)));
    assert_eq!(answers[0], answers[1]);
    assert!(answers[0].contains("DIGEST"), "{answers:?}");
    other.export(&outputs).exits_with(2);

    // Who has the contents has them, and the result of an equal request, too.
    let blob = cofferdam.blob(&B3Digest::of(SECRET.as_bytes()).to_hex());
    let inode = blob.metadata().unwrap().ino();
    assert_eq!(other.import(&secret(&elsewhere)), node);
    assert_eq!(blob.metadata().unwrap().ino(), inode, "the blob was stored again");
    let reused = other.copy(&node).succeeds().says("built before");
    assert_eq!(fs::read_to_string(reused.exported("build/out").join("secret")).unwrap(), SECRET);
    other.export(&outputs).succeeds();
    daemon.end().succeeds();
}

/// The attacks of the other test work here, so it is the isolation that stops them.
#[tokio::test(flavor = "multi_thread")]
async fn without_isolation_every_client_reads_what_it_can_name() {
    let (cofferdam, elsewhere) = (Cofferdam::new(), Cofferdam::new());
    let daemon = Daemon::start(&cofferdam, "listen = ['127.0.0.1:0']\n[store]\nisolation = 'none'");
    let [own, theirs] = daemon.addrs(2).try_into().unwrap();
    let owner = Client { cofferdam: &cofferdam, addr: &own };
    let other = Client { cofferdam: &elsewhere, addr: &theirs };
    let node = owner.import(&secret(&cofferdam));
    other.export(&node).succeeds();
    other.export(&NodeText::file(SECRET.as_bytes(), false)).succeeds();
    other.copy(&put_name_of(&theirs, SECRET).await).succeeds().says(SECRET);
    daemon.end().succeeds();
}

#[test]
fn roots_that_are_shared_are_seen_by_all_clients_while_they_are_there() {
    let (cofferdam, elsewhere) = (Cofferdam::new(), Cofferdam::new());
    let root = |arguments: &[&str]| cofferdam.command(["store", "root"].iter().chain(arguments)).succeeds();
    let nodes = ["first", "second"].map(|name| {
        let path = cofferdam.file(&format!("{name}/below/file"), name);
        cofferdam.import(path.parent().unwrap().parent().unwrap())
    });
    root(&["add", "base", nodes[0].as_str()]);
    root(&["add", "private", nodes[1].as_str()]);
    let config = "listen = ['127.0.0.1:0']\n[store]\nshared = ['roots/base', 'roots/later']";
    let daemon = Daemon::start(&cofferdam, config);
    let addr = daemon.addrs(2).remove(1);
    let client = Client { cofferdam: &elsewhere, addr: &addr };
    client.export(&nodes[0]).succeeds();
    client.export(&nodes[1]).exits_with(2).says("is not in the store");
    let until = |is_there: bool, node: &NodeText| {
        let begun = Instant::now();
        while client.export(node).stderr.contains("is not in the store") == is_there {
            assert!(begun.elapsed() < stretched(Duration::from_secs(60)), "{node} never changes");
            thread::sleep(Duration::from_millis(100));
        }
    };
    root(&["add", "later", nodes[1].as_str()]);
    until(true, &nodes[1]);
    root(&["remove", "base"]);
    until(false, &nodes[0]);
    client.export(&nodes[1]).succeeds();
    daemon.end().succeeds();
}

/// A collection is another process, and removes what nobody protects.
#[test]
fn what_a_collection_has_removed_is_granted_to_nobody() {
    let (cofferdam, elsewhere) = (Cofferdam::new(), Cofferdam::new());
    let daemon = Daemon::start(&cofferdam, "listen = ['127.0.0.1:0']");
    let [own, theirs] = daemon.addrs(2).try_into().unwrap();
    let owner = Client { cofferdam: &cofferdam, addr: &own };
    let other = Client { cofferdam: &elsewhere, addr: &theirs };
    let tree = secret(&cofferdam);
    let node = owner.import(&tree);
    owner.export(&node).succeeds();
    // The daemon's grants outlive it.
    daemon.end().succeeds();
    let daemon = Daemon::start(&cofferdam, "listen = ['127.0.0.1:0']");
    let [own, theirs] = (daemon.addrs(2).try_into() as Result<[String; 2], _>).unwrap();
    let (owner, other) = (Client { addr: &own, ..owner }, Client { addr: &theirs, ..other });
    owner.export(&node).succeeds();
    cofferdam.command(["store", "gc", "--keep", "0s"]).succeeds();
    owner.export(&node).exits_with(2).says("is not in the store");
    assert_eq!(other.import(&secret(&elsewhere)), node);
    other.export(&node).succeeds();
    owner.export(&node).exits_with(2).says("is not in the store");
    daemon.end().succeeds();
}

/// Both parts of a quota: what a put may bring, and that nothing new begins at it. The owner of the daemon has none.
#[test]
fn a_client_at_its_quota_stores_and_builds_nothing_more_and_keeps_what_it_has() {
    let (cofferdam, elsewhere) = (Cofferdam::new(), Cofferdam::new());
    let config = |stored: &str| {
        let quotas = format!("stored = '{stored}'\ndisk = '40G'\nrecords = '1M'");
        let tenants = format!("[tenants.'address:127.0.0.1']\n{quotas}");
        format!("listen = ['127.0.0.1:0']\n{tenants}\n[tenants.'user:*']")
    };
    let file = |name: &str, byte: &str| elsewhere.file(name, byte.repeat(700_000));
    let (first, second) = (file("first", "a"), file("second", "b"));
    let daemon = Daemon::start(&cofferdam, &config("1M"));
    let [own, theirs] = daemon.addrs(2).try_into().unwrap();
    let (owner, other) =
        (Client { cofferdam: &cofferdam, addr: &own }, Client { cofferdam: &elsewhere, addr: &theirs });
    let node = other.import(&first);
    let refused = other.command(&["import", text(&second)]).exits_with(3);
    refused.says("address:127.0.0.1 has 683.59 KiB in the store").says("of 1.00 MiB that it may have");
    owner.import(&second);
    let usage = |client: Client<'_>| client.cofferdam.command(["usage", "--daemon", client.addr]).succeeds().stdout;
    other.copy(&node).executor_fails("quota").says("the build may grow to 97.00 GiB").says("--scratch-size");
    let line = "address:127.0.0.1\t683.59 KiB of 1.00 MiB in 1 blobs and directories\t\
                0 B of 40.00 GiB for 0 running builds\t0 B of 1.00 MiB in 0 records\n";
    assert_eq!(usage(other), line);
    let all = usage(owner);
    assert!(all.contains(line) && all.lines().count() == 2, "{all}");
    let json = other.cofferdam.command(["usage", "--json", "--daemon", other.addr]).succeeds().stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["running_limit_bytes"], &json["recorded"]), (&(40_u64 << 30).into(), &0.into()), "{json}");
    daemon.end().succeeds();

    let daemon = Daemon::start(&cofferdam, &config("600K"));
    let [_, theirs] = daemon.addrs(2).try_into().unwrap();
    let other = Client { cofferdam: &elsewhere, addr: &theirs };
    other.export(&node).succeeds();
    let small = elsewhere.file("small", "c");
    other.command(&["import", text(&small)]).exits_with(3).says("of 600.00 KiB that it may have");
    other.copy(&node).executor_fails("quota").says("of 600.00 KiB that it may have");
    daemon.end().succeeds();
}
