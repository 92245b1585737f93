//! What a connection keeps from garbage collection until it ends: all that it has asked for, brought or built.

use std::{collections::HashSet, io};

use cofferdam_castore::{B3Digest, Node, Store, blobservice::Lease};

/// Most nodes that a connection keeps. What it sees beyond is kept by its age alone.
const MAX_NODES: usize = 100_000;

/// The nodes of one connection.
#[derive(Debug, Default)]
pub(super) struct Roots {
    nodes: Vec<Node>,
    seen: HashSet<B3Digest>,
    /// Each has the nodes from its place up to the next one's, and more than twice as many as that: they are few.
    leases: Vec<(usize, Lease)>,
}

impl Roots {
    /// Keeps these nodes, too. Those that the store has after this call stay.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub(super) fn keep<'a>(&mut self, store: &Store, nodes: impl IntoIterator<Item = &'a Node>) -> io::Result<()> {
        let before = self.nodes.len();
        for node in nodes {
            let (Node::File { digest, .. } | Node::Directory { digest, .. }) = node else { continue };
            if self.nodes.len() < MAX_NODES && self.seen.insert(*digest) {
                self.nodes.push(node.clone());
            }
        }
        let (mut begin, mut left) = (before, self.leases.len());
        if begin == self.nodes.len() {
            return Ok(());
        }
        while let Some((place, _)) = left.checked_sub(1).and_then(|last| self.leases.get(last))
            && begin - place <= 2 * (self.nodes.len() - begin)
        {
            (begin, left) = (*place, left - 1);
        }
        let lease = store.blobs.lease(&self.nodes[begin..])?;
        self.leases.truncate(left);
        self.leases.push((begin, lease));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_nodes_take_few_leases() {
        let mut roots = Roots::default();
        let node = |at: usize| Node::File { digest: B3Digest::of(&at.to_le_bytes()), size: 8, executable: false };
        for at in 0..1000 {
            roots.keep(&Store::memory(), [&node(at), &node(at / 2)]).unwrap();
            assert!(roots.leases.len() <= 11, "{at}");
        }
        assert_eq!((roots.nodes.len(), roots.leases[0].0), (1000, 0));
    }
}
