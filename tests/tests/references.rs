//! Needles are found everywhere in outputs, and no others are reported.

use std::{fs, os::unix::fs::symlink, path::Path};

use cofferdam_tests::{Cofferdam, Outcome};

/// A needle like Nix's: 32 characters of its alphabet, different for each number.
fn needle(number: usize) -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";
    let bytes = blake3::hash(format!("needle {number}").as_bytes());
    bytes.as_bytes().iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect()
}

/// Copies a tree in a build, and returns the indexes of the needles found in the copy.
fn found_in(cofferdam: &Cofferdam, tree: &Path, needles: &[String]) -> (Vec<u64>, Outcome) {
    let mut build = cofferdam.build().input("tree", tree).output("build/copy");
    for needle in needles {
        build = build.flag("--needle", needle);
    }
    let built = build.shell("cp -dR /inputs/tree copy").succeeds();
    (built.output().needles, built)
}

/// Contents arrive in pieces. For a piece of any size, some needle here lies across a boundary, at every offset.
#[test]
fn needles_are_found_across_every_boundary() {
    // Sizes of messages, of a guest's writes, of pages, and of usual buffers.
    const PIECES: [usize; 6] = [28 * 1024 - 64, 28 * 1024, 4096, 8192, 64 * 1024, 128 * 1024];
    let cofferdam = Cofferdam::new();
    let tree = cofferdam.files().join("tree");
    fs::create_dir(&tree).unwrap();
    let mut needles = Vec::new();
    for piece in PIECES {
        let mut contents = vec![b'-'; 33 * piece];
        for before in 1..32 {
            let text = needle(needles.len());
            let at = before * piece - before;
            contents[at..at + text.len()].copy_from_slice(text.as_bytes());
            needles.push(text);
        }
        fs::write(tree.join(piece.to_string()), contents).unwrap();
    }
    let present = needles.len() as u64;
    needles.extend((0..10).map(|number| needle(100_000 + number)));

    let (found, built) = found_in(&cofferdam, &tree, &needles);
    assert_eq!(found, (0..present).collect::<Vec<_>>(), "{built}");
}

#[test]
fn needles_are_found_in_contents_names_and_targets() {
    let cofferdam = Cofferdam::new();
    let tree = cofferdam.files().join("tree");
    fs::create_dir_all(tree.join("a-directory-name/deep")).unwrap();
    let long = "long ".repeat(200);
    let piece = 28 * 1024 - 64;
    let mut contents = vec![b'.'; 3 * piece];
    contents[piece - 500..piece - 500 + long.len()].copy_from_slice(long.as_bytes());
    contents[2 * piece - 1..2 * piece + 1].copy_from_slice(b"!?");
    fs::write(tree.join("contents"), contents).unwrap();
    fs::write(tree.join("a-directory-name/deep/a-file-name"), "grün\0and more").unwrap();
    symlink("/to/a-target/below", tree.join("a-link-name")).unwrap();
    // The end of one file and the beginning of the next make no needle.
    fs::write(tree.join("split-1"), "first half ").unwrap();
    fs::write(tree.join("split-2"), "second half").unwrap();

    let present = [&long, "!?", "a-directory-name", "a-file-name", "grün", "a-target", "a-link-name", "x"];
    let present = present.map(str::to_owned);
    fs::write(tree.join("last"), "x").unwrap();
    let absent = ["first half second half", "split-1split-2", "absent", "copy", "/inputs", "deep/a-file-name", "?!"];
    let needles = [&present[..], &absent.map(str::to_owned)].concat();
    let (found, built) = found_in(&cofferdam, &tree, &needles);
    assert_eq!(found, (0..present.len() as u64).collect::<Vec<_>>(), "{built}");
}

#[test]
fn each_output_shows_its_own_needles() {
    let cofferdam = Cofferdam::new();
    let (one, two) = (needle(1), needle(2));
    let build = cofferdam.build().plain().output("build/a").output("build/b").output("build/c");
    let script = format!("echo {one} > a; echo {one}{two} > b; echo none > c");
    let built = build.flag("--needle", &one).flag("--needle", &two).shell(&script).succeeds();
    let lines: Vec<Vec<&str>> = built.stdout.lines().map(|line| line.split('\t').collect()).collect();
    let found: Vec<_> = lines.iter().map(|line| (line[0], line[2].to_owned())).collect();
    let expected = [("build/a", one.clone()), ("build/b", format!("{one} {two}")), ("build/c", String::new())];
    assert_eq!(found, expected, "{built}");
}
