//! Layers over each other, and roots.

use super::*;
use crate::import::Lost;

/// The root of some layers, with the count of what it lost.
fn stacked(layers: impl IntoIterator<Item = Made>) -> Result<(Directory, Lost, Store), ArchiveError> {
    let store = Store::memory();
    let mut all = Layers::new(&store, Limits::default());
    for layer in layers {
        all.apply(&*layer.end())?;
    }
    let (node, lost) = all.finish()?;
    let Node::Directory { digest, .. } = node else { panic!("a root is a directory") };
    Ok((block_on(store.directories.get(&digest)).unwrap().unwrap(), lost, store))
}

/// The paths of all files, links and empty directories, in order.
fn paths(layers: impl IntoIterator<Item = Made>) -> String {
    fn collect(store: &Store, directory: &Directory, above: &str, into: &mut Vec<String>) {
        for (name, node) in directory.nodes() {
            let path = format!("{above}{name}");
            let Node::Directory { digest, size } = node else {
                into.push(path);
                continue;
            };
            if *size == 0 {
                into.push(format!("{path}/"));
            }
            let below = block_on(store.directories.get(digest)).unwrap().unwrap_or_default();
            collect(store, &below, &format!("{path}/"), into);
        }
    }
    let (root, _, store) = stacked(layers).unwrap();
    let mut all = Vec::new();
    collect(&store, &root, "", &mut all);
    all.join(" ")
}

fn stacking_refused(layers: impl IntoIterator<Item = Made>) -> String {
    stacked(layers).err().expect("it is taken").to_string()
}

fn lower() -> Made {
    Made::new().directory("d/").file("d/a", b"a").file("d/e/b", b"b").file("f", b"f").symlink("l", "d")
}

#[test]
fn upper_layers_replace_what_lower_ones_have() {
    let new = |made: Made| paths([lower(), made]);
    assert_eq!(new(Made::new()), "d/a d/e/b f l");
    assert_eq!(new(Made::new().file("d/a", b"A").file("d/e/c", b"c")), "d/a d/e/b d/e/c f l");
    assert_eq!(new(Made::new().file("d", b"a file now")), "d f l");
    assert_eq!(new(Made::new().file("d", b"").directory("d").file("d/x", b"")), "d/x f l");
    assert_eq!(new(Made::new().directory("f").directory("l")), "d/a d/e/b f/ l/");
}

#[test]
fn whiteouts_remove_what_lower_layers_have_and_nothing_else() {
    let new = |made: Made| paths([lower(), made]);
    assert_eq!(new(Made::new().file("d/.wh.a", b"")), "d/e/b f l");
    assert_eq!(new(Made::new().file(".wh.d", b"").file("none/.wh.a", b"").file(".wh.none", b"")), "f l");
    assert_eq!(new(Made::new().file("./.wh.f", b"").symlink(".wh.l", "t")), "d/a d/e/b");
    // In either order, with what the same layer has.
    assert_eq!(new(Made::new().file(".wh.f", b"").file("f", b"new")), "d/a d/e/b f l");
    assert_eq!(new(Made::new().file("f", b"new").file(".wh.f", b"")), "d/a d/e/b f l");
    assert_eq!(new(Made::new().file("d/x", b"").file(".wh.d", b"").file("d/.wh.a", b"")), "d/x f l");
    assert_eq!(new(Made::new().directory("d").file(".wh.d", b"")), "d/ f l");
    assert_eq!(new(Made::new().file("d/.wh..wh..opq", b"")), "d/ f l");
    assert_eq!(new(Made::new().directory("d").file("d/.wh..wh..opq", b"").file("d/e/x", b"")), "d/e/x f l");
    assert_eq!(new(Made::new().file("d/e/x", b"").file("d/.wh..wh..opq", b"")), "d/e/x f l");
    assert_eq!(new(Made::new().file(".wh..wh..opq", b"").file("only", b"")), "only");
    assert_eq!(new(Made::new().file(".wh..wh.plnk/1", b"").file(".wh..wh.aufs", b"")), "d/a d/e/b f l");
    // A third layer sees what the second has left.
    let second = Made::new().file("d/.wh.a", b"").file("d/c", b"");
    assert_eq!(paths([lower(), second, Made::new().file(".wh.f", b"").file("d/e/.wh.b", b"")]), "d/c d/e/ l");
    // They mean nothing in an archive that is no layer.
    let store = Store::memory();
    let (node, _) = import_root(&store, &*Made::new().file(".wh.f", b"").end(), Limits::default()).unwrap();
    assert_eq!(node, directory([(".wh.f", file(b"", false))]).to_node());
}

