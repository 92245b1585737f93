//! Derivations that a client has uploaded. All texts are of Nix 2.8.0.

use cofferdam_castore::B3Digest;

use super::{
    super::graph::{Graph, Limits},
    *,
};
use crate::store_paths::Known;

const FIRST: &str = r#"Derive([("out","/nix/store/rwfshijbhhchwxcmqy4ijrqa7jccs8qz-first","","")],[],[],"x86_64-linux","/bin/sh",["-c","echo hi > $out"],[("builder","/bin/sh"),("name","first"),("out","/nix/store/rwfshijbhhchwxcmqy4ijrqa7jccs8qz-first"),("system","x86_64-linux")])"#;
const SECOND: &str = r#"Derive([("out","/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second","","")],[("/nix/store/0sbm8kqi5zyp3iyc6allh3lj0rygk0fw-first.drv",["out"])],[],"x86_64-linux","/bin/sh",["-c","echo /nix/store/rwfshijbhhchwxcmqy4ijrqa7jccs8qz-first > $out"],[("builder","/bin/sh"),("name","second"),("out","/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second"),("system","x86_64-linux")])"#;
pub(super) const FIRST_DRV: &str = "/nix/store/0sbm8kqi5zyp3iyc6allh3lj0rygk0fw-first.drv";
pub(super) const SECOND_DRV: &str = "/nix/store/wmj2r79gfpngnphqib663hbn0lwfm628-second.drv";
const FIRST_OUT: &str = "/nix/store/rwfshijbhhchwxcmqy4ijrqa7jccs8qz-first";
const SECOND_OUT: &str = "/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second";

pub(super) fn add(said: &mut Said, name: &str, method: &str, references: &[&str], contents: &[u8]) -> io::Result<()> {
    ask(said, Operation::AddToStore)?;
    said.text(name)?;
    said.text(method)?;
    said.texts(references)?;
    said.integer(false)?;
    frames(said, contents)
}

pub(super) fn add_chain(said: &mut Said) -> io::Result<()> {
    add(said, "first.drv", "text:sha256", &[], FIRST.as_bytes())?;
    add(said, "second.drv", "text:sha256", &[FIRST_DRV], SECOND.as_bytes())
}

/// As clients before version 1.25 ask for it.
fn add_of_old(said: &mut Said, name: &str, (is_named, is_recursive): (bool, bool), nar: &[u8]) -> io::Result<()> {
    ask(said, Operation::AddToStore)?;
    said.text(name)?;
    said.integer(is_named)?;
    said.integer(is_recursive)?;
    said.text("sha256")?;
    said.0.extend(nar);
    Ok(())
}

#[test]
fn old_clients_add_what_newer_ones_add_in_another_way() {
    let (server, tree) = (Server::new(), tree("target"));
    let mut nar = Writer(Vec::new());
    for word in ["nix-archive-1", "(", "type", "regular", "contents", "text", ")"] {
        nar.text(word).unwrap();
    }
    let mut heard = server.talk(ALICE, Version::minor(25), |said| add(said, "file", "fixed:sha256", &[], b"text"));
    let flat = heard.last().0.text("the path").unwrap();

    let mut heard = server.talk(BOB, Version::OLDEST, |said| {
        for (name, references, text) in [("first.drv", &[][..], FIRST), ("second.drv", &[FIRST_DRV][..], SECOND)] {
            ask(said, Operation::AddTextToStore)?;
            said.text(name)?;
            said.text(text)?;
            said.texts(references)?;
        }
        add_of_old(said, "tree", (false, true), &tree.nar)?;
        add_of_old(said, "tree", (true, true), &tree.nar)?;
        add_of_old(said, "file", (true, false), &nar.0)?;
        ask(said, Operation::IsValidPath)?;
        said.text(&flat)
    });
    let path = tree.path.to_string();
    for expected in [FIRST_DRV, SECOND_DRV, &path, &path, &flat] {
        assert_eq!(heard.last().0.text("the path").unwrap(), expected);
    }
    assert_eq!(heard.last().integer(), 1);
    heard.end();
}

