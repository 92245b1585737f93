use super::*;

const VERSIONS: [Version; 7] = [
    Version::minor(21),
    Version::minor(32),
    Version::minor(33),
    Version::minor(34),
    Version::minor(35),
    Version::minor(37),
    Version::minor(38),
];

#[test]
fn every_version_gets_its_hello() {
    for version in VERSIONS {
        Server::new().talk(ALICE, version, |_| Ok(())).end();
    }
    // A newer client speaks ours.
    let heard = Server::new().raw(ALICE, &*{
        let mut said = Writer(Vec::new());
        hello(&mut said, Version::minor(99)).unwrap();
        said.0
    });
    check_hello(&mut Reader::new(&*heard), Version::minor(38)).unwrap();
}

#[test]
fn the_bytes_of_a_hello_are_these() {
    let said = b"cxin\0\0\0\0\x22\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let heard = b"oixd\0\0\0\0\x26\x01\0\0\0\0\0\0\x0f\0\0\0\0\0\0\0Cofferdam 0.1.0\0stla\0\0\0\0";
    assert_eq!(Server::new().raw(ALICE, &said[..]), heard);
}

#[test]
fn a_path_comes_back_as_it_was_given_and_only_to_its_client() {
    let (server, tree) = (Server::new(), tree("target"));
    let mut heard = server.talk(ALICE, Version::minor(34), |said| {
        query_valid(said, &[&tree.path])?;
        add_multiple(said, true, &[&tree])?;
        query_valid(said, &[&tree.path])?;
        ask(said, Operation::QueryPathInfo)?;
        said.text(&tree.path)?;
        ask(said, Operation::NarFromPath)?;
        said.text(&tree.path)?;
        ask(said, Operation::QueryPathFromHashPart)?;
        said.text(tree.path.hash_part())?;
        ask(said, Operation::IsValidPath)?;
        said.text(&tree.path)
    });
    assert_eq!(heard.last().0.paths("none").unwrap(), BTreeSet::new());
    assert_eq!(heard.last().last().0.paths("the path").unwrap(), BTreeSet::from([tree.path.clone()]));
    assert_eq!(heard.last().integer(), 1);
    let info = PathInfo::read(&mut heard.0).unwrap();
    // The daemon has its own time.
    assert!(info.registration_time > tree.info.registration_time);
    assert_eq!(PathInfo { registration_time: tree.info.registration_time, ..info }, tree.info);
    let mut nar = vec![0; tree.nar.len()];
    heard.last().0.input().read_exact(&mut nar).unwrap();
    assert_eq!(nar, tree.nar);
    assert_eq!(heard.last().0.path("it").unwrap(), tree.path);
    assert_eq!(heard.last().integer(), 1);
    heard.end();

    let mut heard = server.talk(BOB, Version::minor(34), |said| {
        query_valid(said, &[&tree.path])?;
        ask(said, Operation::QueryPathInfo)?;
        said.text(&tree.path)?;
        ask(said, Operation::NarFromPath)?;
        said.text(&tree.path)?;
        ask(said, Operation::IsValidPath)?;
        said.text(&tree.path)
    });
    assert_eq!(heard.last().0.paths("none").unwrap(), BTreeSet::new());
    assert_eq!(heard.last().integer(), 0);
    assert_eq!(heard.error(), format!("path '{}' is not valid", tree.path));
    assert_eq!(heard.last().integer(), 0);
    heard.end();
}

#[test]
fn an_old_client_is_asked_for_its_nar_piece_by_piece() {
    let (server, tree) = (Server::new(), tree("target"));
    let add = |said: &mut Said| {
        ask(said, Operation::AddToStoreNar)?;
        said.text(&tree.path)?;
        tree.info.write(said)?;
        said.integer(false)?;
        said.integer(true)
    };
    let half = tree.nar.len() / 2;
    let mut heard = server.talk(ALICE, Version::minor(21), |said| {
        add(said)?;
        said.string(&tree.nar[..half])?;
        said.string(&tree.nar[half..])
    });
    for _ in 0..2 {
        assert_eq!([heard.integer(), heard.integer()], [0x6461_7461, 64 * 1024]);
    }
    heard.last();
    heard.end();
    let mut heard = Server::new().talk(ALICE, Version::minor(23), |said| {
        add(said)?;
        frames(said, &tree.nar)?;
        query_valid(said, &[&tree.path])
    });
    // There was no `substitute` before 1.27, so the last word is the next operation.
    assert_eq!(heard.last().last().0.paths("the path").unwrap().len(), 1);
}