#[test]
fn a_whiteout_of_the_root_is_refused() {
    for path in [".wh.", ".wh..", ".wh...", "d/.wh."] {
        let error = stacking_refused([lower(), Made::new().file(path, b"")]);
        assert!(error.contains("a layer can't remove its root"), "{path}: {error}");
    }
}

#[test]
fn links_on_the_way_are_followed_within_the_root() {
    let into =
        |target: &str, path: &str| paths([lower(), Made::new().symlink("s", target), Made::new().file(path, b"")]);
    for target in ["d/e", "/d/e", "./d/../d/e", "../../d/e", "l/e", "/l/e/"] {
        assert_eq!(into(target, "s/new"), "d/a d/e/b d/e/new f l s", "{target}");
        assert_eq!(into(target, "s/.wh.b"), "d/a d/e/ f l s", "{target}");
    }
    assert_eq!(into("made/on/demand", "s/new"), "d/a d/e/b f l made/on/demand/new s");
    let link = Made::new().link("linked", "s/b");
    assert_eq!(paths([lower(), Made::new().symlink("s", "/d/e"), link]), "d/a d/e/b f l linked s");
    let round = Made::new().symlink("a", "b").symlink("b", "a");
    assert!(stacking_refused([round, Made::new().file("a/x", b"")]).contains("more than 40 symbolic links"));
    let through = stacking_refused([lower(), Made::new().file("f/x", b"")]);
    assert!(through.contains("\"f\" in its path is a file"), "{through}");
}

#[test]
fn hard_links_reach_lower_layers_and_nothing_outside() {
    let (root, ..) = stacked([lower(), Made::new().link("h", "d/a").link("g", "/f").file("d/a", b"new")]).unwrap();
    assert_eq!(root.get(b"h".as_slice()), Some(&file(b"a", false)));
    assert_eq!(root.get(b"g".as_slice()), Some(&file(b"f", false)));
    for target in ["../etc/passwd", "/../etc/passwd", "d/../../x"] {
        let error = stacking_refused([lower(), Made::new().link("h", target)]);
        assert!(error.contains("leads out of the root"), "{target}: {error}");
    }
    for target in ["/etc/passwd", "d", "none", ""] {
        let error = stacking_refused([lower(), Made::new().link("h", target)]);
        assert!(error.contains("no file before it has that path"), "{target}: {error}");
    }
    let gone = stacking_refused([lower(), Made::new().file("d/.wh.a", b""), Made::new().link("h", "d/a")]);
    assert!(gone.contains("no file before it has that path"), "{gone}");
}

#[test]
fn paths_lead_from_the_root_and_never_out_of_it() {
    assert_eq!(paths([Made::new().file("/etc/x", b"").file("//a", b"").directory("/")]), "a etc/x");
    for path in ["../a", "a/../b", "/..", "d/.."] {
        let error = stacking_refused([Made::new().file(path, b"")]);
        assert!(error.contains("\"..\" is reserved"), "{path}: {error}");
    }
    assert!(stacking_refused([Made::new().file(".", b"x")]).contains("the root is not a directory"));
}

#[test]
fn what_castore_can_not_hold_is_left_out_and_counted() {
    let made = Made::new()
        .entry(EntryType::Char, b"dev/null", b"", b"")
        .entry(EntryType::Block, b"dev/sda", b"", b"")
        .entry(EntryType::Fifo, b"f", b"", b"")
        .link("dev/zero", "dev/null")
        .file("bin/sux", b"")
        .file("bin/no", b"");
    let mut bytes = made.end();
    // The mode of `bin/sux`, with the sum of its header.
    let at = bytes.windows(7).position(|window| window == b"bin/sux").unwrap();
    let mut header = Header::from_byte_slice(&bytes[at..at + 512]).clone();
    header.set_mode(0o4755);
    header.set_cksum();
    bytes[at..at + 512].copy_from_slice(header.as_bytes());
    let store = Store::memory();
    let (node, lost) = import_root(&store, &*bytes, Limits::default()).unwrap();
    assert_eq!(lost, Lost { devices: 4, set_id: 1 });
    let bin = directory([("sux", file(b"", true)), ("no", file(b"", false))]);
    assert_eq!(node, directory([("bin", bin.to_node()), ("dev", Directory::new().to_node())]).to_node());
    // A device hides what was in its place.
    let devices = Made::new().entry(EntryType::Char, b"f", b"", b"");
    assert_eq!(paths([lower(), devices]), "d/a d/e/b l");
    assert!(stacking_refused([Made::new().entry(EntryType::new(b'M'), b"m", b"", b"")]).contains("of the kind 'M'"));
}