#[test]
fn a_conversation_with_an_old_client_ends_where_its_archive_does_not() {
    let tree = tree("target");
    let mut broken = tree.nar.clone();
    broken[..4].copy_from_slice(b"\x20\0\0\0");
    for (archive, rule) in [(&broken, "'tree' can't be added"), (&tree.nar, "non-executable regular file")] {
        let mut heard = Server::new().talk(BOB, Version::OLDEST, |said| {
            add_of_old(said, "tree", (true, false), archive)?;
            ask(said, Operation::IsValidPath)?;
            said.text(&tree.path)
        });
        assert_eq!(heard.integer(), 0x6378_7470);
        let error = heard.0.text("a message").unwrap();
        assert_eq!(heard.integer(), 1);
        assert!(error.contains(rule), "{error}");
        heard.end();
    }
}

/// Reads the paths that two added derivations get.
pub(super) fn added_chain(heard: &mut Heard) {
    for expected in [FIRST_DRV, SECOND_DRV] {
        assert_eq!(heard.last().0.text("the path").unwrap(), expected);
        PathInfo::read(&mut heard.0).unwrap();
    }
}

pub(super) fn build(said: &mut Said, operation: Operation, targets: &[&str], mode: u64) -> io::Result<()> {
    ask(said, operation)?;
    said.texts(targets)?;
    said.integer(mode)
}

/// What a client is told of one target.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) status: u64,
    pub(super) message: String,
    /// What their names among all outputs are, and their realisations.
    pub(super) outputs: Vec<(String, String)>,
}

/// What a client of 1.34 is told of its targets.
pub(super) fn results(heard: &mut Heard) -> Vec<Told> {
    let count = heard.integer();
    let mut results = Vec::new();
    for _ in 0..count {
        heard.0.text("the target").unwrap();
        let (status, message) = (heard.integer(), heard.0.text("the message").unwrap());
        let _times = [0; 4].map(|_| heard.integer());
        let outputs = (0..heard.integer()).map(|_| (heard.0.text("an id").unwrap(), heard.0.text("it").unwrap()));
        results.push(Told { status, message, outputs: outputs.collect() });
    }
    results
}

/// Skips what is said of one build.
pub(super) fn skip_build(heard: &mut Heard, derivation: &str) {
    assert_eq!([0; 4].map(|_| heard.integer()), [0x5354_5254, 1, 3, 105]);
    assert_eq!(heard.0.text("the text").unwrap(), format!("building '{derivation}'"));
    assert_eq!([heard.integer(), heard.integer()], [4, 1]);
    heard.0.text("the derivation").unwrap();
    assert_eq!((heard.integer(), heard.0.text("the host").unwrap()), (1, String::new()));
    assert_eq!([0; 5].map(|_| heard.integer()), [0, 1, 0, 1, 0]);
    assert_eq!([heard.integer(), heard.integer()], [0x5354_4f50, 1]);
}

/// Registers an empty tree as this path of Alice.
fn register(server: &Server, path: &str) {
    let directory = Directory::new();
    let (node, info) = (directory.to_node(), PathInfo { content_address: None, ..tree("target").info });
    block_on(server.nix.views.of(&ALICE.to_string()).directories.put(directory)).unwrap();
    server.nix.paths.register(&ALICE, &[(StorePath::parse(path).unwrap(), Known { node, info })]).unwrap();
}

