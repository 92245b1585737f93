//! Helpers for unit tests.

use std::{collections::BTreeMap, fs, os::unix::ffi::OsStrExt as _, path::Path};

use futures::executor::block_on;
use nix::libc;
use proptest::{collection::vec, prelude::*};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};
use tokio::io::AsyncWriteExt as _;

use crate::{B3Digest, Directory, Node, PathComponent, Store, SymlinkTarget};

pub(crate) fn name(name: &str) -> PathComponent {
    name.try_into().unwrap()
}

pub(crate) fn file(contents: &[u8], executable: bool) -> Node {
    Node::File { digest: B3Digest::of(contents), size: contents.len() as u64, executable }
}

/// The same, and stores its blob.
pub(crate) fn put(store: &Store, contents: &[u8], executable: bool) -> Node {
    block_on(async {
        let mut writer = store.blobs.open_write().await;
        writer.write_all(contents).await.unwrap();
        writer.close().await.unwrap();
    });
    file(contents, executable)
}

/// Stores a directory of these nodes.
pub(crate) fn put_directory(store: &Store, nodes: impl IntoIterator<Item = (&'static str, Node)>) -> Node {
    let nodes = nodes.into_iter().map(|(text, node)| (name(text), node));
    let directory = Directory::try_from_iter(nodes).unwrap();
    block_on(store.directories.put(directory.clone())).unwrap();
    directory.to_node()
}

pub(crate) fn symlink(target: &str) -> Node {
    Node::Symlink { target: target.try_into().unwrap() }
}

/// A tree, root first, that exceeds the limit for bytes.
pub(crate) fn too_large_tree() -> Vec<Directory> {
    let target = "t".repeat(4000);
    let links =
        |of: usize| (0..16_000).map(move |at| name(&format!("{of}-{at}"))).zip(std::iter::repeat(symlink(&target)));
    let below: Vec<_> = (0..5).map(|of| Directory::try_from_iter(links(of)).unwrap()).collect();
    let nodes = below.iter().enumerate().map(|(of, directory)| (name(&of.to_string()), directory.to_node()));
    let root = Directory::try_from_iter(nodes).unwrap();
    std::iter::once(root).chain(below).collect()
}

/// Pseudo-random bytes: SplitMix64 with seed 0, each number little-endian.
pub(crate) fn splitmix(bytes: usize) -> Vec<u8> {
    let mut state = 0_u64;
    let mut contents: Vec<u8> = (0..bytes.div_ceil(8))
        .flat_map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)).to_le_bytes()
        })
        .collect();
    contents.truncate(bytes);
    contents
}

/// Names of any bytes, most of them not UTF-8.
pub(crate) fn arb_name() -> impl Strategy<Value = PathComponent> {
    let bytes = prop_oneof![vec(any::<u8>(), 1..8), "[a-z.]{1,3}".prop_map(String::into_bytes), vec(any::<u8>(), 255)];
    bytes.prop_filter_map("breaks a rule of names", |bytes| PathComponent::try_from(bytes).ok())
}

fn arb_target() -> impl Strategy<Value = SymlinkTarget> {
    vec(1..=u8::MAX, 1..300).prop_map(|bytes| bytes.try_into().unwrap())
}

fn arb_node() -> impl Strategy<Value = Node> {
    let digest = any::<[u8; 32]>().prop_map(B3Digest::from);
    prop_oneof![
        (digest.clone(), 0..u64::from(u32::MAX)).prop_map(|(digest, size)| Node::Directory { digest, size }),
        (digest, any::<u64>(), any::<bool>()).prop_map(|(digest, size, executable)| Node::File {
            digest,
            size,
            executable
        }),
        arb_target().prop_map(|target| Node::Symlink { target }),
    ]
}

pub(crate) fn arb_directory() -> impl Strategy<Value = Directory> {
    proptest::collection::btree_map(arb_name(), arb_node(), 0..8)
        .prop_map(|nodes| Directory::try_from_iter(nodes).unwrap())
}

/// A tree as a file system has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tree {
    File { contents: Vec<u8>, executable: bool },
    Symlink(SymlinkTarget),
    Directory(BTreeMap<PathComponent, Tree>),
}

pub(crate) fn arb_tree() -> impl Strategy<Value = Tree> {
    let leaf = prop_oneof![
        (vec(any::<u8>(), 0..64), any::<bool>()).prop_map(|(contents, executable)| Tree::File { contents, executable }),
        arb_target().prop_map(Tree::Symlink),
        Just(Tree::Directory(BTreeMap::new())),
    ];
    leaf.prop_recursive(4, 24, 6, |inner| {
        proptest::collection::btree_map(arb_name(), inner, 0..6).prop_map(Tree::Directory)
    })
}

impl Tree {
    /// Writes it to a path that does not exist.
    pub(crate) fn write(&self, path: &Path) {
        use std::os::unix::fs::OpenOptionsExt as _;
        match self {
            Self::File { contents, executable } => {
                let mode = if *executable { 0o755 } else { 0o644 };
                let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path).unwrap();
                std::io::Write::write_all(&mut file, contents).unwrap();
            }
            Self::Symlink(target) => std::os::unix::fs::symlink(os(target.as_bytes()), path).unwrap(),
            Self::Directory(entries) => {
                fs::create_dir(path).unwrap();
                entries.iter().for_each(|(name, tree)| tree.write(&path.join(os(name.as_bytes()))));
            }
        }
    }

    /// Reads the tree at a path.
    pub(crate) fn read(path: &Path) -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let metadata = fs::symlink_metadata(path).unwrap();
        if metadata.is_symlink() {
            Self::Symlink(fs::read_link(path).unwrap().as_os_str().as_bytes().try_into().unwrap())
        } else if metadata.is_dir() {
            let entries = fs::read_dir(path).unwrap().map(|entry| {
                let entry = entry.unwrap();
                (entry.file_name().as_bytes().try_into().unwrap(), Self::read(&entry.path()))
            });
            Self::Directory(entries.collect())
        } else {
            let executable = metadata.permissions().mode() & 0o100 != 0;
            Self::File { contents: fs::read(path).unwrap(), executable }
        }
    }

    /// The node that it must become, reckoned without any of the code under test but the encoding.
    pub(crate) fn node(&self) -> Node {
        match self {
            Self::File { contents, executable } => file(contents, *executable),
            Self::Symlink(target) => Node::Symlink { target: target.clone() },
            Self::Directory(entries) => {
                let nodes = entries.iter().map(|(name, tree)| (name.clone(), tree.node()));
                Directory::try_from_iter(nodes).unwrap().to_node()
            }
        }
    }
}

fn os(bytes: &[u8]) -> &std::ffi::OsStr {
    std::ffi::OsStr::from_bytes(bytes)
}

/// Does `work` in a thread in which the system call fails whenever the argument has all these bits.
pub(crate) fn failing(
    (call, argument, bits): (libc::c_long, u8, libc::c_int),
    errno: nix::errno::Errno,
    work: impl FnOnce() + Send + 'static,
) {
    let bits = u64::from(bits.cast_unsigned());
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bits), bits);
    let rules = [(call, vec![SeccompRule::new(vec![condition.unwrap()]).unwrap()])];
    let fail = SeccompAction::Errno((errno as i32).cast_unsigned());
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules.into(), SeccompAction::Allow, fail, arch).unwrap();
    let filter: BpfProgram = filter.try_into().unwrap();
    std::thread::spawn(move || {
        apply_filter(&filter).unwrap();
        work();
    })
    .join()
    .unwrap();
}
