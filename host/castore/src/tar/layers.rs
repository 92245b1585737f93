//! Roots: one archive, or the layers of an image.

use std::io::Read;

use super::{
    overlay::Overlay,
    read::{self, Entries},
};
use crate::{
    Node, PathComponent, Store,
    archive::{ArchiveError, Ingest, Limits},
    import::{Lost, SET_ID},
};

/// Prefix of a name that stands for the removal of the rest.
const WHITEOUT: &[u8] = b".wh.";

/// Prefix of names that have other meanings than removal.
const SPECIAL_WHITEOUT: &[u8] = b".wh..wh.";

/// The name that stands for the removal of all that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Imports the layers of an image, the lowest first, as one directory.
///
/// ```
/// # use cofferdam_castore::{Node, Store, archive::Limits, tar::Layers};
/// let mut layers = Layers::new(&Store::memory(), Limits::default());
/// layers.apply(&[0; 1024][..])?;
/// let (root, _) = layers.finish()?;
/// assert!(matches!(root, Node::Directory { size: 0, .. }));
/// # Ok::<_, cofferdam_castore::archive::ArchiveError>(())
/// ```
pub struct Layers {
    root: Root,
    ingest: Ingest,
}

struct Root {
    tree: Overlay,
    lost: Lost,
    has_whiteouts: bool,
}

impl Layers {
    /// Begins with an empty root. The limits are for all layers together.
    pub fn new(store: &Store, limits: Limits) -> Self {
        let root = Root { tree: Overlay::new(), lost: Lost::default(), has_whiteouts: true };
        Self { root, ingest: Ingest::new(store, limits) }
    }

    /// Lays the tar archive of a layer over those before it.
    ///
    /// Blocks: call it from a thread that may.
    ///
    /// # Errors
    ///
    /// As [`import`](super::import).
    pub fn apply(&mut self, archive: impl Read) -> Result<(), ArchiveError> {
        read::read(archive, &mut self.root, &mut self.ingest)?;
        self.root.tree.next_layer();
        Ok(())
    }

    /// Makes the root visible, durably.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn finish(self) -> Result<(Node, Lost), ArchiveError> {
        let node = read::finish(self.ingest, self.root.tree.into_directories()?)?;
        Ok((node, self.root.lost))
    }
}

/// Imports a tar archive of a root, durably. Unlike [`import`](super::import), it leaves out device nodes and fifos, takes
/// absolute paths as paths from the root, and lets entries replace any earlier one.
///
/// Blocks: call it from a thread that may.
///
/// # Errors
///
/// As [`import`](super::import).
pub fn import_root(store: &Store, archive: impl Read, limits: Limits) -> Result<(Node, Lost), ArchiveError> {
    let mut layers = Layers::new(store, limits);
    layers.root.has_whiteouts = false;
    layers.apply(archive)?;
    layers.finish()
}

impl Root {
    /// Whether the entry is a whiteout, which is then done.
    fn whiteout(&mut self, path: &[u8]) -> Result<bool, ArchiveError> {
        let mut parts = path.split(|&byte| byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
        if !self.has_whiteouts {
            return Ok(false);
        }
        if parts.clone().any(|part| part.starts_with(SPECIAL_WHITEOUT)) {
            if parts.next_back() == Some(OPAQUE) {
                self.tree.make_opaque(path)?;
            }
            return Ok(true);
        }
        let Some(name) = parts.next_back().and_then(|name| name.strip_prefix(WHITEOUT)) else { return Ok(false) };
        let name = PathComponent::try_from(name).map_err(|_| {
            let rule = "is a whiteout of no entry, but of a directory itself: a layer can't remove its root";
            ArchiveError::malformed(path, rule)
        })?;
        self.tree.hide(path, &name)?;
        Ok(true)
    }
}

impl Entries for Root {
    fn directory(&mut self, path: &[u8], ingest: &mut Ingest) -> Result<(), ArchiveError> {
        ingest.entry(path)?;
        if self.whiteout(path)? { Ok(()) } else { self.tree.directory(path, ingest) }
    }

    fn file(&mut self, path: &[u8], node: Node, mode: u32, ingest: &mut Ingest) -> Result<(), ArchiveError> {
        ingest.entry(path)?;
        if self.whiteout(path)? {
            return Ok(());
        }
        self.lost.set_id += u64::from(mode & SET_ID != 0);
        self.tree.leaf(path, Some(node), ingest)
    }

    fn symlink(&mut self, path: &[u8], node: Node, ingest: &mut Ingest) -> Result<(), ArchiveError> {
        ingest.entry(path)?;
        if self.whiteout(path)? { Ok(()) } else { self.tree.leaf(path, Some(node), ingest) }
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8], ingest: &mut Ingest) -> Result<(), ArchiveError> {
        ingest.entry(path)?;
        if self.whiteout(path)? {
            return Ok(());
        }
        let node = self.tree.linked(path, target)?;
        self.lost.devices += u64::from(node.is_none());
        self.tree.leaf(path, node, ingest)
    }

    fn special(&mut self, path: &[u8], _kind: &str, ingest: &mut Ingest) -> Result<(), ArchiveError> {
        ingest.entry(path)?;
        if self.whiteout(path)? {
            return Ok(());
        }
        self.lost.devices += 1;
        self.tree.leaf(path, None, ingest)
    }
}