#[test]
fn a_dependency_is_built_first_and_its_failure_is_told_of_those_that_need_it() {
    let (server, target) = (Server::new(), format!("{SECOND_DRV}!out"));
    let mut heard = server.talk(ALICE, Version::minor(34), |said| {
        add_chain(said)?;
        build(said, Operation::BuildPathsWithResults, &[&target, FIRST_DRV, FIRST_OUT, "/tmp"], 0)?;
        build(said, Operation::BuildPaths, &[&target], 0)
    });
    added_chain(&mut heard);
    skip_build(&mut heard, FIRST_DRV);
    let results = results(heard.last());
    let statuses: Vec<_> = results.iter().map(|told| told.status).collect();
    assert_eq!(statuses, [10, 2, 9, 9], "{results:?}");
    let failed = format!(
        "'{SECOND_DRV}' can't be built: its dependency '{FIRST_DRV}' failed: builder for '{FIRST_DRV}' failed: \
         too many builds wait\ntry again later"
    );
    assert_eq!(results[0].message, failed);
    assert_eq!(results[3].message, "a path to build must lie in /nix/store, not \"/tmp\"");
    skip_build(&mut heard, FIRST_DRV);
    assert_eq!(heard.error(), failed);
    heard.end();
    let requests = server.requests.lock();
    assert_eq!(requests.iter().map(|request| &*request.outputs[0]).collect::<Vec<_>>(), [&FIRST_OUT[1..]; 2]);
}

#[test]
fn what_is_there_is_not_built_and_its_outputs_are_told() {
    let server = Server::new();
    let say = |said: &mut Said| {
        build(said, Operation::BuildPathsWithResults, &[&format!("{SECOND_DRV}!*")], 0)?;
        ask(said, Operation::QueryMissing)?;
        said.texts([&format!("{SECOND_DRV}!*"), FIRST_OUT])
    };
    let mut heard = server.talk(ALICE, Version::minor(34), add_chain);
    added_chain(&mut heard);
    heard.end();
    register(&server, FIRST_OUT);
    let mut heard = server.talk(ALICE, Version::minor(34), say);
    skip_build(&mut heard, SECOND_DRV);
    assert_eq!(results(heard.last())[0].status, 6);
    assert_eq!(heard.last().0.texts("to build").unwrap(), [SECOND_DRV]);
    register(&server, SECOND_OUT);
    let mut heard = server.talk(ALICE, Version::minor(34), say);
    let results = results(heard.last());
    assert_eq!((results[0].status, &*results[0].message), (2, ""));
    let (id, realisation) = &results[0].outputs[0];
    assert!(id.starts_with("sha256:") && id.ends_with("!out"), "{id}");
    let realisation: serde_json::Value = serde_json::from_str(realisation).unwrap();
    assert_eq!(realisation["id"], **id);
    assert_eq!(realisation["outPath"], SECOND_OUT["/nix/store/".len()..]);
    assert_eq!(heard.last().0.texts("to build").unwrap(), [""; 0]);
    // Bob has none of it.
    let mut heard = server.talk(BOB, Version::minor(34), say);
    assert_eq!(heard.error(), format!("derivation '{SECOND_DRV}' is not valid here"));
    heard.last();
    let lists = [0; 3].map(|_| heard.0.texts("paths").unwrap());
    assert_eq!(lists, [vec![], vec![], vec![FIRST_OUT.to_owned(), SECOND_DRV.to_owned()]]);
    assert_eq!([heard.integer(), heard.integer()], [0, 0]);
    heard.end();
}

