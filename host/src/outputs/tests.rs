use std::collections::BTreeMap;

use cofferdam_castore::B3Digest;
use proptest::prelude::*;

use super::*;

const LIMITS: tree::Limits = tree::Limits { entries: 1_000, bytes: 1 << 20 };

/// A tree in the guest.
#[derive(Debug, Clone)]
enum Tree {
    Directory(BTreeMap<Vec<u8>, Tree>),
    File { contents: Vec<u8>, executable: bool },
    Symlink(Vec<u8>),
}

impl Tree {
    /// The stream of this tree, its files in pieces of `piece` bytes.
    fn events<'a>(&'a self, name: &'a [u8], piece: usize, into: &mut Vec<Event<'a>>) {
        match self {
            Self::Directory(entries) => {
                into.push(Event::Directory { name });
                entries.iter().for_each(|(name, tree)| tree.events(name, piece, into));
                into.push(Event::End);
            }
            Self::File { contents, executable } => {
                into.push(Event::File { name, executable: *executable });
                into.extend(contents.chunks(piece).map(Event::Data));
                into.push(Event::End);
            }
            Self::Symlink(target) => into.push(Event::Symlink { name, target }),
        }
    }

    /// The node of this tree, computed without the receiver.
    fn node(&self) -> Node {
        match self {
            Self::Directory(entries) => {
                let mut directory = Directory::default();
                for (name, tree) in entries {
                    directory.add(name.as_slice().try_into().unwrap(), tree.node()).unwrap();
                }
                Node::Directory { digest: directory.digest(), size: directory.size() }
            }
            Self::File { contents, executable } => {
                let size = contents.len() as u64;
                Node::File { digest: B3Digest::of(contents), size, executable: *executable }
            }
            Self::Symlink(target) => Node::Symlink { target: target.as_slice().try_into().unwrap() },
        }
    }

    /// Whether `needle` occurs in a name, a target or the contents of a file.
    fn holds(&self, needle: &[u8]) -> bool {
        let within = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        match self {
            Self::Directory(entries) => entries.iter().any(|(name, tree)| within(name) || tree.holds(needle)),
            Self::File { contents, .. } => within(contents),
            Self::Symlink(target) => within(target),
        }
    }
}

/// Bytes of a small alphabet, so that needles occur.
fn text(length: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'b'), Just(0xff)], length)
}

fn trees() -> impl Strategy<Value = Tree> {
    let leaf = prop_oneof![
        (text(0..40), any::<bool>()).prop_map(|(contents, executable)| Tree::File { contents, executable }),
        text(1..8).prop_map(Tree::Symlink),
    ];
    leaf.prop_recursive(4, 40, 6, |tree| {
        proptest::collection::btree_map(text(1..5), tree, 0..6).prop_map(Tree::Directory)
    })
}

/// Receives the outputs in turn, as a session does on its own thread.
fn received(outputs: &[Tree], piece: usize, needles: &[&[u8]]) -> Result<Vec<BuildOutput>, ReceiveError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let needles = ReferencePattern::new(needles).unwrap();
    let store = Store::memory();
    let mut receiver = Receiver::new(&store, runtime.handle().clone(), &needles, LIMITS);
    let mut received = Vec::new();
    for tree in outputs {
        let mut events = Vec::new();
        tree.events(b"", piece, &mut events);
        for event in &events {
            received.extend(receiver.take(event)?);
        }
    }
    receiver.commit().map_err(ReceiveError::Store)?;
    for output in &received {
        if let Node::Directory { digest, .. } = &output.node {
            assert!(runtime.block_on(store.directories.get(digest)).unwrap().is_some());
        }
    }
    Ok(received)
}

proptest! {
    #[test]
    fn received_outputs_equal_the_sent_ones(outputs in proptest::collection::vec(trees(), 1..4), piece in 1_usize..20) {
        let needles: [&[u8]; 4] = [b"ab", b"abba", b"\xff\xff\xff", b"bbbbbb"];
        let received = received(&outputs, piece, &needles).unwrap();
        prop_assert_eq!(received.len(), outputs.len());
        for (output, tree) in received.iter().zip(&outputs) {
            prop_assert_eq!(&output.node, &tree.node());
            let expected = (0..).zip(needles).filter(|(_, needle)| tree.holds(needle)).map(|(index, _)| index).collect();
            prop_assert_eq!(&output.needles, &expected);
        }
    }

    /// An event out of place causes no panic and no incomplete output.
    #[test]
    fn a_reordered_stream_gives_no_incomplete_output(tree in trees(), from in 0_usize..60, to in 0_usize..60) {
        let mut events = Vec::new();
        tree.events(b"", 7, &mut events);
        let (from, to) = (from % events.len(), to % events.len());
        let moved = events.remove(from);
        events.insert(to.min(events.len()), moved);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let needles = ReferencePattern::new([b"ab"]).unwrap();
        let store = Store::memory();
        let mut receiver = Receiver::new(&store, runtime.handle().clone(), &needles, LIMITS);
        let mut check = tree::Check::new(LIMITS);
        for event in &events {
            let admitted = check.admit(event).is_ok();
            match receiver.take(event) {
                Ok(output) => {
                    prop_assert!(admitted);
                    prop_assert_eq!(output.is_some(), check.is_complete());
                    if check.is_complete() {
                        check.next_tree().unwrap();
                    }
                }
                Err(_) => break,
            }
        }
    }
}

/// A name of 250 bytes for each number, in ascending order.
fn long_name(number: usize) -> Vec<u8> {
    format!("{number:0250}").into_bytes()
}

#[test]
fn a_directory_that_takes_too_much_memory_is_refused_and_two_halves_of_it_are_not() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let needles = ReferencePattern::new::<&[u8]>([]).unwrap();
    let store = Store::memory();
    let limits = tree::Limits { entries: 1 << 20, bytes: 0 };
    let count = usize::try_from(MAX_DIRECTORY_MEMORY_BYTES).unwrap() / 1600;
    let receive = |directories: usize| {
        let mut receiver = Receiver::new(&store, runtime.handle().clone(), &needles, limits);
        receiver.take(&Event::Directory { name: b"" })?;
        for directory in 0..directories {
            receiver.take(&Event::Directory { name: &long_name(directory) })?;
            for entry in 0..count / directories {
                receiver.take(&Event::Symlink { name: &long_name(entry), target: b"t" })?;
            }
            receiver.take(&Event::End)?;
        }
        receiver.take(&Event::End).map(|output| assert!(output.is_some()))
    };
    assert!(matches!(receive(1), Err(ReceiveError::DirectoryMemory(_))));
    receive(2).unwrap();
}
