//! Each promise of `docs/promises.md` names tests that exist.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The directory of each crate's modules.
const CRATES: [(&str, &str); 7] = [
    ("cofferdam", "host/src"),
    ("cofferdam-castore", "host/castore/src"),
    ("cofferdam-nix", "host/nix/src"),
    ("cofferdam-images", "images/src"),
    ("cofferdam-protocol", "guest-init/protocol/src"),
    ("cofferdam-rpc", "host/rpc/src"),
    ("cofferdam-fuzz", "tests/fuzz/src"),
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The fault of a name such as `isolation::there_is_no_vsock` or `cofferdam-castore gc::tests`, if it has one.
fn missing(name: &str) -> Option<String> {
    let (dir, path) = match name.split_once(' ') {
        None => match CRATES.iter().find(|(known, _)| *known == name) {
            Some((_, dir)) => (*dir, ""),
            None => ("tests/tests", name),
        },
        Some((krate, path)) => match CRATES.iter().find(|(known, _)| *known == krate) {
            Some((_, dir)) => (*dir, path),
            None => return Some(format!("no crate {krate}")),
        },
    };
    let mut place = workspace().join(dir);
    let mut file = None;
    let mut rest = path.split("::").filter(|part| !part.is_empty()).peekable();
    while let Some(part) = rest.peek() {
        let below = [place.join(format!("{part}.rs")), place.join(part).join("mod.rs")];
        let Some(found) = below.into_iter().find(|path| path.is_file()) else { break };
        place = place.join(part);
        file = Some(found);
        rest.next();
    }
    let Some(file) = file else {
        return (!path.is_empty() || !place.is_dir()).then(|| format!("no module {path} in {dir}"));
    };
    let source = fs::read_to_string(&file).expect("it can be read");
    rest.find(|part| !source.contains(&format!("mod {part}")) && !source.contains(&format!("fn {part}(")))
        .map(|part| format!("neither a module nor a function {part} in {}", file.display()))
}

/// The names of tests in the last column of the table, without the commands and documents there.
fn names(document: &str) -> BTreeSet<&str> {
    let rows = document.lines().filter(|line| line.starts_with("| "));
    let cells = rows.filter_map(|row| row.trim_end_matches(" |").rsplit_once(" | ")).map(|(_, tests)| tests);
    let quoted = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    quoted.filter(|name| !name.starts_with("just ") && !name.contains("://")).collect()
}

#[test]
fn every_test_that_a_promise_names_exists() {
    let document = fs::read_to_string(workspace().join("docs/promises.md")).expect("it can be read");
    let names = names(&document);
    assert!(names.len() > 50, "the table is not found: {names:?}");
    let missing: Vec<_> = names.into_iter().filter_map(|name| Some((name, missing(name)?))).collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn a_name_of_nothing_is_noticed() {
    for name in [
        "nothing",
        "isolation::nothing",
        "cofferdam nothing",
        "cofferdam scheduler::nothing",
        "cofferdam scheduler::tests::nothing",
        "nobody scheduler",
    ] {
        assert!(missing(name).is_some(), "{name}");
    }
    assert_eq!(names("| a | `b::c`, `just d`; `e f` |\n| - | - |"), ["b::c", "e f"].into());
}