#[test]
fn broken_graphs_are_refused_with_the_rule() {
    let wrong = FIRST.replace("echo hi", "echo ho");
    let mut heard = Server::new().talk(ALICE, Version::minor(34), |said| {
        add_chain(said)?;
        add(said, "wrong.drv", "text:sha256", &[], wrong.as_bytes())?;
        add(said, "text.drv", "text:sha256", &[], b"Derive()")?;
        build(said, Operation::BuildPaths, &[&format!("{SECOND_DRV}!doc")], 0)?;
        build(said, Operation::BuildPaths, &[&format!("{SECOND_DRV}!out")], 1)
    });
    added_chain(&mut heard);
    let paths = [0; 2].map(|_| {
        let path = heard.last().0.text("the path").unwrap();
        PathInfo::read(&mut heard.0).unwrap();
        path
    });
    assert_eq!(heard.error(), format!("derivation '{SECOND_DRV}' has no output 'doc'"));
    assert_eq!(heard.error(), "the build mode must be 0, not 1: nothing is repaired here");
    heard.end();
    for (path, text, expected) in [
        (&paths[0], &*wrong, "the output out of derivation '/nix/store/"),
        (&paths[1], "Derive()", "can't be read: byte 7 of the derivation: must be \"[\""),
    ] {
        let mut heard = Server::new().talk(ALICE, Version::minor(34), |said| {
            add(said, StorePath::parse(path).unwrap().name(), "text:sha256", &[], text.as_bytes())?;
            build(said, Operation::BuildPaths, &[&format!("{path}!*")], 0)
        });
        heard.last().0.text("the path").unwrap();
        PathInfo::read(&mut heard.0).unwrap();
        let error = heard.error();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn contents_get_the_path_that_nix_gives_them() {
    let server = Server::new();
    let tree = tree("target");
    let mut heard = server.talk(ALICE, Version::minor(34), |said| {
        add(said, "f", "fixed:sha256", &[], b"hello\n")?;
        add(said, "f", "text:sha256", &[], b"hello\n")?;
        add(said, "tree", "fixed:r:sha256", &[], &tree.nar)?;
        add(said, "tree", "fixed:r:sha256", &[], b"no NAR")?;
        add(said, "f", "fixed:sha3", &[], b"hello\n")?;
        query_valid(said, &[&tree.path])
    });
    for expected in ["1p9q0bz6f22dyxh4lw8xs08p4201vyq4-f", "552f5r0wi8frys43livdhkagpkyfvjrv-f", tree.path.base_name()]
    {
        assert_eq!(heard.last().0.path("the path").unwrap().base_name(), expected);
        let info = PathInfo::read(&mut heard.0).unwrap();
        assert_eq!(
            info.content_address.unwrap().path(&expected[33..], &BTreeSet::new(), false).unwrap().base_name(),
            expected
        );
    }
    let error = heard.error();
    assert!(error.starts_with("'tree' can't be added: the archive"), "{error}");
    let error = heard.error();
    assert_eq!(error, "the content address must be a method such as \"fixed:r:sha256\", not \"fixed:sha3\"");
    assert_eq!(heard.last().0.paths("it").unwrap().len(), 1);
    heard.end();
    let mut heard = Server::with_room(false)
        .talk(ALICE, Version::minor(34), |said| add(said, "f", "fixed:sha256", &[], b"hello\n"));
    assert_eq!(heard.error(), "'f' can't be added: the disk is full for user:1");
}

#[test]
fn signatures_are_added_and_paths_forgotten() {
    let server = Server::new();
    let sign = |said: &mut Said, signatures: &[&str]| {
        ask(said, Operation::AddSignatures)?;
        said.text(FIRST_DRV)?;
        said.texts(signatures)
    };
    let collect = |said: &mut Said, action: u64| {
        ask(said, Operation::CollectGarbage)?;
        said.integer(action)?;
        said.texts([FIRST_DRV])?;
        [0_u64; 5].into_iter().try_for_each(|word| said.integer(word))
    };
    let (many, long) = ((0..33).map(|at| at.to_string()).collect::<Vec<_>>(), "x".repeat(513));
    let mut heard = server.talk(ALICE, Version::minor(34), |said| {
        sign(said, &["key:a"])?;
        add_chain(said)?;
        sign(said, &["key:a", "key:b"])?;
        sign(said, &many.iter().map(String::as_str).collect::<Vec<_>>())?;
        sign(said, &[&long])?;
        ask(said, Operation::QueryPathInfo)?;
        said.text(FIRST_DRV)?;
        collect(said, 2)?;
        collect(said, 3)?;
        query_valid(said, &[&StorePath::parse(FIRST_DRV).unwrap()])
    });
    assert_eq!(heard.error(), format!("path '{FIRST_DRV}' is not valid"));
    added_chain(&mut heard);
    assert_eq!(heard.last().integer(), 1);
    assert_eq!(heard.error(), format!("path '{FIRST_DRV}' must have at most 32 signatures, not 35"));
    assert_eq!(heard.error(), format!("a signature of path '{FIRST_DRV}' must have at most 512 bytes, not 513"));
    assert_eq!(heard.last().integer(), 1);
    let info = PathInfo::read(&mut heard.0).unwrap();
    assert_eq!(info.signatures, ["key:a", "key:b"].map(str::to_owned).into());
    assert_eq!(heard.error(), "garbage is collected by the daemon alone, by `cofferdam store gc`");
    assert_eq!(heard.last().0.texts("the paths").unwrap(), [FIRST_DRV]);
    assert_eq!([heard.integer(), heard.integer()], [0, 0]);
    assert_eq!(heard.last().0.paths("none").unwrap(), BTreeSet::new());
    heard.end();
}

#[test]
fn the_outputs_of_a_derivation_are_told() {
    let mut heard = Server::new().talk(ALICE, Version::minor(34), |said| {
        add_chain(said)?;
        ask(said, Operation::QueryDerivationOutputMap)?;
        said.text(SECOND_DRV)
    });
    added_chain(&mut heard);
    assert_eq!(heard.last().integer(), 1);
    assert_eq!(heard.0.text("a name").unwrap(), "out");
    assert_eq!(heard.0.text("its path").unwrap(), SECOND_OUT);
    heard.end();
}

/// A server where Alice has derivations that need each other like this, and the path of the first one. Their paths are wrong,
/// as those of unsigned paths may be.
fn needing(needs: &[Vec<usize>]) -> (Server, StorePath) {
    let server = Server::new();
    let store = server.nix.views.of(&ALICE.to_string());
    let path = |at: usize| StorePath::compute("text", &Hash::of(&at.to_le_bytes()), "some.drv").unwrap();
    let mut paths = Vec::new();
    for (at, needed) in needs.iter().enumerate() {
        let inputs: Vec<_> = needed.iter().map(|&input| format!("(\"{}\",[\"out\"])", path(input))).collect();
        let text = format!(r#"Derive([("out","","r:sha256","")],[{}],[],"","",[],[])"#, inputs.join(","));
        let mut writer = block_on(store.blobs.open_write());
        block_on(tokio::io::AsyncWriteExt::write_all(&mut writer, text.as_bytes())).unwrap();
        let digest: B3Digest = block_on(writer.close()).unwrap();
        let node = Node::File { digest, size: text.len() as u64, executable: false };
        let references = needed.iter().map(|&input| path(input)).collect();
        paths.push((path(at), Known { node, info: PathInfo { references, ..tree("target").info } }));
    }
    server.nix.paths.register(&ALICE, &paths).unwrap();
    (server, path(0))
}

#[test]
fn graphs_have_limits() {
    let chain = |length: usize| (0..length).map(|at| if at + 1 < length { vec![at + 1] } else { vec![] }).collect();
    let wide = |width: usize| std::iter::once((1..=width).collect()).chain((0..width).map(|_| vec![])).collect();
    for (needs, expected) in [
        (chain(5), None),
        (chain(6), Some("a chain must have at most 5 derivations, and '/nix/store/")),
        (wide(6), None),
        (wide(7), Some("there must be at most 7 derivations, and '/nix/store/")),
        (vec![vec![1; 20], vec![]], Some("the derivations must have at most 1000 bytes, not 1")),
        (vec![vec![1], vec![0]], Some("must not need itself")),
        (vec![vec![0]], Some("must not need itself")),
    ] {
        let needs: Vec<Vec<usize>> = needs;
        let limits = Limits { derivations: 7, depth: 5, text_bytes: 1000 };
        let (server, first) = needing(&needs);
        let tenant = Tenant::new(ALICE, Arc::clone(&server.nix));
        match (Graph::load(&tenant, &BTreeSet::from([first]), limits), expected) {
            (Ok(graph), None) => assert_eq!(graph.0.len(), needs.len()),
            (Err(Stop::Refused(text)), Some(expected)) => assert!(text.contains(expected), "{text}"),
            (Ok(_), Some(expected)) => panic!("it was loaded: {expected}"),
            (Err(stop), _) => panic!("{stop:?}"),
        }
    }
}