#[test]
fn limits_hold_for_all_layers_together() {
    let store = Store::memory();
    let mut layers = Layers::new(&store, Limits { entries: 5, bytes: 1 << 20 });
    layers.apply(&*Made::new().file("a", b"").file("a", b"").file(".wh.b", b"").end()).unwrap();
    let error = layers.apply(&*Made::new().file("b/c", b"").file("a", b"").end()).unwrap_err();
    assert!(matches!(error, ArchiveError::Limit { what: "entries", .. }), "{error}");
    let mut layers = Layers::new(&store, Limits { entries: 5, bytes: 100_000 });
    layers.apply(&*Made::new().file("a", &[0; 40_000]).end()).unwrap();
    let error = layers.apply(&*Made::new().file("a", &[0; 70_000]).end()).unwrap_err();
    assert!(matches!(error, ArchiveError::Limit { what: "bytes", .. }), "{error}");
}

#[test]
fn directories_nest_only_so_deep_by_way_of_links_too() {
    let half = "d/".repeat(MAX_DEPTH / 2 + 1);
    let mut made = Made::new().pax(EntryType::XHeader, &[("path", &half)]).directory("half");
    made = made.pax(EntryType::XHeader, &[("linkpath", &half)]).symlink("s", "t");
    let long = format!("s/{half}");
    made = made.pax(EntryType::XHeader, &[("path", &long)]).directory("long");
    assert!(stacking_refused([made]).contains("nested deeper"));
}

/// The rules of layers, on a real file system: whiteouts first, then what the layer has.
fn unpack(layers: &[Vec<(&str, bool)>], at: &Path) {
    std::fs::create_dir(at).unwrap();
    for layer in layers {
        for (path, is_whiteout) in layer {
            if *is_whiteout {
                let path = at.join(path);
                let _ = std::fs::remove_file(&path);
                let _ = std::fs::remove_dir_all(&path);
            }
        }
        for (path, _) in layer.iter().filter(|(_, is_whiteout)| !is_whiteout) {
            let path = at.join(path);
            let _ = std::fs::remove_dir_all(&path);
            for above in path.parent().unwrap().ancestors().collect::<Vec<_>>().into_iter().rev() {
                let _ = std::fs::create_dir(above);
            }
            let _ = std::fs::write(path, "");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn layers_give_what_a_file_system_gives(
        layers in proptest::collection::vec(
            proptest::collection::btree_map("[ab](/[ab](/[ab])?)?", proptest::bool::weighted(0.4), 0..6), 1..5),
    ) {
        // A layer has no file where it has a directory, and whiteouts of what it doesn't have alone.
        let layers: Vec<Vec<(&str, bool)>> = layers.iter().map(|layer| {
            let files: Vec<&str> = layer.iter().filter(|(_, gone)| !**gone).map(|(path, _)| &**path).collect();
            let within = |path: &str, of: &str| path.starts_with(&format!("{of}/"));
            layer.iter().map(|(path, gone)| (&**path, *gone)).filter(|(path, gone)| {
                !files.iter().any(|file| within(path, file)) && (!gone || !files.iter().any(|file| within(file, path)))
            }).collect()
        }).collect();
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        unpack(&layers, &root);
        let made = layers.iter().map(|layer| layer.iter().fold(Made::new(), |made, (path, gone)| {
            let (above, name) = path.rsplit_once('/').map_or(("", *path), |(above, name)| (above, name));
            if *gone { made.file(&format!("{above}/.wh.{name}"), b"") } else { made.file(path, b"") }
        }));
        match stacked(made) {
            Ok((directory, ..)) => {
                let expected = import_path(&Store::memory(), &root).unwrap();
                prop_assert_eq!(directory.to_node(), expected, "{:?}", layers);
            }
            Err(error) => prop_assert!(error.to_string().contains("in its path is a file"), "{error}"),
        }
    }
}