#[test]
fn a_nar_that_is_not_what_its_metadata_say_is_refused() {
    type Change = fn(&mut Tree);
    let cases: [(&str, Change); 4] = [
        ("hash mismatch", |tree| tree.info.nar_hash = Hash::of(b"other")),
        ("cut short", |tree| tree.info.nar_size -= 8),
        ("goes on after its end", |tree| tree.info.nar_size += 8),
        ("is not a NAR", |tree| tree.nar[9] ^= 1),
    ];
    for (expected, break_it) in cases {
        let (server, mut bad) = (Server::new(), tree("target"));
        break_it(&mut bad);
        let good = tree("other");
        let mut heard = server.talk(ALICE, Version::minor(34), |said| {
            add_multiple(said, true, &[&bad, &good])?;
            query_valid(said, &[&bad.path, &good.path])?;
            add_multiple(said, true, &[&good])?;
            query_valid(said, &[&bad.path, &good.path])
        });
        let error = heard.error();
        assert!(error.contains(expected) && error.contains(&bad.path.to_string()), "{error}");
        assert_eq!(heard.last().0.paths("none").unwrap(), BTreeSet::new(), "{expected}");
        assert_eq!(heard.last().last().0.paths("one").unwrap(), BTreeSet::from([good.path]));
        heard.end();
    }
}

#[test]
fn unsigned_paths_need_a_content_address_that_is_right() {
    let by_its_contents = tree("target");
    let mut unsigned = tree("target");
    unsigned.info.content_address = None;
    unsigned.path = StorePath::compute("output:out", &Hash::of(b""), "tree").unwrap();
    let mut other_path = tree("target");
    other_path.path = unsigned.path.clone();
    let mut other_contents = tree("target");
    let address = ContentAddress { method: Method::Recursive, hash: Hash::of(b"") };
    other_contents.path = address.path("tree", &BTreeSet::new(), false).unwrap();
    other_contents.info.content_address = Some(address);
    for (tree, dont_check_signatures, expected) in [
        (&by_its_contents, false, None),
        (&unsigned, true, None),
        (&unsigned, false, Some("lacks a signature by a trusted key")),
        (&other_path, true, Some("its content address fixed:r:sha256:")),
        (&other_contents, true, Some("its contents have the hash sha256-")),
    ] {
        let mut heard =
            Server::new().talk(ALICE, Version::minor(34), |said| add_multiple(said, dont_check_signatures, &[tree]));
        match expected {
            Some(expected) => assert!(heard.error().contains(expected), "{expected}"),
            None => drop(heard.last()),
        }
        heard.end();
    }
}

#[test]
fn other_operations_are_answered_as_nix_expects() {
    let path = tree("target").path;
    let mut heard = Server::new().talk(ALICE, Version::minor(38), |said| {
        ask(said, Operation::SetOptions)?;
        for number in 0..12_u64 {
            said.integer(number)?;
        }
        said.integer(1_u64)?;
        said.text("cores")?;
        said.text("7")?;
        ask(said, Operation::AddTempRoot)?;
        said.text(&path)?;
        ask(said, Operation::QuerySubstitutablePaths)?;
        said.texts([&path])?;
        ask(said, Operation::EnsurePath)?;
        said.text(&path)
    });
    assert_eq!(heard.last().last().integer(), 1);
    assert_eq!(heard.last().0.texts("none").unwrap(), [""; 0]);
    assert_eq!(heard.error(), format!("path '{path}' is not valid"));
    heard.end();
}

#[test]
fn a_client_that_is_not_trusted_brings_only_what_is_signed_or_addressed_by_its_contents() {
    let server = Server::with(Store::memory(), true, true);
    let mut unsigned = tree("target");
    unsigned.info.content_address = None;
    let mut signed = tree("target");
    signed.info.content_address = None;
    signed.info.signatures = BTreeSet::from([server.nix.keys.sign(&signed.path, &signed.info)]);
    let said = |trees: &[&Tree], version| {
        let mut said = Writer(Vec::new());
        hello(&mut said, version).and_then(|()| add_multiple(&mut said, true, trees)).unwrap();
        let heard = server.raw(ALICE, &*said.0);
        let mut heard = Heard(Reader::new(io::Cursor::new(heard)));
        assert_eq!([heard.integer(), heard.integer()], [SERVER_MAGIC, 0x126]);
        heard.0.text("the version").unwrap();
        if version >= Version::minor(35) {
            assert_eq!(heard.integer(), 2, "clients are not trusted");
        }
        heard.last();
        heard
    };
    let error = said(&[&unsigned], Version::minor(35)).error();
    assert_eq!(error, format!("cannot add path '{}' because it lacks a signature by a trusted key", unsigned.path));
    for tree in [&signed, &tree("target")] {
        said(&[tree], Version::minor(34)).last();
    }
    signed.info.signatures = (0..33).map(|at| format!("key:{at}")).collect();
    let error = said(&[&signed], Version::minor(34)).error();
    assert!(error.ends_with("must have at most 32 signatures, not 33"), "{error}");
}
