//! Import and scan.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    process::Command,
    time::Instant,
};

use aho_corasick::AhoCorasick;
use anyhow::{Result, ensure};
use cofferdam_castore::{Node, Store, import::import_path, refscan::ReferencePattern};
use tempfile::TempDir;

use super::{
    measure::{LARGE_ROUNDS, ROUNDS, Series, report},
    tree::{make_tree, noise},
};

const LARGE_MIB: usize = 2048;

const SCANNED_BYTES: usize = 256 * 1024 * 1024;

/// Size of the pieces that an import feeds to the scanner.
const PIECE_BYTES: usize = 512 * 1024;

/// Hash parts of store paths.
const NEEDLES: usize = 500;
const NIXBASE32: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

pub(crate) fn local_store(dir: &Path) -> Result<Store> {
    let (blobs, directories) = (dir.join("blobs"), dir.join("directories.redb"));
    Ok(Store::from_addrs(&format!("file://{}", blobs.display()), &format!("redb://{}", directories.display()))?)
}

/// Imports, imports again, copies and hashes, in turn.
fn compare_import(dir: &TempDir, from: &Path, rounds: usize, mut rows: impl FnMut([&Series; 5])) -> Result<()> {
    let [mut ours, mut again, mut copying, mut syncing, mut hashing] = [(); 5].map(|()| Series::default());
    let (state, copy) = (dir.path().join("state"), dir.path().join("copy"));
    for _ in 0..rounds {
        nix::unistd::sync();
        let node = ours.work(|| Ok(import_path(&local_store(&state)?, from)?))?;
        let known: Node = again.work(|| Ok(import_path(&local_store(&state)?, from)?))?;
        ensure!(node == known, "another import gave another node");
        nix::unistd::sync();
        copying.run(Command::new("cp").arg("-r").arg(from).arg(&copy))?;
        let begun = Instant::now();
        nix::unistd::sync();
        syncing.times.extend(copying.times.last().map(|copied| *copied + begun.elapsed()));
        hashing.work(|| hash(from))?;
        if copy.is_dir() {
            fs::remove_dir_all(&copy)?;
        } else {
            fs::remove_file(&copy)?;
        }
        fs::remove_dir_all(&state)?;
    }
    rows([&ours, &again, &copying, &syncing, &hashing]);
    Ok(())
}

/// BLAKE3 of all files, one after the other.
fn hash(path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            hash(&entry?.path())?;
        }
    } else {
        std::hint::black_box(blake3::Hasher::new().update_reader(File::open(path)?)?.finalize());
    }
    Ok(())
}

pub(crate) fn import_tree(dir: &TempDir) -> Result<()> {
    let tree = dir.path().join("tree");
    make_tree(&tree)?;
    compare_import(dir, &tree, ROUNDS, |[ours, again, copying, syncing, hashing]| {
        report("import 10,000 files : cp -r", ours, copying, "≤ 1.5");
        report("import 10,000 files : cp -r, sync", ours, syncing, "");
        report("import 10,000 files : BLAKE3", ours, hashing, "");
        report("import 10,000 known files : BLAKE3", again, hashing, "");
    })
}

pub(crate) fn import_large(dir: &TempDir) -> Result<()> {
    let path = dir.path().join("large");
    let mut file = File::create(&path)?;
    let mut piece = noise(1024 * 1024);
    for number in 0..LARGE_MIB as u64 {
        piece[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&piece)?;
    }
    compare_import(dir, &path, LARGE_ROUNDS, |[ours, again, copying, syncing, hashing]| {
        report("import a file of 2 GiB : cp", ours, copying, "≤ 1.5");
        report("import a file of 2 GiB : cp, sync", ours, syncing, "");
        report("import a file of 2 GiB : BLAKE3", ours, hashing, "");
        report("import a known file of 2 GiB : BLAKE3", again, hashing, "");
    })
}

pub(crate) fn scan(_: &TempDir) -> Result<()> {
    // Machine code, text and tables, as outputs have them; this program's own.
    let program = fs::read("/proc/self/exe")?;
    let bytes: Vec<u8> = program.iter().copied().cycle().take(SCANNED_BYTES).collect();
    let character = |byte: &u8| char::from(NIXBASE32[usize::from(byte % 32)]);
    let hashes: Vec<String> = noise(NEEDLES * 32).chunks(32).map(|hash| hash.iter().map(character).collect()).collect();
    let needles = ReferencePattern::new(&hashes)?;
    let automaton = AhoCorasick::new(&hashes)?;
    let [mut ours, mut searching, mut hashing] = [(); 3].map(|()| Series::default());
    for _ in 0..ROUNDS {
        let found = ours.work(|| {
            let mut scanner = needles.scanner();
            bytes.chunks(PIECE_BYTES).for_each(|piece| scanner.feed(piece));
            Ok(scanner.found().len())
        })?;
        let expected = searching.work(|| {
            Ok(bytes.chunks(PIECE_BYTES).map(|piece| automaton.find_overlapping_iter(piece).count()).sum::<usize>())
        })?;
        ensure!(found == 0 && expected == 0, "needles were found, but there are none");
        hashing.work(|| {
            let mut hasher = blake3::Hasher::new();
            for piece in bytes.chunks(PIECE_BYTES) {
                hasher.update(piece);
            }
            Ok(std::hint::black_box(hasher.finalize()))
        })?;
    }
    report("scan for 500 needles : aho-corasick", &ours, &searching, "≤ 1");
    report("scan for 500 needles : BLAKE3", &ours, &hashing, "≤ 1");
    Ok(())
}
